"""The collectives of sequence parallelism on real ranks: HybridReducer.reduce_scatter and HybridGather."""

from __future__ import annotations

import math

import pytest
import sequence_parallel_cases as cases
import torch
from torch import Tensor

from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange, SitePlan
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig

LENGTH, BATCH = 8, 3
# (features, features in bf16, bits)
CASES = [(128, 0, 4), (128, 1, 4), (128, 2, 4), (128, 128, 4), (127, 0, 4), (127, 1, 4), (127, 127, 4), (126, 1, 6)]
FLOAT32 = 2.0**-24


def partial_sums(ranks: int, features: int) -> Tensor:
    """float32 [ranks, length, batch, features] of many widths and means."""
    generator = torch.Generator().manual_seed(ranks * 1000 + features)
    x = torch.randn(ranks, LENGTH, BATCH, features, generator=generator)
    width = torch.rand(ranks, 1, 1, features, generator=generator) * 5 + 0.1
    return x * width + torch.randn(ranks, 1, 1, features, generator=generator) * width


def make_plan(values: Tensor, num_bf16: int, num_bits: int = 4) -> SitePlan:
    """values: [senders, ..., features]; ranges a tenth too narrow, so that some codes saturate."""
    rows = values.flatten(1, -2)
    low, high = 0.9 * rows.amin(1), 0.9 * rows.amax(1)
    stats = CalibrationStats({max(len(low), 2): {"site": FeatureRange(low, high)}}, {})
    config = CommConfig(preset="paper", bits=num_bits, bf16_fraction=num_bf16 / low.shape[1])
    plan = build_plan(stats, max(len(low), 2), config).sites["site"]
    assert len(plan.first.bf16_idx) == num_bf16 and plan.first.scale.shape == low.shape
    return plan


def row_bytes(features: int, num_bf16: int, num_bits: int) -> int:
    """Codes fill whole bytes: two of 4 bits one byte, four of 6 bits three. One byte tells of a NaN where no bf16
    value does."""
    codes = 8 // math.gcd(8, num_bits)
    return (num_bf16 == 0) + 2 * num_bf16 + -(-(features - num_bf16) // codes) * codes * num_bits // 8


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize(("features", "num_bf16", "num_bits"), CASES)
def test_a_share_of_the_all_reduce(pool_of, size, features, num_bf16, num_bits):
    """Rank r's rows of the sum, bit for bit what the all-reduce gives everyone, in one all-to-all."""
    partials = partial_sums(size, features)
    plan = make_plan(partials, num_bf16, num_bits)
    virtual = VirtualReducer(plan).all_reduce(list(partials))
    sent = LENGTH * BATCH * row_bytes(features, num_bf16, num_bits)
    for rank, results in enumerate(pool_of(size).run(cases.scatter, plan, partials)):
        assert results["y"].shape == (LENGTH // size, BATCH, features) and results["y"].dtype == torch.float32
        assert torch.equal(results["y"], results["all_reduce"].chunk(size)[rank])
        assert torch.equal(results["y"], virtual.chunk(size)[rank])
        assert results["calls"] == [("all_to_all_single", sent, "uint8")]
        assert results["traffic"] == (sent, LENGTH * BATCH * features)
        assert results["input_kept"]


@pytest.mark.parametrize("size", (2, 4))
def test_other_dtypes_and_strides(pool_of, size):
    """bf16 activations, and values that lie otherwise in memory, or without a batch dimension."""
    partials = partial_sums(size, 127)
    plan, half = make_plan(partials, 1), partials.bfloat16()
    pool = pool_of(size)
    plain = [results["y"] for results in pool.run(cases.scatter, plan, partials)]
    strided = pool.run(cases.scatter, plan, partials, None, True)
    flat = pool.run(cases.scatter, plan, partials[:, :, 0])
    for rank, results in enumerate(pool.run(cases.scatter, plan, half)):
        assert results["y"].dtype == torch.bfloat16
        assert torch.equal(results["y"], results["all_reduce"].chunk(size)[rank])
        assert torch.equal(strided[rank]["y"], plain[rank])
        assert torch.equal(flat[rank]["y"], plain[rank][:, 0])


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_without_a_plan(pool_of, size, dtype):
    """The stock reduce-scatter, in the values' own dtype or in bf16; one rounding per rank and addition at most."""
    partials = partial_sums(size, 64)
    exact, magnitude = partials.double().sum(0), partials.double().abs().sum(0)
    rounding = 2.0**-8 * size if dtype is torch.bfloat16 else FLOAT32 * size
    for rank, results in enumerate(
        pool_of(size).run(cases.scatter, None, partials, "native" if dtype is None else "bf16")
    ):
        error = (results["y"].double() - exact.chunk(size)[rank]).abs()
        assert (error <= 1.1 * rounding * magnitude.chunk(size)[rank]).all()
        (call,) = results["calls"]
        width = 4 if dtype is None else 2
        assert call[0] in ("reduce_scatter_tensor", "reduce_scatter_single")
        assert call[1:] == (LENGTH * BATCH * 64 * width, "float32" if dtype is None else "bfloat16")
        if size == 2:  # the order of two additions is no question
            assert torch.equal(results["y"], results["all_reduce"].chunk(2)[rank])


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("low_bit", (True, False))
def test_backward_of_the_scatter_is_the_all_gather(pool_of, size, low_bit):
    """Every rank's partial sum is in all shares: it gets the gradients of all, unrounded, in rank order."""
    partials = partial_sums(size, 64)
    ranks = pool_of(size).run(cases.scatter_gradient, make_plan(partials, 1) if low_bit else None, partials)
    everything = torch.cat([upstream for upstream, _ in ranks])
    assert all(torch.equal(gradient, everything) for _, gradient in ranks)


def rounded(x: Tensor, codec: Codec) -> Tensor:
    """dequantize(quantize(x)) in float32, the codec's widest features in bf16."""
    scale, zero_point = codec.scale[0], codec.zero_point[0]
    codes = torch.round(x.float() * scale.reciprocal() + zero_point).clamp(torch.tensor(0.0), 2.0**codec.bits - 1)
    y = (codes - zero_point) * scale
    y[..., codec.bf16_idx] = x[..., codec.bf16_idx].bfloat16().float()
    return y.to(x.dtype)


def gather_plan(x: Tensor, num_bf16: int, num_bits: int = 4) -> Codec:
    """Return a codec of one sender; build_plan makes those of two, of which the second is dropped."""
    two = make_plan(torch.stack([x.float(), x.float()]), num_bf16, num_bits).first
    return Codec(two.scale[:1], two.zero_point[:1], two.bits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize(("features", "num_bf16", "num_bits"), CASES)
def test_gather_is_the_rounded_whole(pool_of, size, features, num_bf16, num_bits, dtype):
    """All ranks get every share as its sender rounded it; each hands over its own rows, a copy for every rank."""
    x = partial_sums(1, features)[0].to(dtype)
    plan = gather_plan(x, num_bf16, num_bits)
    sent = LENGTH * BATCH * row_bytes(features, num_bf16, num_bits) // size
    for results in pool_of(size).run(cases.gather, plan, x):
        assert results["y"].dtype == dtype and torch.equal(results["y"], rounded(x, plan))
        assert results["calls"] == [("all_to_all_single", size * sent, "uint8")]
        assert results["traffic"] == (sent, LENGTH * BATCH * features // size)


@pytest.mark.parametrize("size", (2, 4))
def test_backward_of_the_gather_is_the_reduce_scatter(pool_of, size):
    """The gradients that all ranks have for this rank's rows, added up in full precision."""
    x = partial_sums(1, 64)[0]
    ranks = pool_of(size).run(cases.gather, gather_plan(x, 1), x)
    upstream = torch.stack([results["upstream"] for results in ranks]).double()
    exact, magnitude = upstream.sum(0), upstream.abs().sum(0)
    for rank, results in enumerate(ranks):
        error = (results["grad"].double() - exact.chunk(size)[rank]).abs()
        assert (error <= size * FLOAT32 * magnitude.chunk(size)[rank]).all()
        ((name, sent, kind),) = results["backward"]
        assert name in ("reduce_scatter_tensor", "reduce_scatter_single")
        assert (sent, kind) == (LENGTH * BATCH * 64 * 4, "float32")


def test_plans_for_another_number_of_senders(two_ranks):
    """The scatter needs a range per rank, the gather one for all: what they send is the same tensor everywhere."""
    four, two = make_plan(partial_sums(4, 64), 1), make_plan(partial_sums(2, 64), 1).first
    for messages in two_ranks.run(cases.wrong_plans, four, two):
        assert messages == [
            "the communication plan is for tp_size 4, this group has 2 ranks",
            "a plan of one sender's ranges is needed here, not of 2",
        ]
