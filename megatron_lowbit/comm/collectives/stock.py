"""A stock all-reduce of the values: bf16, 2 (N - 1) / N 16 bits per value on a ring; native, in the model's dtype.

What the low-bit collectives are compared with, and what a site falls back to that has drifted (drift.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.collectives.base import Collective, Drifted, Ranks, Traffic, register
from megatron_lowbit.runtime.distributed import reduce_scatter


@register("bf16")
class Bf16(Collective):
    """Values of 16 bits travel as they are, others as bf16."""

    low_bit: ClassVar[bool] = False

    def wire_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if x.element_size() == 2 else torch.bfloat16

    def all_reduce(self, x: Tensor, ranks: Ranks, reuse: bool, drifted: Drifted | None) -> Tensor:
        dtype = self.wire_dtype(x)
        own = reuse and x.dtype == dtype and x.is_contiguous()  # the all-reduce works in place
        message = x if own else x.to(dtype, copy=True).contiguous()
        ranks.traffic.count(message, message.numel())
        with ranks.agreement:
            dist.all_reduce(message, group=ranks.agreement.group)
        return message if message.dtype == x.dtype else message.to(x.dtype)

    def reduce_scatter(self, x: Tensor, ranks: Ranks, drifted: Drifted | None) -> Tensor:
        return scatter_sum(x.to(self.wire_dtype(x)).contiguous(), x.numel(), ranks).to(x.dtype)

    def simulate(self, partials: Sequence[Tensor], traffic: Traffic, drifted: Drifted | None) -> Tensor:
        x, dtype = partials[0], self.wire_dtype(partials[0])
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.stack([p.to(dtype) for p in partials]).to(exact).sum(0).to(dtype)
        traffic.count(total, x.numel())
        return total.to(x.dtype)

    def link_bytes(self, tokens: int, features: int, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * 2 * tokens * features


@register("native")
class Native(Bf16):
    """Values travel as they are."""

    def wire_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype


def scatter_sum(message: Tensor, values: int, ranks: Ranks) -> Tensor:
    """Return rank r's slice r [length / N, ...] of the sum of all ranks' messages [length, ...], which stand for
    `values`."""
    ranks.traffic.count(message, values)
    total = message.new_empty(len(message) // ranks.size, *message.shape[1:])
    with ranks.agreement:
        reduce_scatter(total, message, ranks.agreement.group)
    return total
