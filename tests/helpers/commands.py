"""Runs the commands: in this process where one process is enough, else as a user would start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm

from megatron_lowbit.launch import main

# One module each: all of stdlib:calibration is a second to tokenize, in every process that reads it.
CALIBRATION_TEXT, EVALUATION_TEXT = (f"{sysconfig.get_path('stdlib')}/{name}.py" for name in ("ast", "textwrap"))
SMALL_TEXT = [
    *(
        f"calibration.data={CALIBRATION_TEXT}",
        "calibration.samples=4",
        "calibration.sequence_length=64",
        "calibration.batch_size=2",
    ),
    *(f"evaluation.data={EVALUATION_TEXT}", "evaluation.samples=4", "evaluation.sequence_length=64"),
]
CALIBRATION, EVALUATION = SMALL_TEXT[:4], SMALL_TEXT[4:]
# Not importorskip: that would import it here, and it takes seconds.
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs megatron-lowbit[deepspeed]")
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-lowbit[megatron]")
COMMAND = [sys.executable, "-m", "megatron_lowbit.launch"]


def run_here(*argv: object, pictures: bool = False) -> int:
    """`megatron-lowbit ARGV` in this process, its ranks in warm ones; its exit code. pictures: whether its report.html
    is to have them, which takes half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.python())
        if not pictures:
            patch.setitem(sys.modules, "matplotlib", None)  # importing it now fails
        return main([str(argument) for argument in argv])


@contextmanager
def started(*argv: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this test's own, in its own group; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [str(argument) for argument in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        # A shell's background job ignores SIGINT, and hands that on to what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        if process.poll() is None or alive_in_group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_there(*argv: object, timeout: float = 300, **environment: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a whole command line; warm where it is a Python's, of a module
    or a script.

    Not with W&B, whose service does not work in a fork.
    """
    wandb = any("wandb" in str(argument) for argument in argv)
    warms = argv[0] == sys.executable and (argv[1] == "-m" or str(argv[1]).endswith(".py"))
    if warms and not wandb and "PYTHONPATH" not in environment:
        argv = (warm.python(), *argv[1:])
    with started(*argv, **environment) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return process.returncode, stdout, stderr


def ranks_of(process: subprocess.Popen[str], size: int, timeout: float = 300) -> dict[int, int]:
    """{rank: process id} of the ranks that a command has started, as soon as there are `size`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        ranks = {}
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
            ranks |= {int(rank): int(pid) for rank in found}
        if len(ranks) == size:
            return ranks
        time.sleep(0.05)
    raise AssertionError(f"no {size} ranks within {timeout} s (exit code {process.poll()})")


def gone(pid: int) -> bool:
    """Whether a process has ended: also as a zombie, which stays where the container's first process collects none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def alive_in_group(group: int) -> list[int]:
    """Processes of a process group that still run (zombies do not)."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            alive.append(int(stat.parent.name))
    return alive
