"""Runs of `quantize` that are killed, and what is to be seen of them in their folder."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from commands import CALIBRATION_TEXT, run_here
from forked import Forked

SETTINGS = [
    *(f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=64"),
    *("weights.scheme=W4A4", "reassembly.expansions=[0.05]", "correction.blocks_per_group=1", "correction.epochs=1"),
    *("comm.tp_sizes=[2]",),
]


def killed_at(action: str, count: int, command: list[str]) -> None:
    """Run the command in a fork of this process, which kills itself right before `action`, for the count-th time.

    action: "replace:GLOB" or "unlink:GLOB", of a file's name.
    """
    name, _, pattern = action.partition(":")
    real, left = getattr(os, name), count

    def watched(*args, **kwargs):
        nonlocal left
        if fnmatch.fnmatch(os.path.basename(str(args[1 if name == "replace" else 0])), pattern):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    child = os.fork()
    if child == 0:
        try:
            setattr(os, name, watched)
            os._exit(run_here(*command))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it never came to {action}: {status}"


def quantize(model: Path, output: Path, *more: str) -> list[str]:
    return ["quantize", f"model={model}", *SETTINGS, f"output_dir={output}", *more]


def artifact_files(folder: Path) -> dict[str, str]:
    """{file: sha256} of all that makes up the artifact; what tells of the run itself is left out."""
    told = {"metrics.jsonl", "quantize.json", "quantize.yaml", "report.html"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name not in told and not path.name.startswith(".")
    }


def metrics(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "step" in record]


def done(folder: Path) -> int | None:
    """Groups that the state says are done; None without a state."""
    file = folder / "resume" / "state.json"
    return json.loads(file.read_text())["done"] if file.exists() else None


def kill_when(process: subprocess.Popen[str] | Forked, ready: Callable[[], bool], victim: int | None = None) -> None:
    """SIGKILL the process (or `victim`) as soon as ready()."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid if victim is None else victim, signal.SIGKILL)


def renamed(name: str) -> str:
    """Without the settings' digest: tp is one of them."""
    return "-".join(["lowbit", *name.split("-")[2:]]) if name.startswith("lowbit-") else name
