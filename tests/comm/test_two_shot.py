"""two_shot and exact_sum on real ranks: against float64 sums, against virtual ranks bit for bit, and byte by byte."""

from __future__ import annotations

import hashlib
from itertools import permutations

import pytest
import rank_cases
import torch
from slow_cases import slow
from torch import Tensor

from megatron_lowbit.comm.build_plan import build_plan, synthetic_plan
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange, SitePlan
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, LowBitError

BF16 = 2.0**-8
FLOAT32 = 2.0**-20  # generous: a few float32 operations
SCHEMES = {
    "best": CommConfig(),
    "static": CommConfig(preset="paper", bf16_fraction=1 / 32),
    "per_token": CommConfig(preset="paper", scale="per_token", bf16_fraction=1 / 32),
    "int6 back": CommConfig(preset="paper", bits=6, second_bits=6, bf16_fraction=0.0),
}


def partial_sums(ranks: int, tokens: int, features: int = 66) -> Tensor:
    """float32 [ranks, tokens, features]; a feature has its own mean and width, whatever the number of tokens."""
    shape = torch.Generator().manual_seed(1000 * ranks + features)
    width = torch.rand(ranks, 1, features, generator=shape) * 5 + 0.1
    mean = torch.randn(ranks, 1, features, generator=shape) * width
    return mean + width * torch.randn(ranks, tokens, features, generator=torch.Generator().manual_seed(tokens))


def calibrated(ranks: int, config: CommConfig, features: int = 66) -> SitePlan:
    """On more tokens than the tests send, so that nothing they send is far outside."""
    return synthetic_plan(partial_sums(ranks, 300, features), config)


def same_on_all(ranks: list[dict]) -> Tensor:
    assert all(torch.equal(rank["y"], ranks[0]["y"]) for rank in ranks), "the ranks hold different bits"
    assert all(rank["input_kept"] for rank in ranks)
    return ranks[0]["y"]


# Stripes of ceil(tokens / N): equal, with a shorter last one, with empty ones, and with all but one empty.
@pytest.mark.parametrize("tokens", [33, 8, 5, 3, 1])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_shot(request, size, tokens, scheme):
    pool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks", 4: "four_ranks"}[size])
    partials, plan = partial_sums(size, tokens), calibrated(size, SCHEMES[scheme])
    ranks = pool.run(rank_cases.all_reduce, plan, partials, "plain", "two_shot")
    y = same_on_all(ranks)
    assert y.shape == (tokens, 66) and y.dtype == torch.float32
    virtual = VirtualReducer(plan, "two_shot")
    assert torch.equal(virtual.all_reduce(list(partials)), y), "the virtual ranks differ from the real ones"
    assert (virtual.traffic.bytes, virtual.traffic.values) == ranks[0]["traffic"][:2]
    exact = partials.double().sum(0)
    sqnr = 10 * torch.log10(exact.square().sum() / (y.double() - exact).square().sum()).item()
    # Of a bell whose range is six standard deviations, 4 bits keep 19 dB and 6 bits 31 dB. Here some values saturate,
    # and of one token they may be many: less than this is left only where something is wrong.
    assert sqnr > (22 if scheme == "int6 back" else 14)
    once = VirtualReducer(plan, "one_shot").all_reduce(list(partials))
    assert not torch.equal(once, y), "the sum was not rounded again"


@pytest.mark.parametrize("size", [2, 4])
def test_both_hops_round_by_half_a_step(size, request):
    """static: where nothing saturates, half a step of every rank and half a step of the sum, and no more."""
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    partials = partial_sums(size, 33)
    ranges = {n: FeatureRange(x.amin(1), x.amax(1)) for n, x in ((size, partials), (1, partials.sum(0)[None]))}
    # Decoded values may lie half a step of the first hop outside the range of the sum.
    reach = (ranges[size].max_vals - ranges[size].min_vals).sum(0, keepdim=True) / 30
    ranges[1] = FeatureRange(ranges[1].min_vals - reach, ranges[1].max_vals + reach)
    stats = CalibrationStats({n: {"site": r} for n, r in ranges.items()}, {})
    plan = build_plan(stats, size, CommConfig(preset="paper", bf16_fraction=0.0)).sites["site"]
    assert plan.second is not None
    y = same_on_all(pool.run(rank_cases.all_reduce, plan, partials, "plain", "two_shot"))
    steps = plan.first.scale.double().sum(0) + plan.second.scale[0].double()
    magnitude = partials.double().abs().sum(0)
    assert ((y.double() - partials.double().sum(0)).abs() <= steps / 2 + FLOAT32 * (magnitude + steps)).all()


@pytest.mark.parametrize(("mode", "pieces"), [("one_shot", 2), ("two_shot", 1)])
def test_a_large_message_travels_in_rounds(two_ranks, mode, pieces):
    """32001 x 66 values: of 16002 and 15999 tokens in one_shot. The result and the bytes are those of one message."""
    partials = partial_sums(2, 32001)
    plan = synthetic_plan(partials[:, :300], CommConfig())
    ranks = two_ranks.run(rank_cases.all_reduce, plan, partials, "plain", mode)
    hops = {"one_shot": 1, "two_shot": 2}[mode]
    assert [name for name, _, _ in ranks[0]["calls"]] == ["send"] * 2 * hops * pieces
    virtual = VirtualReducer(plan, mode)
    assert torch.equal(virtual.all_reduce(list(partials)), same_on_all(ranks))
    assert (virtual.traffic.bytes, virtual.traffic.values) == ranks[0]["traffic"][:2]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["one_shot", "two_shot"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_pieces_and_rounds(request, size, mode, tokens):
    """Up to eight pieces, ranks without a stripe of their own, and more rounds than are under way at a time."""
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    partials, plan = partial_sums(size, tokens), calibrated(size, SCHEMES["per_token"])
    ranks = pool.run(rank_cases.all_reduce_in_rounds, plan, partials, mode, 66)
    assert {name for rank in ranks for name, _, _ in rank["calls"]} == {"send"}
    assert torch.equal(VirtualReducer(plan, mode).all_reduce(list(partials)), same_on_all(ranks))
    assert all(rank["input_kept"] for rank in ranks)


def test_bytes_of_two_shot(four_ranks):
    """An all-to-all of the messages and an all-gather of the sums; E - k = 64 codes of 4 bits there, of 5 bits back."""
    partials, plan = partial_sums(4, 33), calibrated(4, SCHEMES["static"])
    for rank in four_ranks.run(rank_cases.all_reduce, plan, partials, "plain", "two_shot"):
        # Every rank's own message, and four copies of the stripe's.
        sent = [33 * (2 * 2 + 32), 4 * 9 * (2 * 2 + 40)]
        assert rank["calls"] == [("all_to_all_single", size, "uint8") for size in sent]
        assert rank["traffic"][:2] == (33 * 36 + 9 * 44, 33 * 66)


def test_values_keep_their_dtype(two_ranks):
    partials = partial_sums(2, 5).bfloat16()
    for mode in ("two_shot", "exact_sum"):
        plan = calibrated(2, SCHEMES["per_token"])
        y = same_on_all(two_ranks.run(rank_cases.all_reduce, plan, partials, "plain", mode))
        assert y.dtype == torch.bfloat16
        assert torch.equal(VirtualReducer(plan, mode).all_reduce(list(partials)), y)


@pytest.mark.parametrize("mode", ["two_shot", "exact_sum"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "config",
    [
        CommConfig(preset="paper"),
        CommConfig(preset="paper", scale="per_token"),
        CommConfig(preset="paper", bf16_fraction=0.0),
    ],
)
def test_nan_and_inf_reach_every_rank(two_ranks, mode, poison, config):
    partials, plan = partial_sums(2, 5), calibrated(2, config)
    partials[1, 3, 7] = poison
    y = same_on_all_with_nan(two_ranks.run(rank_cases.all_reduce, plan, partials, "plain", mode))
    assert y[3].isnan().any(), "a broken token travels as if nothing had happened"
    assert y[[0, 1, 2, 4]].isfinite().all()


def same_on_all_with_nan(ranks: list[dict]) -> Tensor:
    assert all(torch.equal(r["y"].view(torch.int32), ranks[0]["y"].view(torch.int32)) for r in ranks)
    return ranks[0]["y"]


# exact_sum


@pytest.mark.parametrize("carrier_bits", [8, 16])
@pytest.mark.parametrize("features", [66, 65])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_exact_sum(request, size, carrier_bits, features):
    pool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks", 4: "four_ranks"}[size])
    partials = partial_sums(size, 33, features)
    plan = synthetic_plan(partials, CommConfig(preset="paper", carrier_bits=carrier_bits))
    ranks = pool.run(rank_cases.all_reduce, plan, partials, "plain", "exact_sum")
    y = same_on_all(ranks)
    assert torch.equal(VirtualReducer(plan, "exact_sum").all_reduce(list(partials)), y)
    largest = (2 ** (carrier_bits - 1) - 1) // size
    step = plan.half_range.double() / largest
    magnitude = partials.double().abs().sum(0)
    assert ((y.double() - partials.double().sum(0)).abs() <= size * step / 2 + FLOAT32 * magnitude).all()
    ((name, sent, dtype),) = ranks[0]["calls"]
    assert (name, dtype) == ("all_reduce", "int8" if carrier_bits == 8 else "int32")
    assert sent == 33 * (features + 1 if carrier_bits == 8 else 4 * -(-(features + 1) // 2))


@pytest.mark.parametrize("carrier_bits", [8, 16])
def test_integers_at_both_ends_do_not_overflow(four_ranks, carrier_bits):
    """All ranks at the largest code, or far beyond it, of either sign."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).expand(4, 6, 5) * torch.tensor([1e3, 1, 1, 1, 1, -1])[:, None]
    plan = synthetic_plan(
        torch.cat([signs[:, 1:2], -signs[:, 1:2]], dim=1), CommConfig(preset="paper", carrier_bits=carrier_bits)
    )
    y = same_on_all(four_ranks.run(rank_cases.all_reduce, plan, signs, "plain", "exact_sum"))
    torch.testing.assert_close(y, 4 * signs[0].clamp(-1, 1), rtol=4 * FLOAT32, atol=0)


@pytest.mark.parametrize("carrier_bits", [8, slow(16)])
def test_one_hash_for_every_order_of_the_ranks(four_ranks, carrier_bits):
    """1000 sums over all 24 orders, and parts of the batch: the center is added in rank order, so all have the same."""
    partials = partial_sums(4, 12)
    both_ways = torch.cat([partials.flatten(0, 1), -partials.flatten(0, 1)])  # of one range, around zero
    plan = synthetic_plan(both_ways.expand(4, -1, -1), CommConfig(preset="paper", carrier_bits=carrier_bits))
    orders = list(permutations(range(4)))
    ranks = four_ranks.run(rank_cases.hashes_of_sums, plan, partials, "exact_sum", orders, 1000)
    y = VirtualReducer(plan, "exact_sum").all_reduce(list(partials))
    assert set.union(*ranks) == {hashlib.sha256(y.numpy().tobytes()).hexdigest()}
    for first, last in ((3, 5), (0, 1), (11, 12)):
        some = VirtualReducer(plan, "exact_sum").all_reduce(list(partials[:, first:last]))
        assert torch.equal(some, y[first:last]), "what else is in the batch matters"
    one_shot = four_ranks.run(rank_cases.hashes_of_sums, plan, partials, "one_shot", orders, 24)
    assert len(set.union(*one_shot)) > 1, "sums in float32 that do not tell one order from another show nothing"


# What is refused, and what is counted


def test_values_beyond_their_range_are_counted():
    partials = partial_sums(2, 40)
    plan = synthetic_plan(partials, CommConfig(preset="paper", bf16_fraction=0.0))
    for mode in ("one_shot", "two_shot", "exact_sum"):
        reducer = VirtualReducer(plan, mode)
        reducer.all_reduce(list(partials))
        before = reducer.saturation().saturated
        reducer.all_reduce([5 * part for part in partials])
        # Of five times a range filled evenly, four fifths lie outside; of a bell, most.
        assert reducer.saturation().saturated - before > 0.3 * partials.numel() > 10 * before, mode
    calm = VirtualReducer(synthetic_plan(partials, CommConfig(preset="paper", scale="per_token", bf16_fraction=0.0)))
    calm.all_reduce([2 * part for part in partials])
    assert calm.saturation().saturated == 0, "a token's own range holds all of it"
    calm.all_reduce([100 * part for part in partials])
    assert calm.saturation().saturated > 0.5 * partials.numel(), "far more than 16 standard deviations"


def test_a_plan_without_ranges_of_the_sum_is_refused():
    partials = partial_sums(2, 5)
    ranges = {"site": FeatureRange(partials.amin(1), partials.amax(1))}
    plan = build_plan(CalibrationStats({2: ranges}, {}), 2, CommConfig(preset="paper")).sites["site"]
    with pytest.raises(LowBitError, match="no ranges of the sum, which two_shot needs"):
        VirtualReducer(plan, "two_shot")
    VirtualReducer(plan, "exact_sum")
    with pytest.raises(LowBitError, match=r"comm\.mode=two_shot needs a communication plan"):
        VirtualReducer(None, "two_shot")
    with pytest.raises(LowBitError, match="no standard deviations"):
        build_plan(CalibrationStats({2: ranges}, {}), 2, CommConfig(preset="paper", scale="per_token"))


@pytest.mark.parametrize("mode", ["two_shot", "exact_sum"])
def test_backward_is_the_identity(two_ranks, mode):
    partials = partial_sums(2, 5)
    for upstream, gradient in two_ranks.run(
        rank_cases.all_reduce_gradient, calibrated(2, CommConfig(preset="paper")), partials, mode
    ):
        assert torch.equal(gradient, upstream)
