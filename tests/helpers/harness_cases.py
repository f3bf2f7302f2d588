"""What ranks of a RankPool run for test_harness.py."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import preemption_cases
from megatron_groups import parallel

import megatron_lowbit as lowbit


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]


def scored(rank: int, size: int, pairs: list[tuple[str, str]], values: dict[str, Any]) -> list[tuple[float, bool]]:
    """Log-likelihoods of the model of --model megatron_lowbit, as every rank has them."""
    from megatron_lowbit.launch.harness.model import LowBitLM

    return LowBitLM(batch_size=4, **values).loglikelihood(requests("loglikelihood", *pairs))


def evaluated(rank: int, size: int, folder: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    return lowbit.evaluate("embedded", "stdlib:validation", None, folder, **values).rows


def shared(
    rank: int, size: int, artifact: Path, folder: Path, values: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of an evaluation, and the windows that this rank ran in each pass over the text."""
    from megatron_lowbit.launch import perplexity

    real, passes = perplexity.measure_windows, []

    def counted(model: Any, batches: Any, *more: Any) -> Any:
        sums = real(model, batches, *more)
        passes.append(len(sums.nll))
        return sums

    groups = parallel(1) if values.get("engine") == "megatron" else nullcontext()
    with groups, mock.patch.object(perplexity, "measure_windows", counted):
        rows = lowbit.evaluate("embedded", "stdlib:validation", artifact, folder, **values).rows
    return rows, passes


def command(rank: int, size: int, port: int, argv: list[str], stop_in: str | None = None) -> tuple[int, str, list[str]]:
    """(exit code, what was printed, tasks begun) of a command on these ranks; rank 1 gets a signal within the task
    `stop_in`."""
    from lm_eval import evaluator

    real, begun = evaluator.evaluate, []

    def evaluate(lm: Any, loaded: Any, *more: Any, **options: Any) -> Any:
        begun.extend(loaded["tasks"])
        if rank == 1 and stop_in in loaded["tasks"]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(lm, loaded, *more, **options)

    with mock.patch.object(evaluator, "evaluate", evaluate):
        code, printed = preemption_cases.command(rank, size, port, argv, {}, "")
    return code, printed, begun
