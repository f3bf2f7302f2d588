"""Perplexity and KL of a stub model, and their standard errors over windows, against NumPy in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lowbit.quality import CHUNK, measure_quality, stderr_of_ratio

VOCAB, LENGTH = 11, CHUNK + 30  # windows of more than one chunk


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Six windows, of which one is shorter and one holds a single token, which nothing predicts."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, VOCAB, (6, LENGTH), generator=generator), torch.ones(6, LENGTH, dtype=torch.bool)
    mask[3, 40:], mask[5, 1:] = False, False
    return ids, mask


def stub(seed: int) -> Any:
    """A model whose logits depend on the token alone."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    return lambda input_ids: SimpleNamespace(logits=table[input_ids]), table.double().log_softmax(-1).numpy()


def ratio_of_means(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) of a ratio of means, in the textbook's form (Cochran, Sampling Techniques, eq. 6.9, for
    an infinite population): se^2 = var(s - m n) / (W nbar^2)."""
    mean = sums.sum() / counts.sum()
    return mean, math.sqrt(np.var(sums - mean * counts, ddof=1) / len(sums)) / counts.mean()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kl_tokens", [CHUNK + 200, 10**6])
def test_against_numpy(batch, kl_tokens):
    (full, p), (model, q) = stub(1), stub(2)
    ids, mask = text()
    batches = list(zip(ids.split(batch), mask.split(batch), strict=True))
    reference = measure_quality(full, batches, kl_tokens)
    quality = measure_quality(model, batches, kl_tokens, reference.log_probs)
    losses, divergences, left = [], [], kl_tokens
    for window, real in zip(ids, mask, strict=True):
        tokens = window[real].numpy()
        losses.append(-q[tokens[:-1], tokens[1:]])
        seen = tokens[:-1][:left]
        divergences.append((np.exp(p[seen]) * (p[seen] - q[seen])).sum(-1))
        left -= len(seen)
    sums, counts = (np.array([f(loss) for loss in losses[:5]]) for f in (np.sum, len))
    mean, error = ratio_of_means(sums, counts)
    # Log-probabilities are float32: 2^-24 of values near 1, of which the sums are float64.
    assert quality.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert quality.perplexity_stderr == pytest.approx(math.exp(mean) * error, rel=1e-5)
    seen_kl = [d for d in divergences if len(d)]
    sums, counts = (np.array([f(d) for d in seen_kl]) for f in (np.sum, len))
    mean, error = ratio_of_means(sums, counts)
    assert quality.kl == pytest.approx(mean, rel=1e-5)
    assert quality.kl_stderr == pytest.approx(error, rel=1e-5)
    assert quality.tokens == sum(len(loss) for loss in losses)
    assert len(reference.log_probs) == min(kl_tokens, quality.tokens) and reference.kl is None


def test_windows_of_one_length_have_the_usual_error_of_a_mean():
    values = np.array([1.0, 4.0, 2.5, 3.0])
    mean, error = stderr_of_ratio([(10 * value, 10) for value in values])
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))


def test_one_window_has_no_error():
    ids, mask = text()
    quality = measure_quality(stub(1)[0], [(ids[:1], mask[:1])], 0)
    assert quality.perplexity_stderr is None and quality.kl_stderr is None
    assert stderr_of_ratio([(3.0, 2), (0.0, 0)]) == (1.5, None)


def test_the_error_tells_how_far_other_text_may_be():
    """About 95 % of 400 texts of 30 windows have a mean within two standard errors of the truth (a t with 29 degrees
    of freedom: 94.5 %; its own error over 400 texts is 1.1 points, so 4 of them are the bounds)."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        counts = generator.integers(50, 150, 30)
        sums = counts * (2.0 + generator.normal(0, 0.3, 30))
        mean, error = stderr_of_ratio(list(zip(sums.tolist(), counts.tolist(), strict=True)))
        assert error is not None
        hits += abs(mean - 2.0) < 2 * error
    assert 0.90 < hits / 400 < 0.99
