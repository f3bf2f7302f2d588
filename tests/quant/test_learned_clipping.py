"""The quantizer of a trained range: the bits of the affine quantizer, and gradients of the same formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lowbit.quant.affine import fake_quantize_with, qparams_from_range, value_range
from megatron_lowbit.quant.learned_clipping import fake_quantize_trained, qparams_of_trained


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """rounded, with the gradient of x."""
    return rounded.detach() - x.detach() + x


def by_hand(x: Tensor, low: Tensor, high: Tensor, bits: int, zero_point: str) -> Tensor:
    """One operation of autograd after another; x [rows, groups, features of a group], low, high [rows, groups, 1]."""
    levels = 2**bits - 1
    if zero_point == "symmetric":
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
        zero = torch.full_like(low, 2 ** (bits - 1)).detach()
    else:
        scale = (high - low) / levels
        zero = -low / scale if zero_point == "real" else straight(-low / scale, -torch.round(low / scale))
    codes = x / scale + zero
    return (straight(codes, torch.round(codes)).clamp(0, levels) - zero) * scale


@pytest.mark.parametrize("zero_point", ("integer", "real", "symmetric"))
@pytest.mark.parametrize("groups", (1, 4))
def test_bits_and_gradients(groups, zero_point):
    """Gradients differ from those in float64 by float32's rounding of sums of 48 values: 1e-5 of their size."""
    x = normal(10, 48)
    low, high = value_range(x, 48 // groups)
    a, b = (torch.full_like(low, 1.5, requires_grad=True), torch.full_like(low, 0.5, requires_grad=True))
    ends = low * a.sigmoid(), high * b.sigmoid()
    weight, upstream = x.clone().requires_grad_(), normal(10, 48, seed=1)
    how = 4, zero_point == "symmetric", zero_point == "real"
    y = fake_quantize_trained(weight, *qparams_of_trained(*ends, *how), 4)
    wanted = fake_quantize_with(x, *(q.detach() for q in qparams_from_range(*ends, *how)), 4)
    assert torch.equal(y, wanted)
    found = torch.autograd.grad(y, [weight, a, b], upstream)

    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    low64, high64 = (t.double().unsqueeze(-1) for t in (low, high))
    ends64 = low64 * exact[1].unsqueeze(-1).sigmoid(), high64 * exact[2].unsqueeze(-1).sigmoid()
    y64 = by_hand(exact[0].unflatten(-1, (groups, -1)), *ends64, 4, zero_point).flatten(-2)
    expected = torch.autograd.grad(y64, exact, upstream.double())
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    clamped = found[0] == 0
    assert clamped.any() and not clamped.all()
