"""Zero-shot tasks by lm-eval (EleutherAI's lm-evaluation-harness), on any engine.

    model.py        an engine as a model of lm-eval          accuracy.py     runs tasks, and keeps what was found
    local_data.py   questions from files                     tasks/          tasks that read them

This module needs no lm-eval. Of a row with tasks,

    accuracy_kept_percent = 100 * mean accuracy / full precision's mean accuracy        what both papers report
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.agreement import digest
from megatron_lowbit.config import EvaluateConfig
from megatron_lowbit.io.files import sha256
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.tables import number, print_table
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.metrics import MetricLogger

TASKS = Path(__file__).parent / "tasks"  # lm-eval's --include_path

if TYPE_CHECKING:
    from megatron_lowbit.launch.harness.accuracy import TaskSuite


def suite_of(config: EvaluateConfig, logger: MetricLogger) -> TaskSuite | None:
    """Load the tasks of evaluation.tasks; None where there are none. Raises LowBitError as TaskSuite."""
    if not config.evaluation.tasks:
        return None
    from megatron_lowbit.launch.harness.accuracy import TaskSuite

    return TaskSuite(config, logger)


def identity(engine: Engine, config: EvaluateConfig) -> dict[str, Any]:
    """Return what the unpatched engine's logits depend on, so that kept results are of the same model."""
    keys = ("engine", "tp", "pp", "virtual_tp", "sequence_parallel", "dtype", "inject_outliers", "inject_at", "seed")
    settings = config.model_dump(mode="json", include=set(keys))
    return {"fingerprint": f"{digest([engine.fingerprint()]):x}", **settings}


def applied(config: EvaluateConfig, artifact: Artifact) -> dict[str, Any]:
    """Return what the logits of the low-bit model depend on besides: its weights, or how they are rounded, and its
    plans."""
    weights = None if config.artifact is None else Path(config.artifact) / "lowbit.json"  # with its tensors' checksums
    plans = [
        part
        for tp_size, plan in sorted(artifact.plans.items())
        for site, sent in sorted(plan.sites.items())
        for codec in (sent.first, sent.second)
        if codec is not None
        for part in (tp_size, site, *(getattr(codec, field.name) for field in fields(codec)))
    ]
    return {
        "lowbit.json": on_rank_zero(lambda: sha256(weights) if weights is not None and weights.exists() else None),
        "plans": f"{digest(plans):x}",
        **{key: getattr(config, key).model_dump(mode="json") for key in ("weights", "comm")},
    }


def with_accuracy(
    row: dict[str, Any],
    suite: TaskSuite | None,
    engine: Engine,
    model: Mapping[str, Any] | None,
    applied: Mapping[str, Any] | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Return the row with the tasks' accuracy of the engine as it is. label: what the row is called among those whose
    results are kept; None: its name."""
    if suite is None:
        return row
    return {**row, **suite.measure(engine, label or row["name"], {**(model or {}), **(applied or {})})}


def with_kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with accuracy_kept_percent, their mean accuracy as a share of the first row's, full precision."""
    full = rows[0].get("accuracy") if rows and rows[0]["name"] in ("full", "full precision") else None
    kept = [100 * (row["accuracy"] / full) if full and row.get("accuracy") is not None else None for row in rows]
    return [{**row, "accuracy_kept_percent": k} if "tasks" in row else row for row, k in zip(rows, kept, strict=True)]


def print_accuracy(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Print the rows' accuracy in percent: a line per task, then the mean; beside each its standard error."""
    scored = [row for row in rows if "tasks" in row]
    if not scored:
        return
    cells = []
    for row in scored:
        for task, found in row["tasks"].items():
            cells.append((row["name"], task, *_percent(found["accuracy"], found["stderr"]), f"{found['n']:,}", ""))
        kept = number(row.get("accuracy_kept_percent"), ".1f")
        cells.append((row["name"], "mean", *_percent(row["accuracy"], row["accuracy_stderr"]), "", kept))
    columns: Mapping[str, Any] = {"name": "left", "task": "left"} | dict.fromkeys(
        ("accuracy\n(%)", "s.e.", "n", "kept\n(%)"), "right"
    )
    note = "accuracy: acc_norm where the task has it, else acc. kept: share of full precision's mean."
    print_table(columns, cells, title, note)


def _percent(*values: float | None) -> list[str]:
    return [number(None if value is None else 100 * value, ".2f") for value in values]
