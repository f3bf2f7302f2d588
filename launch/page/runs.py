"""Read what an output_dir holds: results of stages, calibrated ranges, communication plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lowbit.comm.plan import CalibrationStats, CommPlan, plan_sizes
from megatron_lowbit.config import LowBitError, one_line, shown
from megatron_lowbit.io.files import parse_json
from megatron_lowbit.launch import STAGES


@dataclass(frozen=True)
class Run:
    """One output_dir. stages: {stage: what <stage>.json holds}, in the order of the commands; artifact: where ranges
    and plans are, None for no such folder."""

    name: str
    folder: Path
    stages: dict[str, dict[str, Any]]
    artifact: Path | None

    @cached_property
    def stats(self) -> CalibrationStats | None:
        there = self.artifact is not None and (self.artifact / "calibration.json").exists()
        return CalibrationStats.load(self.artifact) if there and self.artifact else None

    @cached_property
    def plans(self) -> dict[int, CommPlan]:
        folder = self.artifact
        return {size: CommPlan.load(folder, size) for size in plan_sizes(folder)} if folder else {}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (stage, row) of all results."""
        for stage, record in self.stages.items():
            for row in record["rows"]:
                yield stage, row


def read_runs(folders: list[str | Path]) -> list[Run]:
    """Read several folders. Raises LowBitError for one that is not there, holds no results or damaged ones."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read one folder; raises LowBitError, see read_runs."""
    path = Path(folder)
    if not path.is_dir():
        raise LowBitError(f"{shown(str(folder))} is no folder; name the output_dir of a command")
    stages = {stage: _record(file) for stage in STAGES if (file := path / f"{stage}.json").is_file()}
    inside = (path, path / "artifact")  # where the demo has it
    artifact = next((place for place in inside if (place / "calibration.json").exists() or plan_sizes(place)), None)
    if not stages and artifact is None:
        raise LowBitError(f"{shown(str(folder))} holds no results; name the output_dir of a command that has ended")
    return Run(name or path.resolve().name, path, stages, artifact)


def _record(file: Path) -> dict[str, Any]:
    """Return what a stage has written. NaN is let through: a model may have that perplexity."""
    try:
        record = parse_json(file.read_bytes(), nan=True)
    except (OSError, ValueError) as error:
        raise LowBitError(f"cannot read {str(file)!r}: {one_line(error)}; run the command again") from None
    rows = record.get("rows") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LowBitError(f"{str(file)!r} is no result of a command: it has no rows; run the command again")
    return record


def figure_of(row: Any, key: str) -> float | None:
    """Return a number of a row; None where there is none, or one that is not finite."""
    value = row.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if usable else None


def dicts_of(row: Any, key: str) -> list[dict[str, Any]]:
    """Return the objects of a list in a row, without what is none."""
    value = row.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers_of(row: Any, key: str) -> dict[str, float]:
    """Return {name: number} of an object in a row."""
    value = row.get(key)
    named = value if isinstance(value, dict) else {}
    return {name: number for name in named if (number := figure_of(named, name)) is not None}


def list_of(row: Any, key: str) -> list[float]:
    """Return a list of numbers; empty where it holds anything else."""
    value = row.get(key)
    numbers = [figure_of({"": item}, "") for item in value] if isinstance(value, list) else []
    return [number for number in numbers if number is not None] if None not in numbers else []


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
