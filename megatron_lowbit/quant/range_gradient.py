"""The gradient of fake quantization through its scale, for what moves the range itself: a rotation of what is rounded.

    x^ = s (round(x / s + z) - z)           s = (high - low) / levels: the min-max range of x
    dx^ = dx + (x^ - x) / s ds              with round(v) differentiated as v; the zero point z cancels
    ds = (dx at high - dx at low) / levels

Straight through alone, dx^ = dx: rounding errors would be constants that no rotation makes smaller. Off by default: the
correction moves values by less than a step and trains straight through, as QLLM does. Symmetric ranges stay so too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_through_range = False


@contextmanager
def gradients_through_ranges() -> Iterator[None]:
    """Have every fake quantization inside the context pass gradients through its scale too."""
    global _through_range
    before, _through_range = _through_range, True
    try:
        yield
    finally:
        _through_range = before


def through_ranges() -> bool:
    """Tell whether gradients pass through scales here."""
    return _through_range


def with_scale(x: Tensor, quantized: Tensor, scale: Tensor) -> Tensor:
    """Return `quantized`, with gradients to x as they are and to the scale that it was quantized with.

    x, quantized: [..., features]; scale: float32 [..., groups].
    """
    return _WithScale.apply(x, quantized, scale)


def scale_of(tensors: Sequence[Tensor], scale: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    """Return the min-max `scale` of a range, with gradients to the values at its two ends.

    tensors: [..., features] each, which share the scale; scale, low, high: [..., groups], of these tensors and of those
    that other ranks hold.
    """
    return _ScaleOf.apply(scale, low, high, 2**num_bits - 1, *tensors)


class _WithScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, quantized, scale)
        return quantized

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, quantized, scale = ctx.saved_tensors
        error = (grad.float() * (quantized.float() - x.float())).unflatten(-1, (scale.shape[-1], -1))
        return grad, None, error.sum(-1) / scale


class _ScaleOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: Tensor, low: Tensor, high: Tensor, levels: int, *tensors: Tensor):  # type: ignore[override]
        ctx.save_for_backward(low, high, *tensors)
        ctx.levels = levels
        return scale.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # type: ignore[override]
        low, high, *tensors = ctx.saved_tensors
        groups, step = low.shape[-1], (grad / ctx.levels).unsqueeze(-1)

        def at_ends(x: Tensor) -> Tensor:
            values = x.float().unflatten(-1, (groups, -1))
            ends = (values == high.unsqueeze(-1)).float() - (values == low.unsqueeze(-1)).float()
            return (ends * step).flatten(-2).to(x.dtype)

        return (None, None, None, None, *map(at_ends, tensors))
