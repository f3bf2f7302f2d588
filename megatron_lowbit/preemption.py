"""SIGUSR1 and SIGTERM: a scheduler wants its machines back, and the run is to stop where it can be continued.

The handler only notes the signal. Ranks look at each step (`Watch`, in distributed.py), agree, and all leave at the
same one with exit code 99, which asks the scheduler to run the job again. `install` comes before all slow imports,
because a SIGUSR1 without a handler kills the process; this file imports nothing slow. A second SIGTERM ends the process
at once.
"""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from typing import Any

REQUEUE = 99
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
ECHO = 5.0  # seconds in which a second SIGTERM is the first one again, passed on by a launcher

received: list[signal.Signals] = []
_first_term: float | None = None


class Preempted(Exception):
    """All ranks have agreed to stop here; the message says what a later run continues from."""


def asked() -> bool:
    """Whether this process has been told to stop."""
    return bool(received)


def install() -> dict[signal.Signals, Any]:
    """Note the signals from now on; returns the handlers before, for `restore`. Main thread only, else does nothing."""
    global _first_term
    if threading.current_thread() is not threading.main_thread():
        return {}
    if signal.getsignal(signal.SIGUSR1) is _note:
        return {}
    received.clear()
    _first_term = None
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # whoever started this rank may have held them back
    atexit.register(_ignore)
    return before


def restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
    if before:
        received.clear()


def _ignore() -> None:
    """Python puts the default handlers back as it ends: a rank that left because another had been told to would then be
    killed by its own signal, a moment late, and the exit code 99 be lost."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: object) -> None:
    global _first_term
    now = time.monotonic()
    if number == signal.SIGTERM:
        if _first_term is not None and now - _first_term > ECHO:
            sys.exit(128 + signal.SIGTERM)  # through the `finally`s, which end what this process started
        _first_term = now if _first_term is None else _first_term
    received.append(signal.Signals(number))
