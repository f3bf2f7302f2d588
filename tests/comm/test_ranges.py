"""Ranges and plans (arXiv 2411.07942): running averages against a float64 loop, the choice of bf16 features, scales."""

import math
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from observing import observe
from torch import nn

from megatron_lowbit.comm.build_plan import aggregated_range, build_plan, widest_features
from megatron_lowbit.comm.calibration import calibrate
from megatron_lowbit.comm.observers import RangeObserver
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, LowBitError

FINGERPRINT = {"model_type": "toy", "weights": "0"}
IN_FEATURES, FEATURES, VOCAB = 16, 5, 11
PAD = VOCAB - 1  # a token whose partial sums are far beyond all others


class Toy(nn.Module):
    """An embedding and two row-parallel linears on it. Weights are small integers, so float32 sums are exact."""

    def __init__(self, bias: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def integers(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randint(-9, 10, shape, generator=generator).float(), requires_grad=False)

        self.embedding = nn.Embedding(VOCAB, IN_FEATURES)
        self.embedding.weight = integers(VOCAB, IN_FEATURES)
        self.embedding.weight[PAD] = 1000.0
        self.first, self.second = (nn.Linear(IN_FEATURES, FEATURES, bias=bias) for _ in range(2))
        for linear in (self.first, self.second):
            linear.weight = integers(FEATURES, IN_FEATURES)
            if bias:
                linear.bias = integers(FEATURES)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        return SimpleNamespace(logits=self.first(x) + self.second(x.flip(-1)))

    def sites(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second}


def token_batches(windows: int = 6, length: int = 4, size: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`windows` windows in batches of `size`; all but every third end in padding."""
    ids = torch.randint(0, PAD, (windows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(windows, length, dtype=torch.bool)
    for window in range(windows):
        padding = window % 3
        ids[window, length - padding :] = PAD
        mask[window, length - padding :] = False
    return list(zip(ids.split(size), mask.split(size), strict=True))


def averages(model: Toy, batches, name: str, size: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(m, M) float64 [size, features] by the paper's formula: loops over ranks, features and windows."""
    weight = getattr(model, name).weight.double().numpy()
    width = IN_FEATURES // size
    low, high = np.zeros((size, FEATURES)), np.zeros((size, FEATURES))
    step = 0
    for ids, mask in batches:
        for window, real in zip(ids, mask, strict=True):
            x = model.embedding.weight[window[real]].double().numpy()
            x = x[:, ::-1] if name == "second" else x
            for i in range(size):
                columns = slice(i * width, (i + 1) * width)
                for j in range(FEATURES):
                    y = x[:, columns] @ weight[j, columns]
                    share = gamma if step else 1.0
                    low[i, j] = (1 - share) * low[i, j] + share * y.min()
                    high[i, j] = (1 - share) * high[i, j] + share * y.max()
            step += 1
    return low, high


@pytest.mark.parametrize("gamma", (0.25, 0.01, 1.0))
@pytest.mark.parametrize("bias", (False, True))
def test_calibrated_ranges_are_the_papers_averages(gamma, bias):
    model, batches = Toy(bias), token_batches()
    stats = calibrate(model, model.sites(), batches, (2, 4, 8), FINGERPRINT, gamma)
    assert stats.fingerprint == FINGERPRINT and sorted(stats.ranges) == [1, 2, 4, 8]
    for size, sites in stats.ranges.items():
        assert sorted(sites) == ["first", "second"]
        for name, ranges in sites.items():
            low, high = averages(model, batches, name, size, gamma)
            assert ranges.min_vals.shape == (size, FEATURES) and ranges.min_vals.dtype == torch.float32
            # The sums are exact. A step of the average rounds a difference (of two values, so of twice their size), its
            # product with gamma and a sum. With gamma 1/4 or 1, and sums below 2^11, nothing is rounded at all.
            largest = max(abs(low).max(), abs(high).max())
            bound = 6 * (2 + 1 + 1) * oracles.EPS32 * largest if gamma == 0.01 else 0
            assert abs(ranges.min_vals.double().numpy() - low).max() <= bound
            assert abs(ranges.max_vals.double().numpy() - high).max() <= bound


def test_the_batch_size_does_not_change_the_ranges():
    model = Toy()
    alone, together = (
        calibrate(model, model.sites(), token_batches(size=size), (2,), FINGERPRINT, 0.25) for size in (1, 6)
    )
    for size in (1, 2):
        assert torch.equal(alone.ranges[size]["first"].min_vals, together.ranges[size]["first"].min_vals)
        assert torch.equal(alone.ranges[size]["first"].max_vals, together.ranges[size]["first"].max_vals)


def test_padding_is_left_out():
    """What stands in the padding changes nothing; as real tokens it would."""
    model, batches = Toy(), token_batches()
    ranges = calibrate(model, model.sites(), batches, (2,), FINGERPRINT).ranges[2]["first"]
    other = [(ids.where(mask, 0), mask) for ids, mask in batches]
    same = calibrate(model, model.sites(), other, (2,), FINGERPRINT).ranges[2]["first"]
    assert torch.equal(ranges.min_vals, same.min_vals) and torch.equal(ranges.max_vals, same.max_vals)
    counted = [(ids, torch.ones_like(mask)) for ids, mask in batches]
    wider = calibrate(model, model.sites(), counted, (2,), FINGERPRINT).ranges[2]["first"]
    assert not torch.equal(ranges.max_vals, wider.max_vals)


@pytest.mark.parametrize("size", (2, 4, 8))
def test_partial_sums_add_up_to_the_full_sum(size):
    """The minimum over one token is the value itself, and the bias belongs to no rank."""
    model = Toy()
    batch = (torch.tensor([[3, PAD]]), torch.tensor([[True, False]]))
    ranges = calibrate(model, model.sites(), [batch], (size,), FINGERPRINT).ranges
    for name in ("first", "second"):
        assert torch.equal(ranges[size][name].min_vals, ranges[size][name].max_vals)
        assert torch.equal(ranges[size][name].min_vals.sum(0, keepdim=True), ranges[1][name].min_vals)


def test_observer():
    """Two ranks, gamma 1/2: the first window initialises, each later one counts half."""
    observer = RangeObserver(2, 2, 0.5, torch.device("cpu"))
    masks = torch.tensor([[True, True], [True, False]])
    # [windows, length, features]; rank 1 sees the negative of rank 0. The last token is padding.
    y = torch.tensor([[[1.0, -4.0], [3.0, 8.0]], [[5.0, 0.0], [99.0, -99.0]]])
    observe(observer, [y, -y], masks)
    assert observer.min_vals.tolist() == [[3.0, -2.0], [-4.0, -4.0]]
    assert observer.max_vals.tolist() == [[4.0, 4.0], [-3.0, 2.0]]


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_nan_and_inf_name_their_layer(bad):
    model = Toy()
    model.second.weight[1, 2] = bad
    with pytest.raises(LowBitError, match="second puts out NaN or Inf"):
        calibrate(model, model.sites(), token_batches(), (2,), FINGERPRINT)
    assert not model.first._forward_hooks and not model.second._forward_hooks  # none are left behind


def test_nan_in_padding_is_no_error():
    model, batches = Toy(), token_batches()
    clean = calibrate(model, model.sites(), batches, (2,), FINGERPRINT).ranges[2]["first"]
    model.embedding.weight[PAD] = math.nan
    ranges = calibrate(model, model.sites(), batches, (2,), FINGERPRINT).ranges[2]["first"]
    assert torch.equal(ranges.min_vals, clean.min_vals) and torch.equal(ranges.max_vals, clean.max_vals)


def test_no_batch():
    model = Toy()
    with pytest.raises(LowBitError, match="no batch"):
        calibrate(model, model.sites(), [], (2,), FINGERPRINT)


def test_a_size_that_does_not_divide_the_inputs():
    model = nn.Sequential(nn.Linear(6, 2))
    batch = (torch.ones(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(LowBitError, match="4"):
        calibrate(lambda input_ids: model(input_ids), {"site": model[0]}, [batch], (4,), FINGERPRINT)


def stats_of(min_vals, max_vals) -> CalibrationStats:
    """One site, two ranks."""
    low, high = torch.as_tensor(min_vals, dtype=torch.float32), torch.as_tensor(max_vals, dtype=torch.float32)
    return CalibrationStats({1: {}, len(low): {"site": FeatureRange(low, high)}}, FINGERPRINT)


def random_stats(features: int, ranks: int = 2, sites: int = 1) -> CalibrationStats:
    generator = torch.Generator().manual_seed(features)
    ranges = {}
    for site in range(sites):
        a, b = torch.randn(2, ranks, features, generator=generator)
        ranges[f"site{site}"] = FeatureRange(torch.minimum(a, b), torch.maximum(a, b))
    return CalibrationStats({ranks: ranges}, FINGERPRINT)


@pytest.mark.parametrize("symmetric", (False, True))
def test_aggregated_range(symmetric):
    ranges = random_stats(7, ranks=3).ranges[3]["site0"]
    low, high = ranges.min_vals.double().numpy(), ranges.max_vals.double().numpy()
    expected = np.zeros(7)
    for m, big in zip(low, high, strict=True):
        expected += 2 * np.maximum(abs(m), abs(big)) if symmetric else big - m
    result = aggregated_range(ranges.min_vals, ranges.max_vals, symmetric)
    # A difference of float32 values is rounded once, and two sums of three terms follow.
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=3 * oracles.EPS32)


def test_widest_features_take_the_lower_index_of_equals():
    aggregated = torch.tensor([3.0, 5.0, 3.0, 9.0, 3.0, 5.0])
    for k, expected in enumerate([[], [3], [1, 3], [1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]):
        assert sorted(widest_features(aggregated, k).tolist()) == expected
    assert widest_features(torch.zeros(1000), 3).tolist() == [0, 1, 2]  # long enough for another sorting algorithm


@pytest.mark.parametrize(
    ("features", "fraction", "k"),
    [
        (64, 0, 0),
        (64, 1, 64),
        (64, 1 / 64, 1),
        (63, 1 / 64, 0),
        (65, 1 / 64, 1),
        (128, 1 / 64, 2),
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (7, 0.5, 3),
        (1, 0.99, 0),
        (1, 1, 1),
    ],
)
def test_number_of_bf16_features(features, fraction, k):
    for selection in ("top", "random"):
        config = CommConfig(preset="paper", bf16_fraction=fraction, selection=selection)
        chosen = build_plan(random_stats(features), 2, config).sites["site0"].first.bf16_idx
        assert chosen.dtype == torch.int64 and chosen.shape == (k,)
        assert chosen.tolist() == sorted(set(chosen.tolist()))  # ascending, none twice
        assert all(0 <= index < features for index in chosen.tolist())


def test_top_selection_depends_on_symmetric():
    """Feature 0 is wide, feature 1 far from zero: symmetric ranges must reach that far."""
    stats = stats_of([[-3.0, 9.0, 0.0], [-3.0, 9.0, 0.0]], [[3.0, 10.0, 1.0], [3.0, 10.0, 1.0]])
    for symmetric, index in ((False, 0), (True, 1)):
        plan = build_plan(stats, 2, CommConfig(preset="paper", bf16_fraction=0.4, symmetric=symmetric))
        assert plan.sites["site"].first.bf16_idx.tolist() == [index]


def test_top_selection_adds_up_the_ranks():
    """Feature 2 is widest on no rank, but in the sum."""
    stats = stats_of([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[10.0, 0.0, 8.0], [0.0, 10.0, 8.0]])
    assert build_plan(stats, 2, CommConfig(preset="paper", bf16_fraction=0.4)).sites[
        "site"
    ].first.bf16_idx.tolist() == [2]


def test_random_selection_is_seeded():
    stats = random_stats(200, sites=2)
    config = CommConfig(preset="paper", bf16_fraction=0.1, selection="random")

    def chosen(seed: int) -> list[list[int]]:
        return [site.first.bf16_idx.tolist() for site in build_plan(stats, 2, config, seed).sites.values()]

    torch.manual_seed(5)
    first = chosen(3)
    torch.manual_seed(6)  # the global generator has no part in it
    assert chosen(3) == first
    assert chosen(4) != first
    assert first[0] != first[1]  # sites draw apart
    top = build_plan(stats, 2, CommConfig(preset="paper", bf16_fraction=0.1)).sites["site0"].first.bf16_idx.tolist()
    assert first[0] != top


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", (False, True))
def test_scales_of_the_plan(bits, symmetric):
    stats = random_stats(9)
    plan = build_plan(stats, 2, CommConfig(preset="paper", bits=bits, symmetric=symmetric))
    assert plan.tp_size == 2 and plan.fingerprint == FINGERPRINT
    site, ranges = plan.sites["site0"], stats.ranges[2]["site0"]
    codec = site.first
    assert codec.bits.tolist() == [bits] * 9 and codec.scale.shape == codec.zero_point.shape == (2, 9)
    low, high = ranges.min_vals.double().numpy(), ranges.max_vals.double().numpy()
    scale, zero_point = oracles.qparams(low, high, bits, symmetric)
    # Two quotients and their difference are rounded; the difference of two like signs magnifies the first two.
    bound = oracles.EPS32 * (2 + (abs(low) + abs(high)) / (high - low)) * scale
    assert (abs(codec.scale.double().numpy() - scale) <= bound).all()
    assert np.array_equal(codec.zero_point.numpy(), zero_point)


def test_a_feature_that_never_changes_is_sent_exactly():
    value = torch.tensor([[0.0, 0.3, -100.4, 1e30]]).repeat(2, 1)
    plan = build_plan(stats_of(value, value), 2, CommConfig(preset="paper", bf16_fraction=0))
    reducer = VirtualReducer(plan.sites["site"])
    assert torch.equal(reducer.all_reduce([value[:1], value[1:]]), 2 * value[:1])


@pytest.mark.parametrize(
    ("fraction", "selection", "expected"),
    [(0, "top", "int4"), (0, "random", "int4"), (0.1, "top", "hybrid int4/bf16"), (0.1, "random", "random int4/bf16")],
)
def test_description(fraction, selection, expected):
    config = CommConfig(preset="paper", bf16_fraction=fraction, selection=selection)
    assert build_plan(random_stats(9), 2, config).description == expected


@pytest.mark.parametrize("size", (1, 4))
def test_a_size_that_was_not_calibrated(size):
    with pytest.raises(LowBitError, match=rf"ranges for tp_size \[2\], not {size}"):
        build_plan(random_stats(9), size, CommConfig(preset="paper"))
