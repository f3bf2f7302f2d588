"""SIGUSR1 and SIGTERM: a scheduler wants its machines back, and the run is to stop where it can be continued.

The handler only notes the signal. Ranks look at each step (`PreemptionCheck`, in distributed.py), agree, and
all leave at the same one with exit code 99, which asks the scheduler to run the job again. `install` comes before all
slow imports, because a SIGUSR1 without a handler kills the process; this file imports nothing slow. A second SIGTERM
ends the process at once, and so does SIGINT: with one line and exit code 130. A process that another of ours has
started (`child_of`) leaves that line to its parent, and does not outlive it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

REQUEUE = 99
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
HELD_BACK = (*SIGNALS, signal.SIGINT)  # from a rank of ours until it has handlers for them
ECHO = 5.0  # seconds in which a second SIGTERM is the first one again, passed on by a launcher
INTERRUPTED = 128 + signal.SIGINT
PARENT = "MEGATRON_LOWBIT_PARENT"
_PR_SET_PDEATHSIG = 1

received: list[signal.Signals] = []
_first_term: float | None = None
_first_int: float | None = None
_parent_speaks = False


class Preempted(Exception):
    """All ranks have agreed to stop here; the message says what a later run continues from."""


def asked() -> bool:
    """Return whether this process has been told to stop."""
    return bool(received)


def install() -> dict[signal.Signals, Any]:
    """Note the signals from now on; returns the handlers before, for `restore`. Main thread only, else does nothing."""
    global _first_term, _first_int
    if threading.current_thread() is not threading.main_thread():
        return {}
    if signal.getsignal(signal.SIGUSR1) is _note:
        return {}
    received.clear()
    _first_term = _first_int = None
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    if parent := os.environ.pop(PARENT, None):
        _end_with(int(parent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)  # whoever started this rank may have held them back
    atexit.register(_ignore)
    return before


def child_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process of ours that is to end with this one."""
    return {**environ, PARENT: str(os.getpid())}


def restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
    if before:
        received.clear()


def _ignore() -> None:
    """Ignore the signals from now on. Python puts the default handlers back as it ends: a rank that left because
    another had been told to would then be killed by its own signal, a moment late, and the exit code 99 be lost."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _end_with(parent: int) -> None:
    """Die with the parent, however it dies: its ranks would hold the output folder, and wait for nobody. Linux only."""
    global _parent_speaks
    _parent_speaks = True
    if die_with_parent() and os.getppid() != parent:  # it died before that
        os._exit(1)


def die_with_parent() -> bool:
    """Have the kernel kill this process when the thread that started it ends. Returns whether it will: on Linux."""
    with contextlib.suppress(AttributeError, OSError):
        return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    return False


def _interrupt(number: int, frame: object) -> None:
    global _first_int
    now = time.monotonic()
    if _first_int is not None:
        if now - _first_int > ECHO:
            os._exit(INTERRUPTED)
        return
    _first_int = now
    if not _parent_speaks:
        print("megatron-lowbit: interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)  # through the `finally`s, which end what this process started


def _note(number: int, frame: object) -> None:
    global _first_term
    now = time.monotonic()
    if number == signal.SIGTERM:
        if _first_term is not None and now - _first_term > ECHO:
            sys.exit(128 + signal.SIGTERM)  # through the `finally`s, which end what this process started
        _first_term = now if _first_term is None else _first_term
    received.append(signal.Signals(number))
