"""Calibration: one pass over token batches records the ranges that the collective quantizes with (arXiv 2411.07942).

What is recorded, and why, stands in observers.py; this is the pass itself:

    1. `SiteObservers` makes an observer for every row-parallel linear (and every input that is asked for), at every
       tensor-parallel size
    2. `attached`: forward hooks on the linears hand them the partial sums while the model runs over the batches
    3. `ranges` reads them, and exchanges them between ranks and pipeline stages

The ranks are those of the tensor-parallel group, or virtual ones: a process that holds in_features / R inputs computes
the partial sums of t / R ranks by slicing them, for every t in tp_sizes. So the ranges of TP=8 can be calibrated in one
process.

Data-parallel ranks share the windows of every batch; their minima and maxima are exchanged and averaged in the order of
the windows, so the ranges are those of one process. Pipeline stages each observe their own sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.comm.observers import RangeObserver, SharedSteps
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange, Ranges
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.runtime.distributed import all_gather_values, world_size


@dataclass(frozen=True)
class ParallelGroups:
    """Name the process groups of this rank: tensor-, data- and pipeline-parallel; None where there is one rank."""

    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None


class ResumableState(Protocol):
    """Save the state of a pass that may be preempted.

    tensors: what the observers held when it was saved, named {tp_size}|{site}|{field}; empty for a fresh pass.
    """

    tensors: dict[str, Tensor]

    def after_batch(self, observer_tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Count a batch; save what `observer_tensors` returns where that is due. May raise Preempted after saving."""


def calibrate(
    model: Callable[..., Any],
    sites: Mapping[str, Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    tp_sizes: Iterable[int],
    fingerprint: Fingerprint,
    gamma: float = 0.01,
    *,
    histograms: bool = False,
    inputs: Mapping[str, Any] | None = None,
    groups: ParallelGroups | None = None,
    state: ResumableState | None = None,
) -> CalibrationStats:
    """Run `model` over `batches` and return the ranges of the partial sums at `sites`.

    model: called as model(input_ids=ids). sites: {fqn: row-parallel linear} with attributes weight [features, local
    in_features] and bias (or None), whose output is the full sum. batches: (ids int64 [windows, length], mask bool
    [windows, length], True on real tokens), the same number of windows on all ranks of groups.dp. tp_sizes: multiples
    of the size of groups.tp. gamma: the weight of a window in the moving averages. histograms: also find clipped ranges
    (clipping.py). inputs: {fqn: column-parallel linear} whose input's ranges are wanted too, recorded under tp_size 1.
    state: of a pass that was preempted, of which `batches` are the rest.

    Returns the same statistics on all ranks of all groups. Raises LowBitError for sizes that the inputs of a site
    cannot be shared among, for NaN or Inf (naming the layer), and where there are no sites or no batches.
    """
    saved = state.tensors if state is not None else {}
    observers = SiteObservers(sites, tp_sizes, gamma, histograms, groups or ParallelGroups(), saved)
    mask = torch.empty(0, dtype=torch.bool)
    # Not in inference mode: what the model keeps has to be fit for training.
    with observers.attached(inputs or {}, lambda: mask), torch.no_grad():
        for ids, mask in batches:  # noqa: B007 (the hooks read mask)
            model(input_ids=ids)
            if state is not None:
                state.after_batch(observers.tensors)
        observers.finish()
    return CalibrationStats(observers.ranges(), fingerprint)


class SiteObservers:
    """Keep a RangeObserver per tensor-parallel size and site; size 1 stands for the full sum (and for inputs).

    sites: {fqn: row-parallel linear}; tp_sizes: multiples of the size of groups.tp; gamma, histograms: of every
    RangeObserver; saved: what `tensors` returned in the pass that is continued, or nothing. Raises LowBitError for
    sizes that the inputs of a site cannot be shared among, and where there are no sites.
    """

    def __init__(
        self,
        sites: Mapping[str, Any],
        tp_sizes: Iterable[int],
        gamma: float,
        histograms: bool,
        groups: ParallelGroups,
        saved: Mapping[str, Tensor],
    ):
        self.sites, self.gamma, self.histograms, self.groups, self.saved = sites, gamma, histograms, groups, saved
        self.ranks, self.sizes = world_size(groups.tp), sorted(set(tp_sizes))
        check_sizes(sites, self.sizes, self.ranks)
        self.observers: dict[int, dict[str, RangeObserver]] = {size: {} for size in (1, *self.sizes)}
        self.steps = SharedSteps(groups.dp)
        for name, linear in sites.items():
            features, device = linear.weight.shape[0], linear.weight.device
            for size in self.observers:
                self._add(size, name, max(size // self.ranks, 1), features, device)

    def _add(self, size: int, name: str, ranks: int, features: int, device: torch.device) -> RangeObserver:
        """Make the observer of a site, with what was saved of it."""
        observer, start = RangeObserver(ranks, features, self.gamma, device, self.histograms), f"{size}|{name}|"
        observer.load({key.removeprefix(start): t for key, t in self.saved.items() if key.startswith(start)})
        self.observers[size][name] = observer
        return observer

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the observers hold, {tp_size|site|field: tensor}, to be saved."""
        self.finish()
        return {f"{size}|{name}|{key}": t for size, name, o in self._each() for key, t in o.tensors().items()}

    def finish(self) -> None:
        """Wait for the steps that are still under way."""
        self.steps.finish()

    def _each(self) -> Iterator[tuple[int, str, RangeObserver]]:
        for size, by_site in self.observers.items():
            for name, observer in by_site.items():
                yield size, name, observer

    @contextmanager
    def attached(self, inputs: Mapping[str, Any], mask: Callable[[], Tensor]) -> Iterator[None]:
        """Observe forwards of the sites, and of the linears in `inputs`, inside the context.

        mask(): bool [windows, length] of the batch that runs.
        """

        def observe_output(name: str):
            def hook(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
                parts = self._partial_sums(linear, args[0], output)
                observers = [by_site[name] for by_site in self.observers.values()]
                self.steps.observe(f"{name} puts out", observers, parts, mask().to(output.device))

            return hook

        def observe_input(name: str):
            def hook(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0]
                observer = self.observers[1].get(name)
                if observer is None:  # its width is known from here on
                    observer = self._add(1, name, 1, x.shape[-1], x.device)
                self.steps.observe(f"{name} reads", [observer], [[x]], mask().to(x.device))

            return hook

        handles = [linear.register_forward_hook(observe_output(name)) for name, linear in self.sites.items()]
        handles += [linear.register_forward_hook(observe_input(name)) for name, linear in inputs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _partial_sums(self, linear: Any, x: Tensor, output: Tensor) -> list[list[Tensor]]:
        """Return, for tp_size 1 and every other size, its (virtual) ranks' Y_i = X_i W_i^T, without bias.

        x: [..., local in_features]; output: the full sum, with bias, [..., features].
        """
        parts = [[output if linear.bias is None else output - linear.bias]]
        for size in self.sizes:
            shards = (t.chunk(size // self.ranks, dim) for t, dim in ((x, -1), (linear.weight, 1)))
            parts.append([F.linear(x_i, w_i) for x_i, w_i in zip(*shards, strict=True)])
        return parts

    def ranges(self) -> Ranges:
        """Return {tp_size: {site: FeatureRange}} of all ranks and pipeline stages. A collective call.

        Raises LowBitError where nothing was observed.
        """
        if next(iter(self.observers[1].values())).steps == 0:
            raise LowBitError("calibration: no batch was given; give more text in calibration.data")
        found: Ranges = {size: {} for size in self.observers}
        for size, name, observer in self._each():
            found[size][name] = observer.feature_range(self.groups.tp if size > 1 else None, self.groups.dp)
        return found if self.groups.pp is None else join_stages(found, self.groups.pp)


def check_sizes(sites: Mapping[str, Any], sizes: Iterable[int], ranks: int) -> None:
    """Raise LowBitError where `ranks` ranks cannot stand for one of `sizes`, or there is no site."""
    for size in sizes:
        if size % ranks:
            raise LowBitError(f"comm.tp_sizes: {size} is no multiple of the {ranks} ranks that calibrate")
    if not sites:
        raise LowBitError("calibration: the model has no row-parallel linears")
    for name, linear in sites.items():
        for size in sizes:
            if linear.weight.shape[1] % (size // ranks):
                inputs = linear.weight.shape[1] * ranks
                raise LowBitError(f"comm.tp_sizes: {size} ranks cannot share the {inputs} inputs of {name} equally")


def join_stages(ranges: Ranges, pp_group: dist.ProcessGroup) -> Ranges:
    """Return the ranges of all pipeline stages' sites, on every stage. A collective call."""
    mine = {str(size): {name: vars(r) for name, r in by_site.items()} for size, by_site in ranges.items()}
    stages = all_gather_values(mine, pp_group)
    return {
        size: {name: FeatureRange(**r) for stage in stages for name, r in stage[str(size)].items()} for size in ranges
    }
