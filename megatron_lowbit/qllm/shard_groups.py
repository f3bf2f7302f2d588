"""Shard groups: the unit that tensor-parallel work is cut into, so that its results do not depend on how many ranks
do it.

The outputs of a column-parallel linear and the inputs of a row-parallel one are cut into G equal shards
(weights.shard_groups); a rank of N holds G / N neighbouring ones and computes each by itself, with the same shapes
at every N. What is summed over shards, partial sums and gradients of what all shards share, is gathered and added in
the order of the shards:

    sum_r sum_s y_rs   differs from   sum_s' y_s'   in floating point, ordered_sum does not

So quantization at TP = 1, 2, 4 and 8 ends with the same bits. Functions that take a group are differentiable and take
the lists of one rank; group None is a single process, which holds all shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.runtime.distributed import all_gather_stack


def ordered_sum(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of all ranks' parts, added in shard order: the same bits on every rank, at every size."""
    total: Tensor | None = None
    for part in _all_parts(parts, group):
        total = part.clone() if total is None else total.add_(part)
    assert total is not None, "a rank holds at least one shard"
    return total


def partial_sums(parts: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """Return the partial sums that `ranks` tensor-parallel ranks would have, of the outputs of all shards in order."""
    each = len(parts) // ranks
    return [ordered_sum(parts[rank * each : (rank + 1) * each], None) for rank in range(ranks)]


def replicate(x: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Return x for each of this rank's `count` shards; the gradient is the ordered sum over the shards of all ranks."""
    return _Replicate.apply(x, count, group)


def gather_shards(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Return the parts of all ranks' shards, in order, on every rank; each one's gradient goes back to its own rank."""
    if group is None:
        return tuple(parts)
    return _GatherShards.apply(group, *parts)


def _all_parts(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    if group is None:
        return parts
    return all_gather_stack(torch.stack(list(parts)), group).flatten(0, 1).unbind(0)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, group: dist.ProcessGroup | None):  # type: ignore[override]
        ctx.group = group
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return ordered_sum(grads, ctx.group), None, None


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, *parts: Tensor):  # type: ignore[override]
        ctx.first, ctx.count = dist.get_rank(group) * len(parts), len(parts)
        return tuple(_all_parts(parts, group))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return (None, *grads[ctx.first : ctx.first + ctx.count])
