"""Ports for tests that several workers run at once."""

from __future__ import annotations

import os
import random
import socket

# Below those that Linux gives to whoever asks for none: a port that was free a moment ago stays free.
_ports = random.Random(os.getpid())


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    while True:
        port = _ports.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
