"""How good a model is: perplexity, KL divergence to full precision, SQNR per site, and what it sends.

    perplexity   exp( -mean_t log p(x_t | x_<t) )             over all real tokens but the first of each window
    KL           mean_t sum_v p_t(v) log( p_t(v) / q_t(v) )   nats; p full precision, q the model measured
    SQNR         10 log10( sum y^2 / sum (y^ - y)^2 )         dB; y what the replaced linear puts out for the same input

All sums are float64. `model` is anything callable as model(input_ids=...) that returns logits [windows, length, vocab].
It runs without gradients, but not in inference mode: what a model keeps for its next call would be lost to training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError

Batch = tuple[Tensor, Tensor]
CHUNK = 128  # tokens whose log-probabilities are in memory at a time


@dataclass(frozen=True)
class WindowSums:
    """What one pass sums up over each window.

    nll, kl: of every window (sum over its tokens, their number), for KL those that are measured. log_probs: the first
    tokens' log-probabilities float32 [tokens, vocab].
    """

    nll: list[tuple[float, int]]
    kl: list[tuple[float, int]]
    log_probs: Tensor


@dataclass(frozen=True)
class Quality:
    """The figures of one pass; log_probs holds the first tokens' log-probabilities float32 [tokens, vocab].

    perplexity_stderr, kl_stderr: standard errors over the windows (stderr_of_ratio); None for fewer than two windows.
    kl_windows: of every window the sum of KL over its measured tokens, and their number.
    """

    perplexity: float
    kl: float | None
    tokens: int
    log_probs: Tensor
    perplexity_stderr: float | None = None
    kl_stderr: float | None = None
    kl_windows: tuple[tuple[float, int], ...] = ()


def measure_quality(model: Any, batches: Iterable[Batch], kl_tokens: int, reference: Tensor | None = None) -> Quality:
    """Measure the perplexity over all batches, and KL against `reference`, the log_probs of the full-precision model,
    with their standard errors over windows."""
    return summarize(measure_windows(model, batches, kl_tokens, reference))


@torch.no_grad()
def measure_windows(
    model: Any, batches: Iterable[Batch], kl_tokens: int, reference: Tensor | None = None
) -> WindowSums:
    """Run the model over all batches and sum up over each window, as measure_quality says."""
    nll: list[tuple[float, int]] = []  # per window: sum over its tokens, and their number
    kl: list[tuple[float, int]] = []
    tokens, kept = 0, torch.empty(0)
    for ids, mask in batches:
        # A few tokens at a time: float32 log-probabilities of a whole batch may not fit beside the model.
        for logits, window, real in zip(model(input_ids=ids).logits, ids, mask, strict=True):
            targets = window[real].to(logits.device)[1:]
            rows = real.to(logits.device).nonzero().flatten()[:-1]
            loss, divergence, measured = 0.0, 0.0, 0
            for some, words in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
                log_probs = logits[some].float().log_softmax(-1)
                loss -= log_probs.gather(1, words.unsqueeze(1)).double().sum().item()
                part = log_probs[: max(kl_tokens - tokens, 0)].cpu()
                if reference is None and len(part):
                    if tokens == 0:  # allocated once: at 128k words of vocabulary these are gigabytes
                        kept = part.new_empty(kl_tokens, part.shape[1])
                    kept[tokens : tokens + len(part)] = part
                elif reference is not None and len(part):
                    full = reference[tokens : tokens + len(part)]
                    divergence += (full.exp() * (full - part)).sum(dtype=torch.float64).item()
                    measured += len(part)
                tokens += len(some)
            nll.append((loss, len(rows)))
            kl.append((divergence, measured))
    return WindowSums(nll, kl, kept[: min(tokens, kl_tokens)])


def summarize(sums: WindowSums) -> Quality:
    """Return the figures of all windows.

    perplexity = exp(m) of the mean loss m, so by the delta method its standard error is perplexity * se(m). Raises
    LowBitError where that is not finite.
    """
    nll, kl = sums.nll, sums.kl
    mean_nll, error = stderr_of_ratio(nll)
    if not math.isfinite(mean_nll):
        raise LowBitError("the model's logits hold NaN or Inf; check its weights, dtype and quantization scheme")
    perplexity = math.exp(mean_nll)
    mean_kl, kl_error = stderr_of_ratio(kl) if any(count for _, count in kl) else (None, None)
    perplexity_error = None if error is None else perplexity * error
    tokens = sum(count for _, count in nll)
    return Quality(perplexity, mean_kl, tokens, sums.log_probs, perplexity_error, kl_error, tuple(kl))


def stderr_of_ratio(windows: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """Return the mean per token of sums over windows, and its standard error; None for fewer than two windows.

    windows: (sum s_w, number n_w of tokens) of each; those without tokens do not count. The mean is the ratio
    m = sum_w s_w / sum_w n_w of two sums over W windows, and by the delta method

        se(m)^2 = W / (W - 1) * sum_w (s_w - m n_w)^2 / (sum_w n_w)^2

    which is the usual standard error of a mean where all windows are of the same length. Neighbouring windows of one
    text are taken as independent. Sums are exact, so that the order of the windows does not matter.
    """
    counted = [(total, count) for total, count in windows if count]
    tokens = sum(count for _, count in counted)
    mean = math.fsum(total for total, _ in counted) / tokens
    if len(counted) < 2:
        return mean, None
    squares = math.fsum((total - mean * count) ** 2 for total, count in counted)
    return mean, math.sqrt(len(counted) / (len(counted) - 1) * squares) / tokens


@torch.no_grad()
def measure_sqnr(model: Any, pairs: Mapping[str, tuple[Any, Any]], batches: Iterable[Batch]) -> dict[str, float]:
    """Measure the SQNR in dB of every low-bit row-parallel linear that is in place, against the module it replaced.

    pairs: {fqn: (the one in place, the one it replaced)}, both [windows, length, in] -> [windows, length, out]. Both
    get the same input, so the figure is the site's own error: its weights', activations' and collective's.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    mask = torch.empty(0, dtype=torch.bool)

    def compare(name: str, original: Any):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask.to(output.device)
            parked = next(original.parameters()).device
            exact = original.to(output.device)(inputs[0])[real].double()
            original.to(parked)
            signal[name] = signal.get(name, 0.0) + exact.square().sum().item()
            noise[name] = noise.get(name, 0.0) + (output[real].double() - exact).square().sum().item()

        return hook

    handles = [m.register_forward_hook(compare(name, original)) for name, (m, original) in pairs.items()]
    try:
        for ids, mask in batches:  # noqa: B007 (the hooks read mask)
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sqnr_db(signal[name], noise[name]) for name in signal}


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB of two energies; 300 where the noise is below float64's
    reach."""
    if noise <= signal * 1e-30:
        return 300.0
    return 10 * math.log10(signal / noise) if signal > 0 else -300.0


class SiteTraffic:
    """Context manager: bytes that the host's own row-parallel linears hand to their all-reduce (unpatched models)."""

    def __init__(self, sites: Mapping[str, Any]):
        self.sites = sites
        self.bytes = 0
        self.values = 0

    def __enter__(self) -> SiteTraffic:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.bytes += output.nbytes
            self.values += output.numel()

        self._handles = [module.register_forward_hook(hook) for module in self.sites.values()]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
