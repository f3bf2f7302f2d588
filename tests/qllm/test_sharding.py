"""Shard groups: what is summed over shards has the same bits on 1, 2 and 4 real ranks, gradients included."""

from __future__ import annotations

import itertools

import pytest
import sharding_cases
import torch
from torch import Tensor

from megatron_lowbit.qllm.shard_groups import gather_shards, ordered_sum, replicate

SHARDS = 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Values over 12 orders of magnitude: sums in float32 depend on their order."""
    return normal(*shape, seed=seed) * torch.exp(8 * normal(*shape, seed=seed + 100))


def shards_of(*shape: int, seed: int = 0) -> list[Tensor]:
    return [wide(*shape, seed=seed + number) for number in range(SHARDS)]


def one_after_the_other(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total = total + part
    return total


@pytest.fixture(params=(1, 2, 4))
def run(request):
    """run(case, ...) on that many ranks: a list of their results."""
    if request.param == 1:
        return lambda case, *args: [case(0, 1, *args)]
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks").run


# Values and gradients on one process


def test_ordered_sum_by_hand():
    """((1e8 + 1) - 1e8) + 1 is 1 in float32, whose last place at 1e8 is 8; the exact sum is 2."""
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8, 1.0)]
    assert ordered_sum(parts, None).item() == 1.0
    assert ordered_sum([parts[i] for i in (0, 2, 1, 3)], None).item() == 2.0


def test_ordered_sum_keeps_its_parts():
    """The running total must not be one of the parts, not even where there is only one."""
    parts = shards_of(3, 5)
    before = [part.clone() for part in parts]
    ordered_sum(parts, None).zero_()
    ordered_sum(parts[:1], None).zero_()
    assert all(map(torch.equal, parts, before))


def test_order_matters_for_these_values():
    """The comparisons below would see another order: pairwise per rank and then over ranks gives other bits."""
    parts = shards_of(3, 50)
    by_rank = [one_after_the_other(parts[:4]), one_after_the_other(parts[4:])]
    assert not torch.equal(one_after_the_other(by_rank), one_after_the_other(parts))


def test_replicate_against_autograd():
    """Each copy has the values of x; the gradient is that of using x itself for every shard."""
    x = normal(3, 5).double().requires_grad_()
    factors = [normal(3, 5, seed=seed).double() for seed in range(1, SHARDS + 1)]
    copies = replicate(x, SHARDS, None)
    assert len(copies) == SHARDS and all(torch.equal(copy, x) for copy in copies)
    loss = sum((factor * copy**2).sum() for factor, copy in zip(factors, copies, strict=True))
    reference = sum((factor * x**2).sum() for factor in factors)
    (grad,) = torch.autograd.grad(loss, [x])
    (expected,) = torch.autograd.grad(reference, [x])
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda v: replicate(v, 3, None), [normal(4).double().requires_grad_()])


def test_replicate_where_a_copy_is_not_used():
    """Its gradient is zero, not missing."""
    x = normal(4).requires_grad_()
    copies = replicate(x, 3, None)
    (grad,) = torch.autograd.grad((2 * copies[1]).sum(), [x])
    assert grad.tolist() == [2.0] * 4


def test_gather_shards_in_one_process():
    """All shards are here: the parts themselves, with their gradients."""
    parts = [normal(2, 3, seed=seed).double().requires_grad_() for seed in range(3)]
    everything = gather_shards(parts, None)
    assert all(a is b for a, b in zip(everything, parts, strict=True))
    grads = torch.autograd.grad(sum((number + 1) * part.sum() for number, part in enumerate(everything)), parts)
    assert [grad.unique().item() for grad in grads] == [1.0, 2.0, 3.0]


# Real ranks


@pytest.mark.parametrize("shape", [(3, 5), (1,), (2, 3, 7), (0, 4)], ids=str)
def test_ordered_sum_of_ranks(run, shape):
    """Every rank ends with the sum in shard order, to the last bit, and its own shards are as they were."""
    parts = shards_of(*shape)
    for result in run(sharding_cases.sums, parts):
        assert torch.equal(result["sum"], one_after_the_other(parts)) and result["kept"]


def test_ordered_sum_of_views(run):
    """Transposed and bf16 shards: gathered by value."""
    parts = [part.T for part in shards_of(4, 6)]
    for result in run(sharding_cases.sums, parts):
        assert torch.equal(result["sum"], one_after_the_other(parts))
    halves = [part.bfloat16() for part in parts]
    for result in run(sharding_cases.sums, halves):
        assert result["sum"].dtype == torch.bfloat16 and torch.equal(result["sum"], one_after_the_other(halves))


def test_replicate_on_ranks(run):
    """Each rank has its copies; the gradient is the ordered sum over all ranks' shards, on each of them."""
    x, upstream = normal(3, 5), shards_of(3, 5, seed=20)
    results = run(sharding_cases.replicated, x, upstream)
    for result in results:
        assert len(result["copies"]) == SHARDS // len(results)
        assert all(torch.equal(copy, x) for copy in result["copies"])
        assert torch.equal(result["grad"], one_after_the_other(upstream))


def test_gather_shards_on_ranks(run):
    """Every rank sees all shards in order; each gets its own shards' gradient of what all of them compute."""
    shards = [normal(3, 4, seed=seed) for seed in range(SHARDS)]
    weights = [normal(3, 4, seed=50 + seed) for seed in range(SHARDS)]
    leaves = [shard.clone().requires_grad_() for shard in shards]
    loss = sum((weight * leaf**3).sum() for weight, leaf in zip(weights, leaves, strict=True))
    expected = torch.autograd.grad(loss, leaves)
    results = run(sharding_cases.gathered, shards, weights)
    for result in results:
        assert all(map(torch.equal, result["shards"], shards)) and len(result["shards"]) == SHARDS
        assert torch.equal(result["loss"], loss.detach())
    grads = list(itertools.chain.from_iterable(result["grads"] for result in results))
    assert all(map(torch.equal, grads, expected)) and len(grads) == SHARDS


def test_gather_shards_where_one_is_used(run):
    """The loss reads one shard: its owner gets the gradient, the others none, or zeros."""
    results = run(sharding_cases.gathered_in_part, [normal(3, seed=seed) for seed in range(SHARDS)], 5)
    grads = list(itertools.chain.from_iterable(results))
    assert len(grads) == SHARDS and grads[5] is not None and grads[5].tolist() == [2.0] * 3
    assert all(grad is None or not grad.any() for number, grad in enumerate(grads) if number != 5)


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("branch", (False, True))
def test_sharded_linear_on_ranks(run, kind, branch):
    """Forward, gradients and packed weight of a W4A4 linear with a trained correction: the bits of one process."""
    weight, x = normal(16, 48, seed=1), normal(2, 5, 48, seed=2)
    arguments = (kind, weight, x, normal(2, 5, 16, seed=3), SHARDS, branch)
    alone = sharding_cases.linear(0, 1, *arguments)
    results = run(sharding_cases.linear, *arguments)
    column = kind == "column"
    for result in results:
        assert torch.equal(result["shared"], alone["shared"]) and alone["shared"].abs().max() > 0.01
        assert all(map(torch.equal, result["packed"], alone["packed"]))
        assert (result["low_rank"] is not None) == branch
        if branch:
            assert all(map(torch.equal, result["low_rank"], alone["low_rank"]))
        # A column-parallel linear's input and a row-parallel one's output are whole on every rank.
        whole = "x_grad" if column else "y"
        assert torch.equal(result[whole], alone[whole])
    cut = "y" if column else "x_grad"
    assert torch.equal(torch.cat([result[cut] for result in results], -1), alone[cut])
    own = list(itertools.chain.from_iterable(result["own"] for result in results))
    assert len(own) == SHARDS and all(map(torch.equal, own, alone["own"]))
    assert all(grad.abs().max() > 0.01 for grad in own)


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("group_size", (None, 6))
def test_clipping_and_gptq_on_ranks(run, kind, group_size):
    """Ranges of least error, trained ratios with their gradients, and GPTQ's codes: the bits of one process."""
    weight, x = normal(16, 48, seed=1) ** 3, normal(2, 50, 48, seed=2)
    arguments = (kind, weight, x, normal(2, 50, 16, seed=3), SHARDS, group_size)
    alone = sharding_cases.rounded(0, 1, *arguments)
    results = run(sharding_cases.rounded, *arguments)
    names = list(alone["packed"])
    for before, after in itertools.pairwise(names):
        assert not all(map(torch.equal, alone["packed"][before], alone["packed"][after])), after
    # GPTQ changes codes alone.
    assert all(map(torch.equal, alone["packed"]["learned"][1:], alone["packed"]["gptq"][1:]))
    for result in results:
        for name in names:
            assert all(map(torch.equal, result["packed"][name], alone["packed"][name])), name
    shared = kind == "row" and group_size is None
    grads = results[0]["grads"] if shared else list(itertools.chain.from_iterable(r["grads"] for r in results))
    assert all(map(torch.equal, grads, alone["grads"])) and len(grads) == (1 if shared else SHARDS)
    assert all(grad.abs().max() > 0 for grad in grads)
