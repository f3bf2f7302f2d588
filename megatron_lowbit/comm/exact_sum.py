"""Partial sums as integers whose sum over the ranks cannot overflow (ours): any stock all-reduce adds them exactly.

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

from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.kernels import exact_decode, exact_encode
from megatron_lowbit.quant.affine import Float32QParams


class ExactSum(Float32QParams):
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
        """float [tokens, E] -> int8 [tokens, E + 1], or int32 [tokens, ceil((E + 1) / 2)] of 16-bit pairs."""
        if self.step.device != x.device:  # plans are loaded on the CPU
            self.to(x.device)
        codes, tally = exact_encode(x, self.center[sender], self.step, self.largest, self.carrier_bits)
        self.tally[sender].add_(tally)
        return codes

    def decode(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' codes -> [tokens, E] in `dtype`."""
        return exact_decode(total, self.centers, self.step, self.carrier_bits, dtype)

    def add(self, codes: Sequence[Tensor]) -> Tensor:
        """What an all-reduce makes of the codes of all ranks."""
        return torch.stack(list(codes)).sum(0, dtype=codes[0].dtype)
