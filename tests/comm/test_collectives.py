"""HybridReducer on real ranks, against float64 sums; VirtualReducer against HybridReducer, bit for bit."""

from __future__ import annotations

import pytest
import rank_cases
import torch
from torch import Tensor

from megatron_lowbit.comm.build_plan import build_plan, synthetic_plan
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange, SitePlan
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, LowBitError

BF16_ROUNDING = 2.0**-8  # relative: half a unit in the last of 8 significant bits
FLOAT32_ROUNDING = 2.0**-20  # relative, generous: a few float32 operations


def partial_sums(ranks: int, tokens: int, features: int) -> Tensor:
    """float32 [ranks, tokens, features]; features differ in width by up to 50 and in sign of their mean."""
    generator = torch.Generator().manual_seed(1000 * ranks + 10 * tokens + features)
    x = torch.randn(ranks, tokens, features, generator=generator)
    width = torch.rand(ranks, 1, features, generator=generator) * 5 + 0.1
    return x * width + torch.randn(ranks, 1, features, generator=generator) * width


def make_plan(partials: Tensor, num_bf16: int, num_bits: int = 4) -> SitePlan:
    """The plan whose ranges are those of `partials` themselves, so that nothing saturates."""
    ranks, _, features = partials.shape
    # One token alone would give every feature a range of zero width; 0.5 on either side makes it a range again.
    margin = 0.5 if partials.shape[1] == 1 else 0.0
    ranges = {"site": FeatureRange(partials.amin(1) - margin, partials.amax(1) + margin)}
    config = CommConfig(preset="paper", bits=num_bits, bf16_fraction=num_bf16 / features)
    plan = build_plan(CalibrationStats({ranks: ranges}, {}), ranks, config).sites["site"]
    assert len(plan.first.bf16_idx) == num_bf16
    return plan


def exact_sum(partials: Tensor) -> Tensor:
    return partials.double().sum(0)


def error_bound(partials: Tensor, plan: SitePlan) -> Tensor:
    """[tokens, features], float64: one rounding per rank and value, of half a step or of one bf16 value."""
    magnitude = partials.double().abs().sum(0)
    # A zero point is rounded too, so a code at the very end of the range may lie half a step outside 0..15 and be
    # clamped: the same half step, not one more.
    bound = (plan.first.scale.double().sum(0) / 2).expand_as(magnitude).clone()
    bound[:, plan.first.bf16_idx] = BF16_ROUNDING * magnitude[:, plan.first.bf16_idx]
    return bound + FLOAT32_ROUNDING * magnitude + FLOAT32_ROUNDING * plan.first.scale.double().sum(0)


def virtual_sum(partials: Tensor, plan: SitePlan | None) -> Tensor:
    return VirtualReducer(plan).all_reduce(list(partials))


# (tokens, features, features in bf16, bits)
CASES = [
    (33, 128, 0, 4),
    (33, 128, 1, 4),
    (33, 128, 2, 4),  # k = E / 64
    (33, 128, 128, 4),
    (1, 128, 2, 4),
    (33, 127, 1, 4),
    (1, 127, 0, 4),
    (33, 128, 2, 6),
    (1, 126, 1, 6),
    (33, 127, 127, 6),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("tokens", "features", "num_bf16", "num_bits"), CASES)
def test_all_reduce_on_real_ranks(request, size, tokens, features, num_bf16, num_bits):
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    partials = partial_sums(size, tokens, features)
    plan = make_plan(partials, num_bf16, num_bits)
    ranks = pool.run(rank_cases.all_reduce, plan, partials)
    y = ranks[0]["y"]
    assert y.shape == (tokens, features) and y.dtype == torch.float32
    assert all(torch.equal(rank["y"], y) for rank in ranks), "the ranks hold different bits"
    assert all(rank["input_kept"] for rank in ranks)
    error = (y.double() - exact_sum(partials)).abs()
    assert (error <= error_bound(partials, plan)).all()
    assert torch.equal(virtual_sum(partials, plan), y), "the virtual ranks differ from the real ones"


def test_rounding_is_as_coarse_as_its_bits(two_ranks):
    """The bound above would also hold for an exact sum: with 4 bits the error has to be that of 4 bits."""
    partials = partial_sums(2, 400, 64)
    for num_bits in (4, 6):
        plan = make_plan(partials, 0, num_bits)
        error = two_ranks.run(rank_cases.all_reduce, plan, partials)[0]["y"].double() - exact_sum(partials)
        # Rounding of two ranks is uniform on one step each: variance (s0^2 + s1^2) / 12. Over 25,600 values the
        # estimate of a variance is within 2 %; 10 % is allowed.
        expected = plan.first.scale.double().square().sum(0) / 12
        assert (error.square().mean(0) / expected).mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("views", ["transposed", "batched"])
def test_other_views_of_the_same_values(two_ranks, views):
    partials = partial_sums(2, 33, 128)
    plan = make_plan(partials, 2)
    plain = two_ranks.run(rank_cases.all_reduce, plan, partials)[0]["y"]
    for rank in two_ranks.run(rank_cases.all_reduce, plan, partials, views):
        assert rank["y"].shape == ((11, 3, 128) if views == "batched" else (33, 128))
        assert torch.equal(rank["y"].reshape(33, 128), plain)


def test_virtual_ranks_take_slices_of_a_wider_tensor(two_ranks):
    partials = partial_sums(2, 33, 128)
    plan = make_plan(partials, 2)
    wide = torch.cat(list(partials), dim=1)  # the slices of it are not contiguous
    assert torch.equal(VirtualReducer(plan).all_reduce(wide.chunk(2, dim=1)), virtual_sum(partials, plan))


@pytest.mark.parametrize("size", [2, 4])
def test_bf16_mode(request, size):
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    partials = partial_sums(size, 33, 128)
    ranks = pool.run(rank_cases.all_reduce, None, partials)
    for rank in ranks:
        assert torch.equal(rank["y"], ranks[0]["y"])
        assert rank["calls"] == [("all_reduce", 33 * 128 * 2, "bfloat16")]
        assert rank["traffic"] == (33 * 128 * 2, 33 * 128, 16.0)
        # One rounding per rank on the way in, then at most one per addition (size - 1), each of a running sum.
        magnitude = partials.double().abs().sum(0)
        bound = BF16_ROUNDING * size * magnitude * (1 + 4 * BF16_ROUNDING)
        assert ((rank["y"].double() - exact_sum(partials)).abs() <= bound).all()
    if size == 2:  # beyond, the order of the additions is the backend's own
        assert torch.equal(virtual_sum(partials, None), ranks[0]["y"])


def test_bf16_activations_stay_bf16(two_ranks):
    partials = partial_sums(2, 33, 128).bfloat16()
    plan = make_plan(partials.float(), 2)
    ranks = two_ranks.run(rank_cases.all_reduce, plan, partials)
    y = ranks[0]["y"]
    assert y.dtype == torch.bfloat16 and torch.equal(ranks[1]["y"], y)
    bound = error_bound(partials, plan) + BF16_ROUNDING * (exact_sum(partials).abs() + error_bound(partials, plan))
    assert ((y.double() - exact_sum(partials)).abs() <= bound).all()
    assert torch.equal(virtual_sum(partials, plan), y)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("tokens", "features", "num_bf16"), [(33, 128, 2), (1, 128, 2), (33, 127, 1), (33, 127, 0), (33, 128, 128)]
)
def test_bytes_handed_to_torch_distributed(request, size, tokens, features, num_bf16):
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    partials = partial_sums(size, tokens, features)
    plan = make_plan(partials, num_bf16)
    expected = tokens * ((num_bf16 == 0) + 2 * num_bf16 + -(-(features - num_bf16) // 2))
    for rank in pool.run(rank_cases.all_reduce, plan, partials):
        # One call and no other: scales and zero points are static and never travel.
        assert rank["calls"] == [("all_to_all_single", size * expected, "uint8")]  # a copy for every rank
        assert rank["traffic"][:2] == (expected, tokens * features)
        assert rank["traffic"][2] == 8 * expected / (tokens * features)
    if (features, num_bf16) == (128, 2):
        assert 8 * expected / (tokens * features) == 4 + 12 * 2 / 128 == 4.1875
    virtual = VirtualReducer(plan)
    virtual.all_reduce(list(partials))
    assert (virtual.traffic.bytes, virtual.traffic.values) == (expected, tokens * features)


def test_traffic_adds_up_over_calls():
    partials = partial_sums(2, 33, 128)
    reducer = VirtualReducer(make_plan(partials, 2))
    for _ in range(3):
        reducer.all_reduce(list(partials))
    assert (reducer.traffic.bytes, reducer.traffic.values) == (3 * 33 * 67, 3 * 33 * 128)
    assert reducer.traffic.bits_per_value == 4.1875


def test_values_beyond_the_calibrated_range_saturate(two_ranks):
    partials = partial_sums(2, 33, 128)
    plan = make_plan(partials, 2)
    louder = 3 * partials
    y = two_ranks.run(rank_cases.all_reduce, plan, louder)[0]["y"].double()
    low = torch.ones(128, dtype=torch.bool)
    low[plan.first.bf16_idx] = False
    # Codes 0 and 15 of every rank are the least and the most that a sum can be.
    least = ((0 - plan.first.zero_point.double()) * plan.first.scale.double()).sum(0)
    most = ((15 - plan.first.zero_point.double()) * plan.first.scale.double()).sum(0)
    slack = FLOAT32_ROUNDING * (least.abs() + most.abs())
    assert ((y >= least - slack) & (y <= most + slack))[:, low].all()
    assert (exact_sum(louder)[:, low] > most[low]).any(), "nothing saturated"
    wide = (y - exact_sum(louder))[:, plan.first.bf16_idx].abs()
    assert (wide <= 2 * BF16_ROUNDING * louder.double().abs().sum(0)[:, plan.first.bf16_idx]).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_reach_every_rank(two_ranks, poison):
    partials = partial_sums(2, 5, 128)
    plan = make_plan(partials, 2)
    low_feature = max(f for f in range(128) if f not in plan.first.bf16_idx.tolist())
    partials[1, 3, low_feature] = poison
    for rank in two_ranks.run(rank_cases.all_reduce, plan, partials):
        assert rank["y"][3, plan.first.bf16_idx].isnan().all(), "a broken token travels as if nothing had happened"
        assert rank["y"][[0, 1, 2, 4]].isfinite().all()


def test_backward_is_the_identity(two_ranks):
    partials = partial_sums(2, 5, 128)
    for upstream, gradient in two_ranks.run(rank_cases.all_reduce_gradient, make_plan(partials, 2), partials):
        assert torch.equal(gradient, upstream)


def test_plan_of_another_tp_size_is_refused(two_ranks):
    plan = make_plan(partial_sums(4, 33, 128), 2)
    for message in two_ranks.run(rank_cases.wrong_plan, plan):
        assert message == "the communication plan is for tp_size 4, this group has 2 ranks"
    with pytest.raises(LowBitError, match="tp_size 4, there are 2"):
        VirtualReducer(plan).all_reduce(list(partial_sums(2, 33, 128)))


@pytest.mark.parametrize(
    ("mode", "dtype", "in_place"),
    [
        ("bf16", torch.bfloat16, True),
        ("native", torch.float32, True),
        ("bf16", torch.float32, False),  # travels in another dtype
        ("one_shot", torch.bfloat16, True),
        ("exact_sum", torch.bfloat16, False),
    ],
)
def test_a_sum_may_take_its_partial_sums_place(two_ranks, mode, dtype, in_place):
    partials = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    plan = synthetic_plan(partials.float(), CommConfig())
    for rank in two_ranks.run(rank_cases.all_reduce_in_place, plan, partials, mode):
        assert rank == {"equal": True, "in_place": in_place, "kept": True}
