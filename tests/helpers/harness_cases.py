"""What ranks of a RankPool run for test_harness.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
