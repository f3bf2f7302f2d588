"""Ranks of one machine on hosts of their own, behind links of a given rate: what netlab.sh does, as a context."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_lowbit.config import LowBitError

NETLAB = Path(__file__).with_name("netlab.sh")
FIRST_HOST = "10.77.0.1"


@contextlib.contextmanager
def network(rate: str | None, ranks: int) -> Iterator[list[list[str]]]:
    """Yield what a command line has to start with to run on the host of each rank."""
    if rate is None:
        yield [[]] * ranks
        return
    try:
        created = call("up", str(ranks), rate)
        if created.returncode:
            reason = " ".join((created.stderr.strip().splitlines() or ["netlab.sh failed"])[-1].split())
            raise LowBitError(
                f"rate={rate}: cannot make network namespaces ({reason}); leave rate out to measure on loopback"
            )
        yield [["env", f"NETLAB_NAME={_name()}", "bash", str(NETLAB), "run", str(rank)] for rank in range(ranks)]
    finally:
        with uninterrupted():
            call("down")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run netlab.sh in a session of its own, so that Ctrl-C reaches this process only."""
    return subprocess.run(
        ["bash", str(NETLAB), *arguments],
        env={**os.environ, "NETLAB_NAME": _name()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        start_new_session=True,
    )


def no_namespaces() -> str | None:
    """Return why this process cannot make network namespaces, as far as can be seen without trying."""
    missing = [tool for tool in ("bash", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian and Ubuntu: the packages bash and iproute2)"
    return "needs root, for one network namespace per rank" if os.geteuid() != 0 else None


def on_a_host() -> bool:
    """Return whether this process was started on a host of `network`."""
    return "NETLAB_NAME" in os.environ


def _name() -> str:
    return f"lowbit-{os.getpid()}"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait: a second one must not cut the clearing up short."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
