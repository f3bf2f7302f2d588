"""exact_sum (ours): partial sums as integers whose sum over the ranks cannot overflow, which any stock all-reduce adds
exactly.

    q_r  = clamp(round((x - center_r) / step), -Q, Q)        Q = floor((2^(carrier_bits - 1) - 1) / N)
    sum ~= step * sum_r q_r + sum_r center_r                 step = half_range / Q, shared by all ranks, per feature

Integer addition has no order, so the sum is the same bits for every order of the ranks, algorithm of the all-reduce,
and whatever else is in the batch. A last column counts the ranks whose token holds NaN or Inf: the sum is NaN then.

Backends add no 16-bit integers, so two of them travel as one of 32 bits, high * 2^16 + low: |sums| stay below 2^15, so
the pair of sums can be told apart again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.collectives.base import Collective, Drifted, Formats, Ranks, Traffic, as_rows, register
from megatron_lowbit.comm.collectives.stock import scatter_sum
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.kernels import exact_decode, exact_encode
from megatron_lowbit.quant.affine import Float32QParams


class ExactFormat(Float32QParams):
    """Encodes and decodes as a SitePlan says. Counts values, those of them that lay beyond the range, and tokens that
    hold NaN or Inf."""

    step: Tensor  # float32 [E]
    center: Tensor  # float32 [tp_size, E]
    centers: Tensor  # float32 [E], their sum
    tally: Tensor  # int64 [tp_size, 3], by who encoded
    can_saturate = True
    float32 = ("step", "center", "centers")

    def __init__(self, plan: SitePlan):
        super().__init__()
        self.senders, self.carrier_bits = plan.tp_size, plan.carrier_bits
        self.largest = (2 ** (plan.carrier_bits - 1) - 1) // self.senders
        step = plan.half_range / self.largest
        self.register_buffer("step", torch.where(step > 0, step, 1.0), persistent=False)
        self.register_buffer("center", plan.center, persistent=False)
        centers = plan.center[0].clone()
        for other in plan.center[1:]:  # in rank order, so that every rank has the same bits
            centers += other
        self.register_buffer("centers", centers, persistent=False)
        self.register_buffer("tally", torch.zeros(self.senders, 3, dtype=torch.int64), persistent=False)

    def encode(self, x: Tensor, sender: int) -> Tensor:
        """Encode float [tokens, E] -> int8 [tokens, E + 1], or int32 [tokens, ceil((E + 1) / 2)] of 16-bit pairs."""
        if self.step.device != x.device:  # plans are loaded on the CPU
            self.to(x.device)
        codes, tally = exact_encode(x, self.center[sender], self.step, self.largest, self.carrier_bits)
        self.tally[sender].add_(tally)
        return codes

    def decode(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode the sum of all ranks' codes -> [tokens, E] in `dtype`."""
        return exact_decode(total, self.centers, self.step, self.carrier_bits, dtype)

    def add(self, codes: Sequence[Tensor]) -> Tensor:
        """Add up the codes of all ranks, as an all-reduce does."""
        return torch.stack(list(codes)).sum(0, dtype=codes[0].dtype)


@register("exact_sum")
class ExactSum(Collective):
    def __init__(self, formats: Formats):
        super().__init__(formats)
        self.format = formats.get("exact", lambda: ExactFormat(formats.plan))

    def all_reduce(self, x: Tensor, ranks: Ranks, reuse: bool, drifted: Drifted | None) -> Tensor | None:
        codes = self.format.encode(as_rows(x), ranks.rank)
        if drifted is not None and drifted():
            return None
        ranks.traffic.count(codes, x.numel())
        with ranks.agreement:
            dist.all_reduce(codes, group=ranks.agreement.group)
        return self.format.decode(codes, x.dtype).view(x.shape)

    def reduce_scatter(self, x: Tensor, ranks: Ranks, drifted: Drifted | None) -> Tensor | None:
        codes = self.format.encode(as_rows(x), ranks.rank)
        if drifted is not None and drifted():
            return None
        total = scatter_sum(codes, x.numel(), ranks)
        return self.format.decode(total, x.dtype).view(len(x) // ranks.size, *x.shape[1:])

    def simulate(self, partials: Sequence[Tensor], traffic: Traffic, drifted: Drifted | None) -> Tensor | None:
        x = partials[0]
        codes = [self.format.encode(as_rows(own), rank) for rank, own in enumerate(partials)]
        if drifted is not None and drifted():
            return None
        traffic.count(codes[0], x.numel())
        return self.format.decode(self.format.add(codes), x.dtype).view(x.shape)

    def link_bytes(self, tokens: int, features: int, ranks: int) -> float:
        row = features + 1 if self.format.carrier_bits == 8 else 4 * -(-(features + 1) // 2)
        return 2 * (ranks - 1) / ranks * tokens * row
