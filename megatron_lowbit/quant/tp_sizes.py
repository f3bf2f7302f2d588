"""Which tensor-parallel sizes a model can have, and how many shard groups serve them.

The input of a row-parallel linear is cut into weights.shard_groups equal slices, each with an activation scale of its
own, and a rank of N holds 1 / N of them: N has to divide their number. Models with 32 heads run on 2, 4 or 8 ranks and
8 slices serve them all. A model with 9 heads runs on 3, which 8 does not divide.

Finer slices cost a scale each and lose less to outliers, so the number is the one nearest to 8 that serves the sizes
and divides the model's widths. Slices need not hold whole heads: what they cut is the attention's output. 6 slices of
SmolLM2's 9 x 64 features are a head and a half each; only 3 would hold whole ones there and divide its MLP too.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm
from typing import Any

from torch import nn

MOST_RANKS = 8  # the GPUs of one machine
USUAL_GROUPS, MOST_GROUPS = 8, 16


def possible_tp_sizes(config: Any) -> list[int]:
    """Return the sizes from 2 to 8 at which each rank has whole heads and an equal share of the MLP.

    config: a Hugging Face text config. Several ranks may use one KV head, as Megatron-Core's do; what the config does
    not have binds nobody.
    """
    heads, kv_heads, inner = (
        value if isinstance(value := getattr(config, name, None), int) and value > 0 else 0
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    return [
        size
        for size in range(2, MOST_RANKS + 1)
        if heads % size == 0 and inner % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def default_tp_sizes(config: Any) -> tuple[int, ...]:
    """Return comm.tp_sizes where it is not given: the possible sizes that the default number of shard groups serves."""
    sizes = possible_tp_sizes(config)
    served = _common_multiple(sizes)
    return tuple(size for size in sizes if served % size == 0)


def default_shard_groups(config: Any, widths: Iterable[int]) -> int:
    """Return weights.shard_groups where it is not given.

    config: a Hugging Face text config; widths: inputs and outputs of the model's tensor-parallel linears.
    """
    served = _common_multiple(possible_tp_sizes(config))
    return USUAL_GROUPS if USUAL_GROUPS % served == 0 else groups_for(served, widths)


def widths_of(linears: Iterable[nn.Linear]) -> set[int]:
    """Return the numbers of inputs and outputs of linears."""
    return {width for linear in linears for width in (linear.in_features, linear.out_features)}


def groups_for(tp_size: int, widths: Iterable[int]) -> int:
    """Return the multiple of tp_size nearest to 8 that divides all widths; tp_size itself where none does."""
    widths = set(widths)
    multiples = range(tp_size, max(MOST_GROUPS, tp_size) + 1, tp_size)
    fitting = [groups for groups in multiples if not any(width % groups for width in widths)]
    return min(fitting, key=lambda groups: abs(groups - USUAL_GROUPS), default=tp_size)


def _common_multiple(tp_sizes: Iterable[int]) -> int:
    """Return a number that the sizes divide, powers of two first, since machines have as many GPUs; a size that would
    make it greater than 16 is left out."""
    served = 1
    for size in sorted(tp_sizes, key=lambda size: (size & (size - 1) != 0, size)):
        if lcm(served, size) <= MOST_GROUPS:
            served = lcm(served, size)
    return served
