"""calibrate on several ranks: windows or layers shared among them, and the ranges are those of one process."""

from __future__ import annotations

import pytest
import sequence_parallel_cases as cases
import torch

from megatron_lowbit.comm.plan import CalibrationStats


def token_batches() -> cases.Batches:
    """Seven windows in batches of 3, 3 and 1: two ranks share none of them equally. All but every third are padded."""
    ids = torch.randint(0, 11, (7, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(7, 6, dtype=torch.bool)
    for window in range(7):
        mask[window, 6 - window % 3 :] = False
    return list(zip(ids.split(3), mask.split(3), strict=True))


def alone(batches: cases.Batches) -> CalibrationStats:
    return cases.calibrated(0, 1, batches, "none")


def assert_same(stats: CalibrationStats, wanted: CalibrationStats) -> None:
    assert {size: set(sites) for size, sites in stats.ranges.items()} == {
        1: {"first", "second", "column"},
        2: {"first", "second"},
        4: {"first", "second"},
    }
    for size, sites in wanted.ranges.items():
        for name, ranges in sites.items():
            found = stats.ranges[size][name]
            for field, expected in ranges.tensors().items():
                assert torch.equal(getattr(found, field), expected), (size, name, field)


@pytest.mark.parametrize("parallel", ("dp", "pp"))
def test_ranks_agree_with_one_process(two_ranks, parallel):
    """dp: the average is taken in the order of the windows, and a share that is padding alone counts for nothing.
    pp: every stage returns the ranges of all."""
    batches = token_batches()
    expected = alone(batches)
    for stats in two_ranks.run(cases.calibrated, batches, parallel):
        assert_same(stats, expected)


def test_four_ranks_share_the_windows(four_ranks):
    """Batches of 3 over four ranks: the last has nothing but padding."""
    batches = token_batches()
    expected = alone(batches)
    for stats in four_ranks.run(cases.calibrated, batches, "dp"):
        assert_same(stats, expected)


def test_the_order_of_the_windows_matters():
    """So that the equality above is of something: an average of the same windows in another order is another."""
    batches = token_batches()
    turned = [(ids.flip(0), mask.flip(0)) for ids, mask in batches]
    assert not torch.equal(alone(batches).ranges[2]["first"].max_vals, alone(turned).ranges[2]["first"].max_vals)


def test_ranges_of_inputs():
    """What a column-parallel linear reads: per feature, averaged over the windows by a loop in float64."""
    batches, model = token_batches(), cases.Toy()
    found = alone(batches).ranges[1]["column"]
    low = high = None
    for ids, mask in batches:
        for window, real in zip(ids, mask, strict=True):
            x = model.embedding.weight[window[real]].double()
            least, most = x.amin(0), x.amax(0)
            low = least if low is None else 0.75 * low + 0.25 * least
            high = most if high is None else 0.75 * high + 0.25 * most
    # Integers below 10 and a share of 1/4: float32 holds seven such steps exactly.
    assert found.min_vals.shape == (1, 16)
    assert torch.equal(found.min_vals[0].double(), low) and torch.equal(found.max_vals[0].double(), high)
