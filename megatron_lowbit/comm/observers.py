"""Calibration: one pass over token batches records the ranges that the collective quantizes with (arXiv 2411.07942).

At every row-parallel site, for each rank i and output feature j, over the windows of the pass:

    m_ij <- (1 - gamma) m_ij + gamma min_tokens(Y_i[:, j])      Y_i = X_i W_i^T, rank i's partial sum, without bias
    M_ij <- (1 - gamma) M_ij + gamma max_tokens(Y_i[:, j])      first window initialises; padding is left out

and likewise for the full sum (recorded as tp_size 1); besides, mean and standard deviation over all tokens, of which
rank-1 scales are made. A token whose root mean square is above LARGE times the window's median is scaled down to that
before it counts there: its own size travels with it, and the attention sink that every window begins with would else
decide on the features' proportions for all tokens. (On stories260K with that token 100 times as large, SQNR of the
others at TP=4 is 20.8 dB instead of 9.2; where there is no such token nothing changes.)
Their crest is recorded too, the root mean square of the tokens' sizes s_t (kernels/wire_format.py), each in the
standard deviations of its own window: the error of rank-1 codes is proportional to it.

One window is one step of the average however many go through the model at once, so calibration.batch_size changes the
speed, not the ranges. (A step over 16 windows takes their common, wider range, at a cost of 1.8 dB on stories260K.)

The ranks are those of `tp_group`, or virtual ones: a process that holds in_features / R inputs computes the partial
sums of t / R ranks by slicing them, for every t in tp_sizes. So the ranges of TP=8 can be calibrated in one process.
Only running statistics are kept, never activations.

Ranks of `dp_group` share the windows of every batch; their minima and maxima are exchanged and averaged in the order of
the windows, so the ranges are those of one process. Pipeline stages (`pp_group`) each observe their own sites.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.comm.clipping import WIDTHS, RunningHistogram
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.kernels import squared_sizes
from megatron_lowbit.runtime.distributed import all_gather_stack, all_gather_values, start_all_gather, world_size

STATISTICS = 6  # numbers per feature that window_statistics makes of a window
LARGE = 4.0  # times the median of the tokens' sizes; 2 does as well, and without a limit one token counts for 10,000


def as_windows(y: Tensor, mask: Tensor) -> Tensor:
    """y [windows, length, features], or flat [windows * length, features], in the first form; mask: bool [windows,
    length]."""
    return y if y.ndim == 3 else y.view(*mask.shape, y.shape[-1])


def window_statistics(y: Tensor, mask: Tensor) -> Tensor:
    """y [windows, length, features], mask bool [windows, length] -> float64 [windows, 6, features]: minimum and maximum
    of the real tokens; sum and sum of squares of them, none of them above LARGE times the median; their number; the sum
    of the squares of their sizes, in the window's own standard deviations.

    Window by window: one of a small model stays in the cache, all of a batch do not.
    """
    windows = zip(y.float(), mask, strict=True)
    return torch.stack([_statistics(window if real.all() else window[real]) for window, real in windows])


def _statistics(values: Tensor) -> Tensor:
    """float32 [tokens, features] -> float64 [6, features]; zeros where there are no tokens."""
    if len(values) == 0:
        return values.new_zeros(STATISTICS, values.shape[1], dtype=torch.float64)
    low, high, usual = values.amin(0), values.amax(0), values.double()
    size = torch.linalg.vector_norm(usual, dim=1)
    limit = LARGE * size.median()
    large = (size > limit) & (limit > 0)
    usual[large] *= (limit / size[large]).unsqueeze(1)
    total, square, count = usual.sum(0), usual.square().sum(0), len(values)
    mean = total / count
    spread = (square / count - mean.square()).clamp_min(0).sqrt()
    sizes = squared_sizes(usual, mean, spread).sum()
    rows = low.double(), high.double(), total, square, torch.full_like(total, count), sizes.expand_as(total)
    return torch.stack(rows)


class RangeObserver:
    """Running statistics per feature of `ranks` local partial sums: EMA of the ranges, mean and standard deviation.

    min_vals, max_vals: float32 [ranks, features]. histograms: also count values, for clipped ranges (clipping.py).
    """

    def __init__(self, ranks: int, features: int, gamma: float, device: torch.device, histograms: bool = False):
        self.gamma = gamma
        self.steps = 0
        self.min_vals = torch.zeros(ranks, features, device=device)
        self.max_vals = torch.zeros(ranks, features, device=device)
        # Sum, sum of squares, tokens, sum of the tokens' squared sizes.
        self.moments = torch.zeros(ranks, 4, features, dtype=torch.float64, device=device)
        self.histograms = [RunningHistogram(features, device) for _ in range(ranks)] if histograms else []

    def count(self, parts: Sequence[Tensor], mask: Tensor) -> None:
        """The histograms' share of a step: every data-parallel rank counts its own windows."""
        for histogram, y in zip(self.histograms, parts, strict=False):
            histogram.update(y[mask])

    def step(self, windows: Tensor) -> None:
        """Window after window, float64 [windows, ranks, 6, features]; one of padding only counts for nothing."""
        low, high = windows[:, :, 0].float(), windows[:, :, 1].float()
        for number, tokens in enumerate(windows[:, 0, 4, 0].tolist()):
            if tokens == 0:
                continue
            weight = self.gamma if self.steps else 1.0
            self.min_vals.lerp_(low[number], weight)
            self.max_vals.lerp_(high[number], weight)
            self.moments += windows[number, :, 2:]
            self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that was seen so far, for `load`."""
        found = {"steps": torch.tensor(self.steps), "min_vals": self.min_vals, "max_vals": self.max_vals}
        for rank, histogram in enumerate(self.histograms):
            found |= {f"{rank}/{name}": getattr(histogram, name) for name in ("counts", "exponent", "low", "high")}
        return found | {"moments": self.moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where the observer stopped that gave these tensors."""
        for name, value in tensors.items():
            rank, _, field = name.rpartition("/")
            owner = self.histograms[int(rank)] if rank else self
            setattr(owner, field, int(value) if field == "steps" else value.to(self.min_vals.device))

    def feature_range(
        self, tp_group: dist.ProcessGroup | None = None, dp_group: dist.ProcessGroup | None = None
    ) -> FeatureRange:
        """What was seen, of all ranks of tp_group, on the CPU. A collective call."""
        total, square, count, sizes = self.moments.unbind(1)
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        crest = (sizes / count)[:, 0].sqrt()
        local = [self.min_vals, self.max_vals, mean.float(), std.float(), crest.float()]
        if self.histograms:
            local.append(torch.stack([self._clipped(histogram, dp_group) for histogram in self.histograms]))
        return FeatureRange(*(all_gather_stack(t.contiguous(), tp_group).flatten(0, 1).cpu() for t in local))

    @staticmethod
    def _clipped(histogram: RunningHistogram, dp_group: dist.ProcessGroup | None) -> Tensor:
        """float32 [widths, 2, features]: low and high for each of clipping.WIDTHS."""
        histogram.merge_ranks(dp_group)
        return torch.stack([torch.stack(histogram.clipped_range(bits)) for bits in WIDTHS])


class SharedSteps:
    """Steps of observers whose windows the ranks of dp_group share; all of them take all windows' steps, in order.

    Exchanges run beside the forward: those of LAG calls are on their way, so no rank waits for the others at each site.
    interleaved: data-parallel rank r has every window i with i % ranks = r, not neighbouring ones.
    """

    LAG = 4

    def __init__(self, dp_group: dist.ProcessGroup | None, interleaved: bool = False):
        self.dp_group, self.interleaved = dp_group, interleaved
        self._pending: deque[tuple[str, Sequence[RangeObserver], dist.Work | None, Tensor]] = deque()

    def observe(
        self, what: str, observers: Sequence[RangeObserver], parts: Sequence[Sequence[Tensor]], mask: Tensor
    ) -> None:
        """A collective call. parts: for every observer its ranks' y [windows, length, features]; mask: bool [windows,
        length], True on real tokens. y may be flat [windows * length, features], as some MLPs have it. Here or later
        raises LowBitError where a part has NaN or Inf on any rank."""
        parts = [[as_windows(y, mask) for y in ys] for ys in parts]
        shares = torch.stack([window_statistics(y, mask) for ys in parts for y in ys], 1)  # [windows, all, 6, features]
        work, gathered = None, shares.unsqueeze(0)
        if self.dp_group is not None:
            work, gathered = start_all_gather(shares, self.dp_group)
        self._pending.append((what, observers, work, gathered))
        for observer, ys in zip(observers, parts, strict=True):
            observer.count(ys, mask)
        self.finish(self.LAG)

    def finish(self, but: int = 0) -> None:
        """Take the steps that are on their way, all `but` the newest."""
        while len(self._pending) > but:
            what, observers, work, gathered = self._pending.popleft()
            if work is not None:
                work.wait()
            windows = (gathered.transpose(0, 1) if self.interleaved else gathered).flatten(0, 1)
            if not torch.isfinite(windows[:, :, :2]).all():  # partial sums too: in float16 their sum may still fit
                raise LowBitError(f"calibration: {what} NaN or Inf; check the model's weights and dtype")
            for observer, mine in zip(observers, windows.split([len(o.min_vals) for o in observers], 1), strict=True):
                observer.step(mine)


class Continuation(Protocol):
    """Of a pass that may end before its time. tensors: what the observers had seen, by {size}|{site}|{field}."""

    tensors: dict[str, Tensor]

    def after_batch(self, seen: Callable[[], dict[str, Tensor]]) -> None:
        """Called after every batch; may save what `seen` returns."""


def calibrate(
    model: Callable[..., Any],
    sites: Mapping[str, Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    tp_sizes: Iterable[int],
    fingerprint: Fingerprint,
    gamma: float = 0.01,
    tp_group: dist.ProcessGroup | None = None,
    inputs: Mapping[str, Any] | None = None,
    dp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    histograms: bool = False,
    state: Continuation | None = None,
) -> CalibrationStats:
    """Run `model` over `batches` of (ids, mask) [windows, length] and return the ranges at `sites`.

    sites: {fqn: row-parallel linear} with attributes weight [features, local in_features] and bias (or None), whose
    output is the full sum. tp_sizes: multiples of the group's size. inputs: {fqn: column-parallel linear} whose input's
    ranges are wanted too (recorded under tp_size 1). Batches hold the same number of windows on all ranks of dp_group;
    all ranks of all groups return the same statistics. histograms: also find clipped ranges (clipping.py).
    state: of a pass that stopped earlier, of which `batches` are the rest.
    Raises LowBitError naming the layer where NaN or Inf appears.
    """
    world = world_size(tp_group)
    sizes = sorted(set(tp_sizes))
    for size in sizes:
        if size % world:
            raise LowBitError(f"comm.tp_sizes: {size} is no multiple of the {world} ranks that calibrate")
    observers: dict[int, dict[str, RangeObserver]] = {size: {} for size in (1, *sizes)}
    steps = SharedSteps(dp_group)

    def made(size: int, name: str, ranks: int, features: int, device: torch.device) -> RangeObserver:
        observer, start = RangeObserver(ranks, features, gamma, device, histograms), f"{size}|{name}|"
        saved = state.tensors if state is not None else {}
        observer.load({key.removeprefix(start): t for key, t in saved.items() if key.startswith(start)})
        return observer

    def seen() -> dict[str, Tensor]:
        steps.finish()
        every = ((size, name, observer) for size, by_site in observers.items() for name, observer in by_site.items())
        return {f"{size}|{name}|{key}": t for size, name, observer in every for key, t in observer.tensors().items()}

    if not sites:
        raise LowBitError("calibration: the model has no row-parallel linears")
    for name, module in sites.items():
        for size in sizes:
            if module.weight.shape[1] % (size // world):
                inputs = module.weight.shape[1] * world
                raise LowBitError(f"comm.tp_sizes: {size} ranks cannot share the {inputs} inputs of {name} equally")
        features, device = module.weight.shape[0], module.weight.device
        for size in observers:
            observers[size][name] = made(size, name, max(size // world, 1), features, device)
    mask = torch.empty(0, dtype=torch.bool)

    def observe(name: str):
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask.to(output.device)
            full_sum = output if module.bias is None else output - module.bias
            parts = [[full_sum]]
            for size in sizes:
                shards = (t.chunk(size // world, dim) for t, dim in ((inputs[0], -1), (module.weight, 1)))
                parts.append([F.linear(x_i, w_i) for x_i, w_i in zip(*shards, strict=True)])
            steps.observe(f"{name} puts out", [by_site[name] for by_site in observers.values()], parts, real)

        return hook

    def observe_input(name: str):
        def hook(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            x, real = given[0], mask.to(given[0].device)
            if name not in observers[1]:
                observers[1][name] = made(1, name, 1, x.shape[-1], x.device)
            steps.observe(f"{name} reads", [observers[1][name]], [[x]], real)

        return hook

    handles = [module.register_forward_hook(observe(name)) for name, module in sites.items()]
    handles += [module.register_forward_hook(observe_input(name)) for name, module in (inputs or {}).items()]
    try:
        with torch.no_grad():  # not in inference mode: what the model keeps shall be fit for training
            for ids, mask in batches:  # noqa: B007 (the hooks read mask)
                model(input_ids=ids)
                if state is not None:
                    state.after_batch(seen)
            steps.finish()
    finally:
        for handle in handles:
            handle.remove()
    first = next(iter(observers[1].values()))
    if first.steps == 0:
        raise LowBitError("calibration: no batch was given; give more text in calibration.data")
    ranges: dict[int, dict[str, FeatureRange]] = {}
    for size, by_site in observers.items():
        ranges[size] = {}
        for name, observer in by_site.items():
            ranges[size][name] = observer.feature_range(tp_group if size > 1 else None, dp_group)
    if pp_group is not None:
        mine = {str(size): {name: vars(r) for name, r in by_site.items()} for size, by_site in ranges.items()}
        stages = all_gather_values(mine, pp_group)
        ranges = {
            size: {name: FeatureRange(**r) for stage in stages for name, r in stage[str(size)].items()}
            for size in observers
        }
    return CalibrationStats(ranges, fingerprint)
