"""The arithmetic of the affine quantizer (QLLM, arXiv 2310.08041, eq. 2), in plain torch.

    code = clamp(round(x / alpha) + beta, 0, 2^b - 1)      alpha = (max x - min x) / (2^b - 1)
    x^   = alpha * (code - beta)                           beta  = -round(min x / alpha)

The zero point beta of a weight may be real-valued, -min x / alpha: then code = clamp(round(x / alpha + beta), ...).

One operation of float32 at a time, rounding half to even: every backend makes the same codes. A clipped range is
narrower: min x and max x are multiplied by a ratio each, in float32, before anything else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake


class TokenQuantizer(NamedTuple):
    """How tokens are quantized: to `bits`, each of `groups` equal slices with its own scale.

    low, high: what is left of the two ends of a token's range, float32 above 0 and at most 1.
    """

    bits: int
    groups: int = 1
    low: float = 1.0
    high: float = 1.0

    def check(self, x: Tensor) -> None:
        """Raise ValueError, naming the value, where these do not fit tokens x."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"num_bits={self.bits} is not in 2..8")
        if x.dim() != 2 or self.groups < 1 or x.shape[1] % self.groups or not x.shape[1]:
            raise ValueError(
                f"{self.groups} groups do not divide the features of x {list(x.shape)}, [tokens, features]"
            )
        self.check_ratios()

    def check_ratios(self) -> None:
        if not (0 < self.low <= 1 and 0 < self.high <= 1):
            raise ValueError(f"ratios {self.low} and {self.high} of a range are not above 0 and at most 1")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (codes uint8 [tokens, features], scale, zero_point float32 [tokens, groups]) of x, in plain torch."""
        grouped = x.float().unflatten(1, (self.groups, -1))
        low, high = grouped.amin(-1) * self.low, grouped.amax(-1) * self.high
        scale, zero_point = qparams_from_range(low, high, self.bits)
        return quantize(x, scale, zero_point, self.bits), scale, zero_point


def qparams_from_range(low: Tensor, high: Tensor, num_bits: int, real_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), float32, for values from `low` to `high`, float32 of one shape.

    real_zero: the zero point is not rounded, so both ends of the range are codes, and 0 need not be. A constant row
    gets scale 1 and the real-valued zero point -low in any case, so it comes back exactly, not as NaN. NaN or Inf in a
    row makes its scale NaN, and so all of the row.
    """
    levels = low.new_full((), 2**num_bits - 1)  # by a number, CUDA would multiply with its rounded reciprocal
    scale, constant = usable_step(high / levels - low / levels)  # divided first: the difference may overflow
    zero_point = low / scale
    return scale, torch.where(constant, -low, -(zero_point if real_zero else torch.round(zero_point)))


def usable_step(step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale for a step between codes, and where the step is zero, or too small to divide by: 1 there. NaN
    for a step that is not finite."""
    constant = step < torch.finfo(torch.float32).tiny
    return torch.where(constant, 1.0, torch.where(step.isfinite(), step, torch.nan)), constant


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Quantize x float [..., features] with scale, zero_point float32 [..., groups] -> codes uint8 [..., features]."""
    grouped = x.float().unflatten(-1, (scale.shape[-1], -1))
    codes = unclamped_codes(grouped, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    return codes.nan_to_num_(0.0).clamp_(0, 2**num_bits - 1).to(torch.uint8).flatten(-2)


def unclamped_codes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return x / scale + zero_point, rounded to whole numbers, in x's dtype.

    The whole part of a zero point is added after the rounding: round(x / scale) + zero_point for whole ones, to the
    bit. A constant row, whose scale is 1 and whose zero point is -x, gets code 0: both sums are exact there.
    """
    whole = torch.round(zero_point)
    return torch.div(x, scale).add_(zero_point - whole).round_().add_(whole)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (codes - zero_point) * scale (QLLM, arXiv 2310.08041, eq. 2, inverted).

    codes: uint8 [..., features]; scale, zero_point: float32 [..., groups], one pair per features / groups neighbours.
    Returns float32 [..., features].
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def quantize_tokens_reference(
    x: Tensor, num_bits: int, groups: int, low_ratio: float = 1.0, high_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every token, and each of `groups` equal slices of it, by its own smallest and largest value.

    x: float [tokens, features], `groups` divides features; num_bits: 2 to 8; low_ratio, high_ratio: TokenQuantizer's.
    Returns (codes uint8 [tokens, features], scale, zero_point float32 [tokens, groups]). Raises ValueError where
    they do not fit together.
    """
    quantizer = TokenQuantizer(num_bits, groups, low_ratio, high_ratio)
    quantizer.check(x)
    return quantizer(x)


quantize_tokens = define(
    "quantize_tokens(Tensor x, int num_bits, int groups, float low_ratio=1.0, float high_ratio=1.0) "
    "-> (Tensor, Tensor, Tensor)",
    quantize_tokens_reference,
)


@fake(quantize_tokens)
def _(x, num_bits, groups, low_ratio=1.0, high_ratio=1.0):
    scale = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scale, torch.empty_like(scale)
