"""Partial sums with outliers that small models lack, as a synthetic test bed of collectives.

    first token x100     the partial sums of every window's first token (large models put attention sinks there)
    1 % of features x50  those of a few output features, the same at all sites (outlier channels of a residual stream)

A partial sum is linear in its input and in its weight, so scaling either scales it. The model itself runs as it is: at
each row-parallel linear the scaled partial sums are made beside it, in calibration as in the measurement, and every
reducer under test adds up the same ones. There is no perplexity to measure, only the SQNR of the sum.

The outliers have nearly all of the energy, so that SQNR is theirs. unscaled_sqnr_db is of the other values alone: what
is left of the usual tokens, or features, beside the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, EvaluateConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import calibrate_engine
from megatron_lowbit.launch.rows import sqnr_windows
from megatron_lowbit.quality import Batch, sqnr_db
from megatron_lowbit.runtime.metrics import MetricLogger

FIRST_TOKEN = 100.0
FEATURES, SHARE = 50.0, 0.01
MakeReducer = Callable[[str], VirtualReducer]


class ScaledSite:
    """A row-parallel linear whose partial sums calibration sees scaled; the linear itself stays.

    weight [features, in_features]; bias None. token: factor of every window's first token; features: of the output
    features, float32 [features].
    """

    bias = None

    def __init__(self, linear: Any, token: float, features: Tensor):
        self.linear, self.token, self.features = linear, token, features
        self.weight = linear.weight * features.to(linear.weight)[:, None]

    def register_forward_hook(self, hook: Callable[..., None]) -> Any:
        """Call hook(this, (scaled x,), scaled output) after every call of the linear."""

        def scaled(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].clone()
            x[:, 0] *= self.token
            hook(self, (x,), F.linear(x, self.weight))

        return self.linear.register_forward_hook(scaled)

    def unscaled(self, y: Tensor) -> Tensor:
        """Return the values of y [windows, length, features] that are as the linear makes them, the others 0."""
        y = y * (self.features == 1).to(y)
        if self.token != 1:
            y[:, 0] = 0
        return y


def scaled_sites(linears: Mapping[str, Any], seed: int) -> dict[str, dict[str, ScaledSite]]:
    """Return {test bed: {fqn: site}}."""
    some = next(iter(linears.values())).weight.shape[0]
    chosen = torch.randperm(some, generator=torch.Generator().manual_seed(seed))[: max(1, round(SHARE * some))]
    ones = torch.ones(some)
    beds = {
        f"first token x{FIRST_TOKEN:g}": (FIRST_TOKEN, ones),
        f"{SHARE:.0%} of features x{FEATURES:g}": (1.0, ones.index_fill(0, chosen, FEATURES)),
    }
    return {bed: {name: ScaledSite(linear, *how) for name, linear in linears.items()} for bed, how in beds.items()}


def synthetic_rows(
    engine: Engine,
    makers: Callable[[CalibrationStats], Mapping[str, MakeReducer]],
    windows: Windows,
    config: EvaluateConfig,
    logger: MetricLogger,
) -> Iterator[dict[str, Any]]:
    """Return a row for every test bed and variant, on the windows that SQNR is measured on elsewhere.

    makers: from what calibration saw of a test bed to {variant: makes the reducer of a site}. The engine is unpatched.
    """
    for bed, sites in scaled_sites(engine.sites(), config.seed).items():
        stats = calibrate_engine(engine, config.calibration, [config.virtual_tp], logger, CommConfig(), sites)
        reducers = {name: {site: make(site) for site in sites} for name, make in makers(stats).items()}
        batches = sqnr_windows(windows).batches(config.evaluation.batch_size)
        measured = measure_reducers(engine, sites, reducers, batches, config.virtual_tp)
        for name, by_site in measured.items():
            traffic = [reducer.traffic for reducer in reducers[name].values()]
            sqnr, unscaled = (sum(both) / len(sites) for both in zip(*by_site.values(), strict=True))
            label = f"synthetic, {bed}: {name}"
            logger.log(row=label, sqnr_db=sqnr)
            yield {
                "name": label,
                "tp": config.virtual_tp,
                "weights": "none",
                "communication": name,
                "perplexity": None,
                "kl": None,
                "bits_per_value": 8 * sum(t.bytes for t in traffic) / sum(t.values for t in traffic),
                "sqnr_db": sqnr,
                "unscaled_sqnr_db": unscaled,
                "sites": {site: both[0] for site, both in by_site.items()},
            }


@torch.inference_mode()
def measure_reducers(
    model: Callable[..., Any],
    sites: Mapping[str, ScaledSite],
    reducers: Mapping[str, Mapping[str, VirtualReducer]],
    batches: Iterable[Batch],
    ranks: int,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Measure {variant: {fqn: SQNR in dB of all values, and of the unscaled ones}} of reducers {variant: {fqn: ...}},
    all fed with the same partial sums."""
    signal = {site: torch.zeros(2, dtype=torch.float64) for site in sites}  # energy of all values, of unscaled ones
    noise = {name: {site: torch.zeros(2, dtype=torch.float64) for site in sites} for name in reducers}
    mask = torch.empty(0, dtype=torch.bool)

    def compare(site: str) -> Callable[..., None]:
        def hook(module: ScaledSite, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask.to(output.device)
            slices = zip(inputs[0].chunk(ranks, -1), module.weight.chunk(ranks, 1), strict=True)
            partials = [F.linear(x_r, w_r) for x_r, w_r in slices]
            exact = torch.stack(partials).double().sum(0)
            signal[site] += energies(module, exact, real)
            for name, own in reducers.items():
                noise[name][site] += energies(module, own[site].all_reduce(partials) - exact, real)

        return hook

    def energies(site: ScaledSite, y: Tensor, real: Tensor) -> Tensor:
        return torch.stack([part[real].square().sum() for part in (y, site.unscaled(y))]).cpu()

    handles = [site.register_forward_hook(compare(name)) for name, site in sites.items()]
    try:
        for ids, mask in batches:  # noqa: B007 (the hooks read mask)
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()

    def ratios(site: str, of: Tensor) -> tuple[float, float]:
        (every, unscaled), (noise_of_all, noise_of_unscaled) = signal[site].tolist(), of.tolist()
        return sqnr_db(every, noise_of_all), sqnr_db(unscaled, noise_of_unscaled)

    return {name: {site: ratios(site, of) for site, of in by.items()} for name, by in noise.items()}
