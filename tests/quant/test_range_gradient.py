"""Gradients of fake quantization through its scale, against autograd through the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import Scheme, choose_qparams, fake_quantize
from megatron_lowbit.quant.range_gradient import gradients_through_ranges

BITS = 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: Tensor, scale_shape: int, weight: Tensor) -> Tensor:
    """The gradient of sum(weight * x^), rounding differentiated as the identity; x: [rows, features] in groups."""
    wide = x.detach().double().requires_grad_()
    grouped = wide.unflatten(-1, (scale_shape, -1))
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / (2**BITS - 1)
    size = None if scale_shape == 1 else x.shape[-1] // scale_shape
    zero = choose_qparams(x.detach(), BITS, False, size)[1].double().unsqueeze(-1)
    codes = grouped / step + zero
    codes = codes + (codes.round().clamp(0, 2**BITS - 1) - codes).detach()
    rounded = (step * (codes - zero)).flatten(-2)
    (grad,) = torch.autograd.grad((weight.double() * rounded).sum(), [wide])
    return grad.float()


@pytest.mark.parametrize("group_size", [None, 8])
def test_activations(group_size):
    x, weight = normal(5, 32, seed=0).requires_grad_(), normal(5, 32, seed=1)
    groups = 1 if group_size is None else 32 // group_size
    with gradients_through_ranges():
        rounded = fake_quantize(x, BITS, group_size=group_size)
    (grad,) = torch.autograd.grad((weight * rounded).sum(), [x])
    torch.testing.assert_close(grad, expected(x, groups, weight), rtol=1e-4, atol=1e-4)
    assert (grad - weight).abs().max() > 0.1, "it is more than straight through"
    assert torch.equal(rounded, fake_quantize(x, BITS, group_size=group_size)), "values are as without"


def test_without_the_context_it_is_straight_through():
    x, weight = normal(5, 32, seed=0).requires_grad_(), normal(5, 32, seed=1)
    (grad,) = torch.autograd.grad((weight * fake_quantize(x, BITS)).sum(), [x])
    assert torch.equal(grad, weight)


@pytest.mark.parametrize(("kind", "group_size"), [("column", None), ("row", None), ("row", 8)])
def test_weights(kind, group_size):
    """The rows of a row-parallel weight have one range over all shards."""
    whole, weight = normal(16, 32, seed=2), normal(16, 32, seed=3)
    dim = 0 if kind == "column" else 1
    pieces = [piece.clone().requires_grad_() for piece in whole.chunk(4, dim)]
    linear = ShardedLinear("name", kind, pieces, None, None)
    linear.quantize(Scheme(BITS, 16), WeightsConfig(scheme="W4A16", group_size=group_size))
    with gradients_through_ranges():
        rounded = torch.cat(linear.effective_weights(), dim)
    grads = torch.autograd.grad((weight * rounded).sum(), pieces)
    wanted = expected(whole, 1 if group_size is None else 4, weight)
    torch.testing.assert_close(torch.cat(grads, dim), wanted, rtol=1e-4, atol=1e-4)
