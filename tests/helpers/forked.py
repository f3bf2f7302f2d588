"""Runs a function in a fork of this process: it has imported everything, so that a case costs milliseconds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class Forked:
    """A child, and the end of the pipe that it writes its output to."""

    pid: int
    pipe: int
    text: str = ""
    code: int | None = None

    def send_signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def read_until(self, part: str, timeout: float = 300) -> str:
        """What it has printed up to now, which holds `part`."""
        while part not in self.text:
            assert self._read(timeout), f"it never said {part!r}: {self.text}"
        return self.text

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """(exit code, all it printed); killed, and an AssertionError, after so many seconds without a word."""
        try:
            while self._read(timeout):
                pass
        finally:
            if self.code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code, self.text

    def _read(self, timeout: float) -> bool:
        """False at the end of the pipe, once the child is gone."""
        assert select.select([self.pipe], [], [], timeout)[0], f"silent for {timeout} s: {self.text}"
        data = os.read(self.pipe, 65536)
        self.text += data.decode(errors="replace")
        if not data and self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return bool(data)


@contextlib.contextmanager
def forked(function: Callable[[], object], **environ: object) -> Iterator[Forked]:
    """The child calls `function`, with these variables, and ends with its exit code: what it returns, 0 for None."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            os.dup2(theirs, 1)
            os.dup2(theirs, 2)
            os.close(ours)
            os.close(theirs)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
            os.environ.update({name: str(value) for name, value in environ.items()})
            code = int(function() or 0)  # type: ignore[call-overload]
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    child = Forked(pid, ours)
    try:
        yield child
    finally:
        if child.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            child.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(ours)
