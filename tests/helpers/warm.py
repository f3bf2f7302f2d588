"""A warm Python for tests: a process that has imported the frameworks, and forks where a command is to be started.

Importing torch, transformers, datasets and DeepSpeed takes 10 s and more on a slow machine, and a command with two
ranks does it three times. `python()` is an executable that takes `-m module ...` or `script ...` as a Python does, but
has the warm process fork and run that, with the caller's arguments, environment, folder and standard streams. What the
module starts by `sys.executable` is warm too. Signals are passed on, a caller that is killed takes its fork with it,
and the exit code is the fork's. In another network namespace, where no fork would be, the executable is a Python of
its own. Tests of launchers, of kills and of process trees start one of their own too.

    warm_client.py  -- arguments, environment, folder, the three streams; then a byte per signal -->  serve
                    <-- wait status, once the fork has ended --
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from megatron_lowbit.runtime.preemption import HELD_BACK, PARENT

PRELOADED = ("torch.distributed.run", "transformers.models.llama.modeling_llama", "datasets", "deepspeed")
OURS = ("launch.runner", "launch.engines.start", "adapters.deepspeed", "adapters.huggingface", "kernels")


def preloaded() -> list[str]:
    """What the warm process imports; packages that are not installed are left out."""
    ours = [*OURS, "adapters.megatron"] if find_spec("megatron") else OURS
    return [name for name in PRELOADED if find_spec(name.partition(".")[0])] + [f"megatron_lowbit.{n}" for n in ours]


@functools.cache
def context() -> multiprocessing.context.ForkServerContext:
    """Where processes of multiprocessing start warm."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(preloaded())
    return made


@functools.cache
def python() -> str:
    """Path of the warm Python; starts the server at the first call, and ends it with this process."""
    folder = Path(tempfile.mkdtemp(prefix="lowbit-warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    client, here = Path(__file__).with_name("warm_client.py"), os.readlink("/proc/self/ns/net")
    command = folder / "python"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {client} {folder / "socket"} "{here}" "$@"\n')
    command.chmod(0o755)
    theirs, ours = context().Pipe(duplex=False)  # it closes with this process, and the server ends
    server = context().Process(target=serve, args=(listener, theirs, str(command)), daemon=True)
    server.start()
    theirs.close()
    listener.close()
    atexit.register(ours.close)
    return str(command)


def serve(listener: socket.socket, alive: Connection, executable: str) -> None:
    """Fork for every caller, until the other end of `alive` closes."""
    os.setsid()
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    ended.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for source in (listener, alive, ended):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            source = key.fileobj
            if source is alive:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                return
            if source is ended:
                with contextlib.suppress(BlockingIOError):
                    ended.recv(4096)
                _reap(forks, selector)
            elif source is listener:
                caller, _ = listener.accept()
                request, streams = _receive(caller)
                if request is None:
                    caller.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for inherited in (listener, alive, ended, wake, caller, *forks.values()):
                        inherited.close()
                    _run(request, streams, executable)
                for stream in streams:
                    os.close(stream)
                forks[pid] = caller
                selector.register(caller, selectors.EVENT_READ, pid)
            else:
                _pass_on(source, key.data, forks, selector)


def _receive(caller: socket.socket) -> tuple[dict | None, list[int]]:
    """A caller's request and its three streams; None where it has gone."""
    caller.settimeout(30)
    try:
        data, streams, _, _ = socket.recv_fds(caller, 8, 3)
        while len(data) < 8:
            data += caller.recv(8 - len(data)) or _gone()
        length, data = int.from_bytes(data, "big"), b""
        while len(data) < length:
            data += caller.recv(length - len(data)) or _gone()
    except OSError:
        return None, []
    caller.settimeout(None)
    return json.loads(data), list(streams)


def _gone() -> NoReturn:
    raise ConnectionError("the caller has ended")


def _pass_on(caller: socket.socket, pid: int, forks: dict[int, socket.socket], selector: selectors.BaseSelector):
    """A caller's signals go to its fork; where the caller was killed, so is the fork."""
    try:
        numbers = caller.recv(64)
    except OSError:
        numbers = b""
    if not numbers:
        selector.unregister(caller)
    if pid in forks:
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)


def _reap(forks: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell callers how their forks have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        caller = forks.pop(pid)
        with contextlib.suppress(KeyError):
            selector.unregister(caller)
        with contextlib.suppress(OSError):
            caller.sendall(status.to_bytes(4, "big"))
        caller.close()


def _run(request: dict, streams: list[int], executable: str) -> NoReturn:
    """A fork's life: become what the caller asked for, run the module, end as a Python does."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # until there are handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        if PARENT in os.environ:  # a fork's parent is the server; the client watches the one that is meant
            os.environ[PARENT] = str(os.getppid())
        sys.stdin, sys.executable = os.fdopen(0), executable
        # Not a daemon, as any process of a user's is not: Megatron writes checkpoints from processes of its own.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        _main(request["arguments"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _main(arguments: list[str]) -> None:
    import torch

    if arguments[:1] == ["-u"]:
        del arguments[0]
    script = arguments[0] != "-m"
    if script and arguments[0].startswith("-"):
        raise SystemExit(f"the warm Python runs `-m module` or a script alone, not {arguments[:1]}")
    sys.argv = arguments[1 - script :]
    module = sys.argv[0]
    if module.startswith("megatron_lowbit.launch"):  # as importing it under `python -m` does
        from megatron_lowbit.runtime import preemption

        preemption.install()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures take half a second of every stage
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        warnings.filterwarnings("error", message="no report.html")  # as in pyproject.toml
        if script:
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
