"""Section of what it took: seconds of every stage, of every row and group of blocks, and the bytes that came out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_lowbit.launch.page import plots
from megatron_lowbit.launch.page.figure import Figure, Section
from megatron_lowbit.launch.page.runs import Run, dicts_of, figure_of

SECONDS = {"quantize_seconds": "quantized", "evaluate_seconds": "evaluated", "seconds": ""}


def section(runs: Sequence[Run]) -> Section | None:
    figures = [*_seconds(runs), *_bytes(runs)]
    return Section("Time and size", figures) if figures else None


def _seconds(runs: Sequence[Run]) -> list[Figure]:
    """Return the seconds of each stage, and what they were spent on as far as a stage says."""
    stages: list[list[Any]] = [
        [run.name, stage, seconds]
        for run in runs
        for stage, record in run.stages.items()
        if (seconds := figure_of(record, "seconds")) is not None
    ]
    figures = []
    if stages:
        says = "The seconds of each command from its first line to its last, with loading and reading text."
        names = [f"{run}: {stage}" if len(runs) > 1 else stage for run, stage, _ in stages]
        picture = partial(plots.bars, "z", names, {"seconds": [s for *_, s in stages]}, "seconds", False)
        figures.append(
            Figure("Time by stage", says, ["run", "stage", "seconds"], stages, picture if len(stages) > 1 else None)
        )
    parts = []
    for run in runs:
        for stage, row in run.rows():
            for key, what in SECONDS.items():
                seconds = figure_of(row, key)
                if what and seconds is not None:
                    parts.append([run.name, f"{what} {row.get('name', stage)}", seconds, None])
            for number, group in enumerate(dicts_of(row, "groups")):
                about = [figure_of(group, "seconds"), figure_of(group, "peak_bytes")]
                parts.append([run.name, f"group {number} of blocks", *about])
    if parts:
        says = "What the seconds of a command were spent on, as far as it says, and the most memory until then."
        figures.append(Figure("Time by part", says, ["run", "part", "seconds", "peak bytes"], parts))
    return figures


def _bytes(runs: Sequence[Run]) -> list[Figure]:
    """Return the bytes of every artifact beside those that its bits alone would take."""
    rows = [
        [run.name, str(row.get("name")), *(figure_of(row, key) for key in ("bytes", "linear_bytes", "ideal_bytes"))]
        for run in runs
        for stage, row in run.rows()
        if stage == "quantize" and figure_of(row, "linear_bytes") is not None
    ]
    if not rows:
        return []
    says = (
        "The bytes of the whole checkpoint, of its quantized linears, and what bits times parameters would be: the "
        "difference is scales, zero points and what is kept beside the codes."
    )
    return [Figure("Size of the artifact", says, ["run", "name", "bytes", "linear bytes", "ideal bytes"], rows)]
