"""The arithmetic of the affine quantizer (QLLM, arXiv 2310.08041, eq. 2), in plain torch.

    code = clamp(round(x / alpha) + beta, 0, 2^b - 1)      alpha = (max x - min x) / (2^b - 1)
    x^   = alpha * (code - beta)                           beta  = -round(min x / alpha)

One operation of float32 at a time, rounding half to even: every backend makes the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake


def qparams_from_range(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), float32, for values from `low` to `high`, float32 of one shape.

    A constant row gets scale 1 and the real-valued zero point -low, so it comes back exactly, not as NaN. NaN or Inf
    in a row makes its scale NaN, and so all of the row.
    """
    levels = low.new_full((), 2**num_bits - 1)  # by a number, CUDA would multiply with its rounded reciprocal
    scale, constant = usable_step(high / levels - low / levels)  # divided first: the difference may overflow
    return scale, torch.where(constant, -low, -torch.round(low / scale))


def usable_step(step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale for a step between codes, and where the step is zero, or too small to divide by: 1 there. NaN
    for a step that is not finite."""
    constant = step < torch.finfo(torch.float32).tiny
    return torch.where(constant, 1.0, torch.where(step.isfinite(), step, torch.nan)), constant


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Quantize x float [..., features] with scale, zero_point float32 [..., groups] -> codes uint8 [..., features]."""
    grouped = x.float().unflatten(-1, (scale.shape[-1], -1))
    codes = torch.round(grouped / scale.unsqueeze(-1)) + zero_point.unsqueeze(-1)
    return codes.nan_to_num_(0.0).clamp_(0, 2**num_bits - 1).to(torch.uint8).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (codes - zero_point) * scale (QLLM, arXiv 2310.08041, eq. 2, inverted).

    codes: uint8 [..., features]; scale, zero_point: float32 [..., groups], one pair per features / groups neighbours.
    Returns float32 [..., features].
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def quantize_tokens_reference(x: Tensor, num_bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every token, and each of `groups` equal slices of it, by its own smallest and largest value.

    x: float [tokens, features], `groups` divides features; num_bits: 2 to 8.
    Returns (codes uint8 [tokens, features], scale, zero_point float32 [tokens, groups]). Raises ValueError where
    they do not fit together.
    """
    check_tokens(x, num_bits, groups)
    grouped = x.float().unflatten(1, (groups, -1))
    scale, zero_point = qparams_from_range(grouped.amin(-1), grouped.amax(-1), num_bits)
    return quantize(x, scale, zero_point, num_bits), scale, zero_point


def check_tokens(x: Tensor, num_bits: int, groups: int) -> None:
    """Raise ValueError, naming the value, where the arguments of quantize_tokens do not fit together."""
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits={num_bits} is not in 2..8")
    if x.dim() != 2 or groups < 1 or x.shape[1] % groups or not x.shape[1]:
        raise ValueError(f"{groups} groups do not divide the features of x {list(x.shape)}, [tokens, features]")


quantize_tokens = define(
    "quantize_tokens(Tensor x, int num_bits, int groups) -> (Tensor, Tensor, Tensor)", quantize_tokens_reference
)


@fake(quantize_tokens)
def _(x, num_bits, groups):
    scale = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scale, torch.empty_like(scale)
