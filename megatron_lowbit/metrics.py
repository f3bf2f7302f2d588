"""What a run tells while it works: metrics.jsonl always, Weights & Biases when asked, progress bars on a terminal.

Only rank 0 writes. wandb is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_lowbit.config import LowBitError, one_line

T = TypeVar("T")


class MetricLogger:
    """Appends records to <output_dir>/metrics.jsonl and mirrors them to W&B (wandb: off, offline or online)."""

    def __init__(self, output_dir: str | Path, stage: str, config: dict[str, Any], wandb: str = "off", rank: int = 0):
        self.stage = stage
        self.active = rank == 0
        self.step = 0
        self._run: Any = None
        if not self.active:
            return
        path = Path(output_dir) / "metrics.jsonl"
        try:
            self._file = open(path, "a")  # noqa: SIM115 (open for the logger's life)
        except OSError as error:
            raise LowBitError(f"cannot write {str(path)!r}: {error.strerror}") from None
        if wandb != "off":
            self._wandb = require("wandb", "wandb")
            try:
                self._run = self._wandb.init(
                    project="megatron-lowbit",
                    job_type=stage,
                    config=config,
                    mode=wandb,
                    dir=str(output_dir),
                    settings=self._wandb.Settings(silent=True),
                )
            except self._wandb.Error as error:
                message = f"wandb={wandb} did not start: {one_line(error)}; run `wandb login` or set wandb=offline"
                raise LowBitError(message) from None

    def log(self, **values: float | int | str) -> None:
        """One record: the step counts up by itself."""
        if not self.active:
            return
        record = {"stage": self.stage, "step": self.step, "time": time.time(), **values}
        self._write(record)
        if self._run is not None:
            self._run.log({**values, "step": self.step})
        self.step += 1

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A per-layer table: one JSONL record, one W&B table."""
        if not self.active:
            return
        self._write({"stage": self.stage, "table": name, "columns": columns, "rows": rows})
        if self._run is not None:
            self._run.log({name: self._wandb.Table(columns=columns, data=rows)})

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise LowBitError(f"cannot write {self._file.name!r}: {error.strerror}") from None

    def summary(self, **values: Any) -> None:
        if self.active and self._run is not None:
            self._run.summary.update(values)

    def close(self, exit_code: int = 0) -> None:
        if self.active:
            with contextlib.suppress(OSError):  # a full disk was told when it was met
                self._file.close()
            if self._run is not None:
                self._run.finish(exit_code=exit_code)


def require(module: str, extra: str) -> Any:
    """Import an optional package, or raise LowBitError with the pip command that installs it."""
    try:
        with warnings.catch_warnings():  # Megatron-Core warns four times that Transformer Engine is not there
            warnings.simplefilter("ignore", UserWarning)
            package = import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        package = None
    if getattr(package, "__file__", None) is None:  # a folder of that name on the path imports as an empty package
        raise LowBitError(f"{module.replace('.', '-')} is not installed; pip install 'megatron-lowbit[{extra}]'")
    return package


def progress(items: Iterable[T], total: int, description: str, rank: int = 0) -> Iterator[T]:
    """Iterate with a bar and an ETA on rank 0's standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def peak_memory() -> int:
    """The most bytes this process has held so far: on its GPU where there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for every JSON result."""
    versions = {"python": platform.python_version()}
    for package in ("megatron-lowbit", "torch", "transformers", "deepspeed", "megatron-core", "datasets", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    folder = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "accelerator": accelerator,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
