"""The quantizer of a range that is trained: weights.clipping=learned (as OmniQuant, arXiv 2308.13137, clips weights).

    low = sigmoid(a) min X      high = sigmoid(b) max X      a, b start at 4: ratios of 0.98

The forward pass has the bits of the affine quantizer of that range (affine.py). The backward pass goes straight through
both roundings, of codes and of the zero point; with s, z the scale and zero point and c the code of x:

    code inside 0 .. 2^b - 1      dx^/dx = 1      dx^/ds = (c - z) - x / s      dx^/dz = 0
    clamped                       dx^/dx = 0      dx^/ds = c - z                dx^/dz = -s
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lowbit.kernels.quantizer import unclamped_codes
from megatron_lowbit.quant.affine import qparams_from_range, straight_through

FIRST_LOGIT = 4.0


def qparams_of_trained(
    low: Tensor, high: Tensor, num_bits: int, symmetric: bool = False, real_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return qparams_from_range, differentiable in low and high (float32)."""
    with torch.no_grad():
        scale, zero_point = qparams_from_range(low, high, num_bits, symmetric, real_zero)
    if symmetric:
        largest = torch.maximum(low.abs(), high.abs())
        return straight_through(largest / (2 ** (num_bits - 1) - 1), scale), zero_point
    scale = straight_through((high - low) / (2**num_bits - 1), scale)
    return scale, straight_through(-low / scale, zero_point)


def fake_quantize_trained(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Quantize and dequantize x [..., features] with qparams [..., groups], which take gradients too."""
    return _FakeQuantize.apply(x, scale, zero_point, num_bits)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int):  # type: ignore[override]
        ctx.save_for_backward(x, scale, zero_point)
        ctx.num_bits = num_bits
        _, codes = _codes(x, scale, zero_point, num_bits)
        return codes.sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, scale, zero_point = ctx.saved_tensors
        unclamped, codes = _codes(x, scale, zero_point, ctx.num_bits)
        inside = (unclamped >= 0) & (unclamped <= 2**ctx.num_bits - 1)
        of_group = grad.float().unflatten(-1, (scale.shape[-1], -1))
        steps = x.float().unflatten(-1, (scale.shape[-1], -1)) / scale.unsqueeze(-1)
        by_scale = codes - zero_point.unsqueeze(-1) - torch.where(inside, steps, 0.0)
        scale_grad = (of_group * by_scale).sum(-1)
        zero_grad = torch.where(inside, 0.0, of_group).sum(-1) * -scale
        x_grad = torch.where(inside, of_group, 0.0).flatten(-2).to(x.dtype)
        return x_grad, scale_grad, zero_grad, None


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes, before and after the clamp: float32 [..., groups, features / groups]."""
    grouped = x.detach().float().unflatten(-1, (scale.shape[-1], -1))
    unclamped = unclamped_codes(grouped, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    return unclamped, unclamped.clamp(0, 2**num_bits - 1)
