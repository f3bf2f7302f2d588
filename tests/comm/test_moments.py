"""Means and standard deviations of calibration: one huge token does not decide for all others."""

import numpy as np
import torch
from observing import observe

from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.observers import RangeObserver
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig

WINDOWS, LENGTH, FEATURES = 3, 40, 24


def partial_sums(first: float) -> torch.Tensor:
    """[windows, length, features]; the first token has other proportions than others, and is `first` times as large."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(WINDOWS, LENGTH, FEATURES, generator=generator) * torch.linspace(0.2, 2, FEATURES)
    y[:, 0] = first * torch.linspace(2, 0.2, FEATURES)
    return y


def observed(y: torch.Tensor, mask: torch.Tensor | None = None):
    observer = RangeObserver(1, y.shape[-1], 0.1, torch.device("cpu"))
    observe(observer, [y], torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask)
    return observer.feature_range()


def test_a_token_counts_for_at_most_four_times_the_median():
    y = partial_sums(100.0)
    exact = y.numpy().astype(np.float64)
    size = np.sqrt((exact**2).mean(-1, keepdims=True))
    # torch takes the lower of the two middle values of an even number
    median = np.sort(size, axis=1)[:, (LENGTH - 1) // 2 : (LENGTH - 1) // 2 + 1]
    exact = (exact * np.minimum(1, 4 * median / size)).reshape(-1, FEATURES)
    r = observed(y)
    assert r.std is not None and r.mean is not None
    np.testing.assert_allclose(r.mean[0].numpy(), exact.mean(0), rtol=1e-6, atol=1e-7)  # float32 keeps 2^-24
    np.testing.assert_allclose(r.std[0].numpy(), exact.std(0), rtol=1e-6)
    assert torch.equal(r.max_vals[0], y[0].amax(0).lerp(y[1].amax(0), 0.1).lerp(y[2].amax(0), 0.1))  # ranges: as it is


def test_the_crest_is_the_root_mean_square_of_the_tokens_sizes():
    """Window by window, in its own standard deviations: groups of 64, 64 and 2 features, their mean in eighths."""
    y = torch.randn(WINDOWS, LENGTH, 130, generator=torch.Generator().manual_seed(1))
    y *= torch.exp(torch.randn(WINDOWS, LENGTH, 1, generator=torch.Generator().manual_seed(2)) / 4)
    squares = []
    for window in y.double().numpy():
        v = abs(window - window.mean(0)) / window.std(0)
        largest = np.stack([v[:, :64].max(1), v[:, 64:128].max(1), v[:, 128:].max(1)])
        eighths = np.floor(np.round(8 * np.log2(largest)).mean(0) + 0.5)
        least = np.round(8 * np.log2(largest.max(0))) - 1  # of 130 coded features
        squares.append(4 ** (np.maximum(eighths, least) / 8))
    crest = observed(y).crest
    assert crest is not None and crest.shape == (1,)
    np.testing.assert_allclose(crest.item(), np.sqrt(np.mean(squares)), rtol=1e-6)


def test_usual_tokens_count_as_they_are():
    y = partial_sums(1.0)
    r = observed(y)
    assert r.std is not None
    expected = y.double().reshape(-1, FEATURES).std(0, correction=0)
    torch.testing.assert_close(r.std[0], expected.float(), rtol=1e-6, atol=0)


def test_a_window_of_mostly_zeros_keeps_what_is_not():
    y = partial_sums(1.0)
    y[:, LENGTH // 4 :] = 0
    r = observed(y)
    assert r.std is not None
    expected = y.double().reshape(-1, FEATURES).std(0, correction=0)
    torch.testing.assert_close(r.std[0], expected.float(), rtol=1e-6, atol=0)


def test_padding_has_no_say_in_the_median():
    y, mask = partial_sums(100.0), torch.ones(WINDOWS, LENGTH, dtype=torch.bool)
    padded = torch.cat([y, torch.full((WINDOWS, 3 * LENGTH, FEATURES), 1e6)], dim=1)
    shorter, longer = (
        observed(y, mask),
        observed(padded, torch.cat([mask, torch.zeros(WINDOWS, 3 * LENGTH) > 0], dim=1)),
    )
    assert shorter.std is not None and longer.std is not None
    torch.testing.assert_close(longer.std, shorter.std, rtol=1e-6, atol=0)


def test_the_other_tokens_survive_a_huge_first_one():
    """What they would have without that token, to 1 dB: it adds 1/40 * 16 = 40 % to the squares at most, 1.5 dB in the
    features that it is strongest in and nothing elsewhere. As plain moments they would lose more than 10 dB."""

    def noise_db(first: float, plain: bool) -> float:
        partials = torch.stack([partial_sums(first), partial_sums(first).flip(-1)])
        stats = {1: {"": observed(partials.sum(0))}, 2: {}}
        both = [observed(p) for p in partials]
        fields = [torch.cat([getattr(r, key) for r in both]) for key in ("min_vals", "max_vals", "mean", "std")]
        if plain:
            flat = partials.reshape(2, -1, FEATURES)
            fields[2:] = [flat.mean(1), flat.std(1, correction=0)]
        stats[2][""] = type(both[0])(*fields)
        plan = build_plan(CalibrationStats(stats, {}), 2, CommConfig(allocation="uniform", bf16_fraction=0))
        flat = partials.reshape(2, -1, FEATURES)
        got = VirtualReducer(plan.sites[""], "one_shot").all_reduce(list(flat)).reshape(WINDOWS, LENGTH, FEATURES)
        error, exact = (got - partials.sum(0))[:, 1:], partials.sum(0)[:, 1:]
        return (10 * torch.log10(exact.square().sum() / error.square().sum())).item()

    alone = noise_db(1.0, plain=False)
    assert noise_db(100.0, plain=False) > alone - 1
    assert noise_db(100.0, plain=True) < alone - 5
