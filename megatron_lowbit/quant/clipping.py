"""Ranges of weights that are narrower than min-max, where the squared error is smaller: weights.clipping=mse.

    error(c) = sum_j d_j (W_ij - Q_c(W)_ij)^2        Q_c: the quantizer of the range c min W_i .. c max W_i

c shrinks both ends of the range of an output channel (or of a weight group inside it): the largest weights are clipped,
all others get a finer grid. d is the diagonal of the input's Gram matrix, so that the error is that of the output where
the input's channels are uncorrelated; without calibration text d is 1. What is deployed is a scale and a zero point, as
without clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lowbit.quant.affine import fake_quantize_with, qparams_from_range, value_range

RATIOS = tuple(1 - step / 20 for step in range(11))  # 1, 0.95, ... 0.5


def clipped_qparams(
    weight: Tensor, num_bits: int, symmetric: bool = False, group_size: int | None = None, real_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), float32 [out, groups], of the least squared error of a weight [out, in]."""
    low, high = value_range(weight, group_size)
    ratio = best_ratios([weight], low, high, num_bits, symmetric, real_zero=real_zero)
    return qparams_from_range(low * ratio, high * ratio, num_bits, symmetric, real_zero)


@torch.no_grad()
def best_ratios(
    shards: Sequence[Tensor],
    low: Tensor,
    high: Tensor,
    num_bits: int,
    symmetric: bool,
    importance: Sequence[Tensor] | None = None,
    total: Callable[[Sequence[Tensor]], Tensor] = lambda errors: torch.stack(list(errors)).sum(0),
    real_zero: bool = False,
) -> Tensor:
    """Return the ratio of least error for every range, float32 [out, groups]; the largest of equals, 1 for NaN.

    shards: [out, in / shards], which share the ranges low, high [out, groups]. importance: d of each shard's inputs,
    float64 [in / shards]. total: adds up the shards' errors, float64 [ratios, out, groups], of all ranks.
    """
    weighted = [None] * len(shards) if importance is None else importance
    pairs = [qparams_from_range(low * ratio, high * ratio, num_bits, symmetric, real_zero) for ratio in RATIOS]
    errors = [
        torch.stack([_squared_error(shard, pair, num_bits, d) for pair in pairs])
        for shard, d in zip(shards, weighted, strict=True)
    ]
    least = total(errors).nan_to_num(nan=torch.inf).argmin(0)
    return torch.tensor(RATIOS, dtype=torch.float32, device=low.device)[least]


def _squared_error(weight: Tensor, pair: tuple[Tensor, Tensor], num_bits: int, importance: Tensor | None) -> Tensor:
    """Return the error of every range of a shard: float64 [out, groups]."""
    error = (fake_quantize_with(weight, *pair, num_bits).double() - weight.double()).square_()
    if importance is not None:
        error *= importance
    return error.unflatten(-1, (pair[0].shape[-1], -1)).sum(-1)
