"""Ranges of the partial sums of a group's row-parallel linears, for the communication plans.

The shards of a linear (shard_groups.py) are added to the partial sums of every tensor-parallel size that is asked for,
so one pass records the ranges of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.observers import RangeObserver, SharedSteps
from megatron_lowbit.comm.plan import CalibrationStats, Ranges
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.qllm.block_group import BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.shard_groups import partial_sums
from megatron_lowbit.qllm.sharded_linear import ShardedLinear


@torch.no_grad()
def record_ranges(
    group: BlockGroup,
    share: CalibrationShare,
    inputs: HiddenStream,
    outputs: HiddenStream | None,
    sizes: Iterable[int],
    config: QuantizeConfig,
) -> Ranges:
    """Run the quantized stream through the group and return its ranges, {tp_size: {linear's fqn: FeatureRange}}.

    inputs: the stream before the group; outputs: where the hidden states after it go, or None. sizes: the
    tensor-parallel sizes, 1 for the full sum. All ranks of the data-parallel group return the same.
    """
    observed = ObservedSums(sizes, share, config)
    linears = group.row_parallel_linears()
    for linear in linears:
        linear.observer = observed.observer_of(linear)
    for start, stop, mask in share.batches():
        observed.mask = mask
        hidden = group.forward(inputs.read(start, stop, share.device))
        if outputs is not None:
            outputs.write(start, hidden)
    for linear in linears:
        linear.observer = None
    return observed.ranges(linears)


class ObservedSums:
    """Observe the partial sums of linears at several tensor-parallel sizes, over the windows of all ranks.

    mask: bool [windows, length], of the batch that runs.
    """

    def __init__(self, sizes: Iterable[int], share: CalibrationShare, config: QuantizeConfig):
        self.sizes, self.dp_group = list(sizes), share.dp_group
        self.gamma, self.histograms = config.calibration.ema_gamma, config.comm.clipping == "histogram"
        self.observers: dict[str, dict[int, RangeObserver]] = {}
        self.steps = SharedSteps(share.dp_group, interleaved=True)
        self.mask = torch.empty(0, dtype=torch.bool)

    def observer_of(self, linear: ShardedLinear) -> Callable[[Sequence[Tensor]], None]:
        """Return what a forward of `linear` calls with the outputs of all its shards, [windows, length, features]."""

        def observe(parts: Sequence[Tensor]) -> None:
            features, device = parts[0].shape[-1], parts[0].device
            if linear.name not in self.observers:
                self.observers[linear.name] = {
                    size: RangeObserver(size, features, self.gamma, device, self.histograms) for size in self.sizes
                }
            sums = [partial_sums(parts, size) for size in self.sizes]
            observers = list(self.observers[linear.name].values())
            self.steps.observe(f"{linear.name} puts out", observers, sums, self.mask)

        return observe

    def ranges(self, linears: Iterable[ShardedLinear]) -> Ranges:
        """Return {tp_size: {linear's fqn: FeatureRange}}. A collective call over the data-parallel group."""
        self.steps.finish()
        found: Ranges = {size: {} for size in self.sizes}
        for linear in linears:
            for size, observer in self.observers[linear.name].items():
                found[size][linear.name] = observer.feature_range(dp_group=self.dp_group)
        return found


def attach_reducers(group: BlockGroup, ranges: Ranges, config: QuantizeConfig) -> None:
    """Have the group's row-parallel linears add their partial sums up as the planned low-bit collective will.

    ranges: {tp_size: {site: FeatureRange}} of all groups so far, this one included.
    """
    fingerprint: dict[str, Any] = {"weights": {}}
    size = max(config.virtual_tp, config.tp)
    plan = build_plan(CalibrationStats(ranges, fingerprint), size, config.comm, config.seed)
    for linear in group.row_parallel_linears():
        linear.reducer = VirtualReducer(plan.sites[linear.name])
