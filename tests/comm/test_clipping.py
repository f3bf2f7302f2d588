"""Clipped ranges: exact histograms, the least of the expected error, and the textbook's answer for a bell curve."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rank_cases
import torch
from observing import observe

from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.clipping import BINS, WIDTHS, RunningHistogram
from megatron_lowbit.comm.observers import RangeObserver
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.config import CommConfig, LowBitError


def values(seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """float32 [tokens, 6]: bells of several widths, one far from zero, one with rare large values, one constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=generator) * torch.tensor([1e-6, 0.3, 1.0, 70.0, 1.0, 0.0])
    x[:, 2] += 5
    x[::50, 4] *= 20
    x[:, 5] = 3.5
    return x


def histogram(parts: list[torch.Tensor]) -> RunningHistogram:
    made = RunningHistogram(parts[0].shape[1], torch.device("cpu"))
    for part in parts:
        made.update(part)
    return made


def test_widening_is_exact():
    """However the values come, the bins are numpy's over the last, widest span."""
    x = values()
    order = x[:, 3].abs().argsort()  # the span grows step by step
    for parts in ([x], list(x.split(7)), list(x[order].split(1)), [x[:0], x[order.flip(0)]]):
        made = histogram(parts)
        for feature in range(x.shape[1]):
            k = int(made.exponent[feature])
            assert 2.0 ** (k - 1) <= x[:, feature].abs().max() < 2.0**k
            expected, _ = np.histogram(x[:, feature].double().numpy(), BINS, (-(2.0**k), 2.0**k))
            assert made.counts[feature].tolist() == expected.tolist()


def test_zeros_widen_nothing():
    x, zeros = values()[:, :1], torch.zeros(10, 1)  # about 1e-6
    together = histogram([torch.cat([zeros, x])])
    for parts in ([zeros, x], [x, zeros]):
        made = histogram(parts)
        assert made.exponent.tolist() == together.exponent.tolist() and made.exponent[0] < -15
        assert torch.equal(made.counts, together.counts)
    assert histogram([zeros]).clipped_range(4) == (0, 0)


def expected_error(made: RunningHistogram, feature: int, low: float, high: float, bits: int) -> float:
    """The docstring's E, in plain float64."""
    width = 2.0 ** int(made.exponent[feature]) / (BINS // 2)
    edges = np.clip((np.arange(BINS + 1) - BINS // 2) * width, made.low[feature].item(), made.high[feature].item())
    center, n = (edges[1:] + edges[:-1]) / 2, made.counts[feature].numpy()
    inside = (center > low) & (center < high)
    step = (high - low) / (2**bits - 1)
    below, above = center < low, center > high
    clipped = (n * (center - low) ** 2)[below].sum() + (n * (center - high) ** 2)[above].sum()
    return n[inside].sum() * step**2 / 12 + clipped


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_pair_of_edges_is_much_better(bits):
    made = histogram([values()])
    low, high = made.clipped_range(bits)
    for feature in range(5):
        ours = expected_error(made, feature, low[feature].item(), high[feature].item(), bits)
        width = 2.0 ** int(made.exponent[feature]) / (BINS // 2)
        ends = (made.low[feature].item(), made.high[feature].item())
        edges = np.unique(np.clip((np.arange(BINS + 1) - BINS // 2) * width, *ends))
        every = (expected_error(made, feature, a, b, bits) for a, b in itertools.combinations(edges, 2))
        assert ours <= 1.02 * min(every), "moving one end at a time stops close to the best pair"
        assert ours <= expected_error(made, feature, *ends, bits)
    assert low[5] == high[5] == 3.5


def test_a_bell_curve_at_four_bits():
    """The best uniform 16-level quantizer of N(0, 1) has steps of 0.3352: its outer codes lie at 7.5 of them, 2.514."""
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    low, high = histogram([x]).clipped_range(4)
    bin_width = 8 / (BINS // 2)  # the largest of so many values is between 4 and 8
    assert abs(low + 2.514) <= bin_width and abs(high - 2.514) <= bin_width


def test_ranks_share_the_values(two_ranks):
    x = values()
    expected = RangeObserver(1, 6, 0.1, torch.device("cpu"), histograms=True)
    for window in x.view(4, 100, 6):
        observe(expected, [window[None]], torch.ones(1, 100, dtype=torch.bool))
    whole = expected.feature_range().clipped
    assert whole.shape == (1, len(WIDTHS), 2, 6)
    for clipped in two_ranks.run(rank_cases.clipped_ranges, x.view(4, 100, 6)):
        assert torch.equal(clipped, whole)


def test_padding_is_not_counted():
    x, mask = values()[:8].view(2, 4, 6), torch.tensor([[True] * 4, [True, False, False, False]])
    observer = RangeObserver(1, 6, 0.1, torch.device("cpu"), histograms=True)
    observe(observer, [x], mask)
    assert observer.histograms[0].counts.sum(1).tolist() == [5] * 6


def test_a_plan_takes_the_clipped_range_of_each_width(tmp_path):
    x = values().expand(2, -1, -1)
    observer = RangeObserver(2, 6, 0.1, torch.device("cpu"), histograms=True)
    observe(observer, [x[:1], x[1:]], torch.ones(1, 400, dtype=torch.bool))
    stats = CalibrationStats({2: {"site": observer.feature_range()}}, {"weights": {}})
    stats.save(tmp_path)
    config = CommConfig(preset="paper", clipping="histogram", bits=3, bf16_fraction=0.2)
    plan = build_plan(CalibrationStats.load(tmp_path), 2, config)
    low, high = histogram([x[0]]).clipped_range(3)
    codec = plan.sites["site"].first
    coded = codec.bits == 3
    step = torch.where(high > low, (high - low) / 7, 1.0)
    assert torch.allclose(codec.scale[:, coded], step[coded].expand(2, -1))
    assert plan.description == "clipped hybrid int3/bf16" and codec.bf16_idx.tolist() == [3]
    unclipped = {name: r.tensors() | {"clipped": None} for name, r in stats.ranges[2].items()}
    without = CalibrationStats({2: {name: FeatureRange(**r) for name, r in unclipped.items()}}, {})
    with pytest.raises(LowBitError, match="no histograms, which"):
        build_plan(without, 2, config)


def test_per_token_scales_clip_by_themselves():
    with pytest.raises(LowBitError, match=r"^clipping=histogram is of static ranges"):
        CommConfig(clipping="histogram")
