"""Trained ranges of activations: gradients against autograd in float64, and the same bits for any number of ranks."""

from __future__ import annotations

import itertools

import pytest
import sharding_cases
import torch
from torch import Tensor

from megatron_lowbit.qllm.input_range import HeadRange, InputRange
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.input_clipping import WHOLE

HEADS, SHARDS = 8, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=(1, 2, 4))
def run(request):
    """run(case, ...) on that many ranks: a list of their results."""
    if request.param == 1:
        return lambda case, *args: [case(0, 1, *args)]
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks").run


def by_hand(x: Tensor, logits: Tensor, bits: int) -> Tensor:
    """One operation of autograd after another, straight through both roundings, in x's dtype."""

    def straight(value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach() - value.detach() + value

    low = x.detach().amin(-1, keepdim=True) * logits[0].sigmoid()
    high = x.detach().amax(-1, keepdim=True) * logits[1].sigmoid()
    scale = (high - low) / (2**bits - 1)
    zero = straight(-low / scale, torch.round(-low / scale))
    steps = x / scale
    return ((straight(steps, torch.round(steps)) + zero).clamp(0, 2**bits - 1) - zero) * scale


def test_a_site_is_plain_until_it_is_trained_and_after():
    x, site = normal(3, 4, 16), InputRange(4)
    assert site.clip == WHOLE and torch.equal(site(x), fake_quantize(x, 4))
    logits = site.train_from(x.device)
    with torch.no_grad():
        logits.copy_(torch.tensor([0.7, 1.3]))
    trained = site(x).detach()
    site.settle()
    assert site.logits is None and site.clip == tuple(logits.detach().sigmoid().tolist())
    assert torch.equal(site(x), trained), "what is deployed is not what was trained"
    assert not torch.equal(trained, fake_quantize(x, 4))
    assert torch.equal(InputRange(16)(x), x)


def test_gradients_of_heads_and_of_a_site():
    """Differ from float64's by float32's rounding: of terms of size 1, of which 2,560 are added up, 1e-6 each."""
    x, upstream = normal(2, HEADS, 10, 16), normal(2, HEADS, 10, 16, seed=1)
    exact = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(by_hand(x.double(), exact, 4), [exact], upstream.double())
    for site in (InputRange(4), HeadRange(4, None)):
        logits = site.train_from(x.device)
        with torch.no_grad():
            logits.copy_(exact)
        (found,) = torch.autograd.grad(site(x), [logits], upstream)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-3)
        assert wanted.abs().min() > 0.1


def test_ranges_on_ranks(run):
    """Heads and shards that are spread over ranks: outputs and gradients have the bits of one process."""
    heads, upstream = normal(1, HEADS, 12, 16), normal(1, HEADS, 12, 16, seed=1)
    inputs, weights = normal(5, 8 * SHARDS, seed=2), normal(5, 8 * SHARDS, seed=3)
    arguments = (heads, upstream, inputs, weights, SHARDS)
    alone = sharding_cases.ranges(0, 1, *arguments)
    results = run(sharding_cases.ranges, *arguments)
    for result in results:
        assert all(map(torch.equal, result["grads"], alone["grads"]))
    assert torch.equal(torch.cat([result["heads"] for result in results], 1), alone["heads"])
    shards = list(itertools.chain.from_iterable(result["shards"] for result in results))
    assert all(map(torch.equal, shards, alone["shards"])) and len(shards) == SHARDS
