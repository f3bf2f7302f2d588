"""Calibration: one pass over token batches records the ranges that the collective quantizes with (arXiv 2411.07942).

At every row-parallel site, for each rank i and output feature j, over the batches t of the pass:

    m_ij <- (1 - gamma) m_ij + gamma min_tokens(Y_i[:, j])      Y_i = X_i W_i^T, rank i's partial sum, without bias
    M_ij <- (1 - gamma) M_ij + gamma max_tokens(Y_i[:, j])      the first batch initialises; padding tokens are left out

and the same for the full sum (recorded as tp_size 1). The ranks are those of `tp_group`, or virtual ones: a process that
holds in_features / R inputs computes the partial sums of t / R ranks by slicing them, for every t in tp_sizes. So the
ranges of TP=8 can be calibrated in one process. Only running statistics are kept, never activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.artifacts import CalibrationStats, FeatureRange, Fingerprint
from megatron_lowbit.config import LowBitError
from megatron_lowbit.distributed import all_gather_stack, group_size


class RangeObserver:
    """Running EMA of per-feature ranges of `ranks` local partial sums: min_vals, max_vals float32 [ranks, features]."""

    def __init__(self, ranks: int, features: int, gamma: float, device: torch.device):
        self.gamma = gamma
        self.batches = 0
        self.min_vals = torch.zeros(ranks, features, device=device)
        self.max_vals = torch.zeros(ranks, features, device=device)

    def update(self, rank: int, y: Tensor) -> None:
        """y: [tokens, features], one batch of local rank `rank`; call for rank 0, 1, ... in turn."""
        weight = 1.0 if self.batches == 0 else self.gamma
        self.min_vals[rank].lerp_(y.amin(0).float(), weight)
        self.max_vals[rank].lerp_(y.amax(0).float(), weight)
        self.batches += rank == len(self.min_vals) - 1


def calibrate(
    model: nn.Module,
    sites: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    tp_sizes: Iterable[int],
    fingerprint: Fingerprint,
    gamma: float = 0.01,
    tp_group: dist.ProcessGroup | None = None,
) -> CalibrationStats:
    """Run `model` over `batches` of (ids, mask) [windows, length] and return the ranges at `sites`.

    sites: {fqn: row-parallel linear} with attributes weight [features, local in_features] and bias (or None), whose
    output is the full sum. tp_sizes: multiples of the group's size. All ranks of tp_group return the same statistics.
    Raises LowBitError naming the layer where NaN or Inf appears.
    """
    world = group_size(tp_group)
    sizes = sorted(set(tp_sizes))
    for size in sizes:
        if size % world:
            raise LowBitError(f"comm.tp_sizes: {size} is no multiple of the {world} ranks that calibrate")
    observers: dict[int, dict[str, RangeObserver]] = {size: {} for size in (1, *sizes)}
    for name, module in sites.items():
        features, device = module.weight.shape[0], module.weight.device
        for size in observers:
            observers[size][name] = RangeObserver(max(size // world, 1), features, gamma, device)
    mask = torch.empty(0, dtype=torch.bool)

    def observe(name: str):
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask.to(output.device)
            full_sum = output[real] if module.bias is None else output[real] - module.bias
            if not torch.isfinite(full_sum).all():
                raise LowBitError(f"calibration: {name} puts out NaN or Inf; check the model's weights and dtype")
            observers[1][name].update(0, full_sum)
            x = inputs[0][real]
            for size in sizes:
                local = size // world
                for rank, (x_i, w_i) in enumerate(zip(x.chunk(local, 1), module.weight.chunk(local, 1), strict=True)):
                    observers[size][name].update(rank, F.linear(x_i, w_i))

        return hook

    handles = [module.register_forward_hook(observe(name)) for name, module in sites.items()]
    try:
        with torch.inference_mode():
            for ids, mask in batches:  # noqa: B007 (the hooks read mask)
                model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    first = next(iter(observers[1].values()))
    if first.batches == 0:
        raise LowBitError("calibration: no batch was given; give more text in calibration.data")
    ranges: dict[int, dict[str, FeatureRange]] = {}
    for size, by_site in observers.items():
        ranges[size] = {}
        for name, observer in by_site.items():
            low, high = observer.min_vals, observer.max_vals
            if size > 1:
                low, high = (all_gather_stack(t, tp_group).flatten(0, 1) for t in (low, high))
            ranges[size][name] = FeatureRange(low.cpu(), high.cpu())
    return CalibrationStats(ranges, fingerprint)
