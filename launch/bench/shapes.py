"""The linears of known models, whole and shared out among ranks: what `benchmark linear` measures.

A column-parallel linear (q, k, v, gate, up) is cut along its outputs, a row-parallel one (o, down) along its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

LinearName = Literal["q", "k", "v", "o", "gate", "up", "down"]
ModelName = Literal["llama2_7b", "llama2_13b", "llama2_70b", "gemma2_27b"]
LINEARS: tuple[LinearName, ...] = get_args(LinearName)


class Dimensions(NamedTuple):
    """Widths of a decoder block: of the residual stream, of all query heads, of all key (or value) heads, of the
    MLP."""

    hidden: int
    queries: int
    keys: int
    intermediate: int


MODELS: dict[ModelName, Dimensions] = {
    "llama2_7b": Dimensions(4096, 4096, 4096, 11008),
    "llama2_13b": Dimensions(5120, 5120, 5120, 13824),
    "llama2_70b": Dimensions(8192, 8192, 1024, 28672),
    "gemma2_27b": Dimensions(4608, 4096, 2048, 36864),
}


def linear_shapes(model: ModelName, tp: int = 1) -> dict[LinearName, tuple[int, int]]:
    """Return {linear: (outputs, inputs)} of one of `tp` ranks. Raises ValueError where tp does not divide a width."""
    hidden, queries, keys, intermediate = MODELS[model]
    for width in (queries, keys, intermediate):
        if width % tp:
            raise ValueError(f"{model} has a width of {width}, which does not divide among {tp} ranks")
    return {
        "q": (queries // tp, hidden),
        "k": (keys // tp, hidden),
        "v": (keys // tp, hidden),
        "o": (hidden, queries // tp),
        "gate": (intermediate // tp, hidden),
        "up": (intermediate // tp, hidden),
        "down": (hidden, intermediate // tp),
    }


def parse_shape(text: str) -> tuple[int, int]:
    """Parse `outputs x inputs`: 11008x4096 -> (11008, 4096)."""
    match = re.fullmatch(r"([1-9]\d{0,6}) *x *([1-9]\d{0,6})", text)
    if match is None:
        raise ValueError(f"{text!r} is no shape; write outputs x inputs, such as 11008x4096")
    outputs, inputs = int(match[1]), int(match[2])
    if outputs * inputs > 2**31:
        raise ValueError(f"{text!r} is more than the 2^31 values that a weight may have here")
    return outputs, inputs


def all_shapes(
    shapes: Iterable[str], models: Iterable[ModelName], linears: Iterable[LinearName], tp_sizes: Iterable[int]
) -> dict[tuple[int, int], list[str]]:
    """Return {(outputs, inputs): whose they are}, each shape once, in the order in which they were asked for."""
    found: dict[tuple[int, int], list[str]] = {parse_shape(text): [] for text in shapes}
    wanted, sizes = list(linears), list(tp_sizes)
    for model in models:
        for tp in sizes:
            for linear, shape in linear_shapes(model, tp).items():
                if linear in wanted:
                    found.setdefault(shape, []).append(f"{model} {linear} tp={tp}")
    return found
