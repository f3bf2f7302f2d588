"""What a run tells while it works: metrics.jsonl always, Weights & Biases when asked, progress bars on a terminal.

Only rank 0 writes. wandb is imported when it is first needed (wandb_run.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_lowbit.config import LowBitError, unwritten
from megatron_lowbit.io.files import parse_json
from megatron_lowbit.runtime.launcher_env import env_world_size
from megatron_lowbit.runtime.say import say
from megatron_lowbit.runtime.wandb_run import WandbRun

T = TypeVar("T")


# What a record is about; its other values are what was measured.
_LABELS = ("variant", "group", "epoch", "calibration_batch", "row", "ranks", "bytes", "table")
_FREE = ("output_dir", "wandb")  # settings that may differ between the processes of one logical run


class MetricLogger:
    """A log: appends records to <output_dir>/metrics.jsonl and mirrors them to W&B (wandb: off, offline or online).

    A stage that was killed, and is started again with the same settings and code, continues one logical run: its id
    stays, its steps go on, and what it does again is not told again. Every process leaves an event "start" (with its
    environment) and, unless it was killed, an event "end".

    labels: what all records from now on are about.
    """

    def __init__(self, output_dir: str | Path, stage: str, config: dict[str, Any], wandb: str = "off", rank: int = 0):
        self.stage = stage
        self.active = rank == 0
        self.labels: dict[str, Any] = {}
        self.data: dict[str, dict[str, Any]] = {}
        self._run: WandbRun | None = None
        if not self.active:
            return
        path = Path(output_dir) / "metrics.jsonl"
        about = {**environment(), "job": job()}
        settings = _digest({**{k: v for k, v in config.items() if k not in _FREE}, "commit": about["commit"]})
        self.run_id, records = _continued(path, stage, settings)
        self.step = 1 + max((record["step"] for record in records), default=-1)
        self._logged_before = Counter(_about(record) for record in records)
        self._path, self._size = path, path.stat().st_size if path.exists() else None
        self._measured = False
        try:
            self._file = open(path, "a")  # noqa: SIM115 (open for the logger's life)
        except OSError as error:
            raise unwritten(path, error) from None
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.write("\n")  # after a line that a kill has cut short
        try:
            self._write({"event": "start", "settings": settings, "environment": about})
        except LowBitError:
            self._withdraw()
            raise
        if wandb != "off":
            require("wandb", "wandb")
            everything = {**config, "environment": about}
            self._run = WandbRun(wandb, Path(output_dir), self.run_id, stage, everything, records)

    def log(self, **values: float | int | str) -> None:
        """Write one record: the step counts up by itself."""
        self._record(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], plot: tuple[str, ...] = ()) -> None:
        """Write a table, of layers for example: one record. plot: (x, y) of a bar chart in W&B, (x, y, line) of
        lines."""
        name = "/".join([*map(str, self.labels.values()), name])
        values: dict[str, Any] = {"table": name, "columns": columns, "rows": rows}
        self._record({**values, "plot": plot} if plot else values)

    def read(self, key: str, about: dict[str, Any]) -> None:
        """Say in one line what text was read for a config section (texts.Texts.about), and keep it for the result."""
        self.data[key] = about
        what = {"text": "one text", "chat template": f"column {about['column']} by the tokenizer's chat template"}
        how = what.get(about["read_as"], f"column {about['column']}")
        left = f", {about['left_out']} rows left out by the template" if about["left_out"] else ""
        few = f" (fewer than {key}.samples={about['wanted']})" if about["windows"] < about["wanted"] else ""
        say(f"{key}.data={about['source']}: {how}, {about['windows']} windows{few}{left}; it begins {about['first']!r}")

    def artifact(self, kind: str, files: Iterable[str | Path]) -> None:
        """Tell W&B of files that were written: references, not copies."""
        if self._run is not None and (paths := [Path(file) for file in files]):
            folder = paths[0].absolute().parent.name
            name = re.sub(r"[^\w.-]", "-", f"{folder}-{kind}")
            self._run.artifact(name, kind, paths, {"run": self.run_id, "stage": self.stage})

    def page(self, file: Path) -> None:
        """Show a page of this run, with all its pictures and tables, in W&B."""
        if self._run is not None:
            self._run.page(file)

    def summary(self, **values: Any) -> None:
        if self._run is not None:
            self._run.summary(**values)

    def close(self, exit_code: int = 0, refused: bool = False) -> None:
        """End the log. refused: whether the command's input was; where nothing was measured the file is then as before.

        A run in W&B is kept: there are no steps in it, and its exit code says why.
        """
        if self.active:
            with contextlib.suppress(LowBitError, OSError):  # a full disk was told when it was met
                self._write({"event": "end", "exit_code": exit_code})
            with contextlib.suppress(OSError):
                self._file.close()
            if refused and not self._measured:
                self._withdraw()
            if self._run is not None:
                self._run.close(exit_code)

    def _withdraw(self) -> None:
        """Leave metrics.jsonl as this process found it."""
        with contextlib.suppress(OSError):
            if self._size is None:
                self._path.unlink()
            else:
                os.truncate(self._path, self._size)

    def _record(self, values: dict[str, Any]) -> None:
        if not self.active:
            return
        values = {**self.labels, **values}
        if self._logged_before[_about(values)]:  # by an earlier process of this run
            self._logged_before[_about(values)] -= 1
            return
        self._measured = True
        record = self._write({"step": self.step, **values})
        if self._run is not None:
            self._run.log(record)
        self.step += 1

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        record = {"stage": self.stage, "run": self.run_id, "time": time.time(), **values}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritten(self._file.name, error) from None
        return record


def _about(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record is about and which figures it holds: the same when a killed run does something again."""
    figures = record.keys() - {"stage", "run", "step", "time", "plot"}
    return (*sorted(figures), *((label, str(record.get(label))) for label in _LABELS))


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _continued(path: Path, stage: str, settings: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (id, records with a step so far) of the stage's last run if that has not finished and had these
    settings."""
    mine = [record for record in read_metrics(path) if record.get("stage") == stage]
    starts = [record for record in mine if record.get("event") == "start"]
    if starts and starts[-1].get("settings") == settings:
        run = [record for record in mine if record.get("run") == starts[-1].get("run")]
        if not any(record.get("event") == "end" and record.get("exit_code") == 0 for record in run):
            return str(starts[-1].get("run")), [record for record in run if type(record.get("step")) is int]
    return f"{stage}-{uuid.uuid4().hex[:10]}", []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, without lines that a kill or a full disk has cut short."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            records.append(parse_json(line, nan=True))
    return [record for record in records if isinstance(record, dict)]


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


_outer: Progress | None = None  # the display of the loop that runs, which loops within it add their bars to


def on_a_terminal() -> bool:
    """Tell whether bars are shown: whether standard error is a terminal."""
    return Console(stderr=True).is_terminal


def progress(items: Iterable[T], total: int, description: str, rank: int = 0) -> Iterator[T]:
    """Iterate with a bar and an ETA on rank 0's standard error, where that is a terminal; a loop within another has its
    bar below that one's, while it runs."""
    global _outer
    if rank != 0:
        yield from items
    elif _outer is not None:
        task = _outer.add_task(description, total=total)
        try:
            yield from _outer.track(items, total=total, task_id=task)
        finally:
            _outer.remove_task(task)
    else:
        console = Console(stderr=True)
        console.file = console.file  # also while standard error is sent elsewhere
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as _outer:
            try:
                yield from _outer.track(items, total=total, description=description)
            finally:
                _outer = None


def peak_memory() -> int:
    """Return the most bytes this process has held so far: on its GPU where there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """Return versions, commit and machine, for every JSON result."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": _versions(),
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "accelerator": accelerator,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("megatron-lowbit", "torch", "transformers", "deepspeed", "megatron-core", "datasets", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _commit() -> str | None:
    folder = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() if git.returncode == 0 else None


def job() -> dict[str, Any]:
    """Return where this process runs, and who started it."""
    slurm = {key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if key in os.environ}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        launcher = "mpirun"
    else:
        launcher = "srun" if "SLURM_PROCID" in os.environ else "none"
    return {"host": socket.gethostname(), "world_size": env_world_size(), "launcher": launcher, **slurm}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
