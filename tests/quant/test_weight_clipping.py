"""weights.clipping=mse: the ratio of least squared error, against a search by hand in numpy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lowbit.quant.affine import choose_qparams, qparams_from_range, value_range
from megatron_lowbit.quant.clipping import RATIOS, best_ratios, clipped_qparams


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Weights of which some are large, so that clipping pays."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return normal**3 * 0.1


def error_by_hand(row: np.ndarray, weights: np.ndarray, ratio: float, bits: int, zero_point: str) -> float:
    """Return the error of one channel, by a quantizer written down once more."""
    low, high, levels = row.min() * ratio, row.max() * ratio, 2**bits - 1
    if zero_point == "symmetric":
        scale, zero = max(abs(low), abs(high)) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    else:
        scale = (high - low) / levels
        zero = -low / scale if zero_point == "real" else -np.round(low / scale)
    codes = np.clip(np.round(row / scale + zero), 0, levels)
    return float((weights * (row - (codes - zero) * scale) ** 2).sum())


@pytest.mark.parametrize("zero_point", ("integer", "real", "symmetric"))
@pytest.mark.parametrize("group_size", (None, 16))
@pytest.mark.parametrize("bits", (2, 4))
def test_least_error_of_every_range(bits, group_size, zero_point):
    """No ratio of the grid has a smaller error, but for codes that float32 rounds to the other side of a tie: a code
    there changes an error of about in * scale^2 / 12 by float32's 1e-6."""
    weight = heavy_tailed(24, 64)
    d = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    low, high = value_range(weight, group_size)
    how = zero_point == "symmetric", [d]
    ratios = best_ratios([weight], low, high, bits, *how, real_zero=zero_point == "real")
    assert ratios.shape == (24, 64 // (group_size or 64)) and ratios.dtype == torch.float32
    assert len(ratios.unique()) > 3, "nothing to choose"
    for i, row in enumerate(weight.double().numpy().reshape(24, ratios.shape[1], -1)):
        for g, (values, importance) in enumerate(zip(row, d.numpy().reshape(ratios.shape[1], -1), strict=True)):
            errors = [error_by_hand(values, importance, ratio, bits, zero_point) for ratio in RATIOS]
            chosen = errors[int((torch.tensor(RATIOS) - ratios[i, g]).abs().argmin())]
            assert chosen <= min(errors) * (1 + 1e-5)


def test_importance_changes_the_choice():
    weight = heavy_tailed(32, 64)
    low, high = value_range(weight)
    alike = best_ratios([weight], low, high, 4, False)
    only_large = (weight.abs().amax(0) > weight.abs().amax(0).median()).double() * 100 + 0.01
    assert not torch.equal(alike, best_ratios([weight], low, high, 4, False, [only_large]))


@pytest.mark.parametrize("real_zero", (False, True))
def test_qparams_are_those_of_the_narrowed_range(real_zero):
    weight = heavy_tailed(8, 48)
    low, high = value_range(weight, 16)
    ratios = best_ratios([weight], low, high, 4, False, real_zero=real_zero)
    wanted = qparams_from_range(low * ratios, high * ratios, 4, False, real_zero)
    assert all(map(torch.equal, clipped_qparams(weight, 4, False, 16, real_zero), wanted))
    assert torch.equal(wanted[1], wanted[1].round()) == (not real_zero)


def test_what_nothing_can_be_gained_from():
    """Rows that are constant, zero or hold two values, and NaN: the range stays, and the bits of min-max."""
    weight = torch.zeros(4, 6)
    weight[1] = 0.7
    weight[2, ::2], weight[2, 1::2] = -1.0, 1.0
    weight[3, 2] = torch.nan
    ratios = best_ratios([weight], *value_range(weight), 4, False)
    assert ratios.flatten().tolist() == [1.0] * 4
    pairs = zip(clipped_qparams(weight, 4), choose_qparams(weight, 4), strict=True)
    assert all(torch.equal(mine.nan_to_num(7.0), usual.nan_to_num(7.0)) for mine, usual in pairs)


def test_shards_share_a_ratio():
    """Errors of the shards are added up: the ratio is that of the whole row, whose error no shard's own choice has."""
    weight = heavy_tailed(16, 64)
    shards = list(weight.chunk(4, 1))
    low, high = value_range(weight)
    assert torch.equal(best_ratios(shards, low, high, 4, False), best_ratios([weight], low, high, 4, False))
