"""Running statistics of partial sums, of which the collective's ranges are made (arXiv 2411.07942).

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

Only running statistics are kept, never activations. The pass that feeds them is in calibration.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.clipping import WIDTHS, RunningHistogram
from megatron_lowbit.comm.plan import FeatureRange
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import squared_sizes
from megatron_lowbit.runtime.distributed import all_gather_stack, start_all_gather

STATISTICS = 6  # numbers per feature that window_statistics makes of a window
LARGE = 4.0  # times the median of the tokens' sizes; 2 does as well, and without a limit one token counts for 10,000


def as_windows(y: Tensor, mask: Tensor) -> Tensor:
    """Return y [windows, length, features], which may be flat [windows * length, features], in the first form.

    mask: bool [windows, length]. Some MLPs compute on flat tokens.
    """
    return y if y.ndim == 3 else y.view(*mask.shape, y.shape[-1])


def window_statistics(y: Tensor, mask: Tensor) -> Tensor:
    """Return statistics of every window per feature, float64 [windows, STATISTICS, features].

    They are: minimum and maximum of the real tokens; sum and sum of squares of them, none of them above LARGE times the
    median; their number; the sum of the squares of their sizes, in the window's own standard deviations.
    y: [windows, length, features]; mask: bool [windows, length], True on real tokens.

    Window by window: one of a small model stays in the cache, all of a batch do not.
    """
    windows = zip(y.float(), mask, strict=True)
    return torch.stack([_statistics(window if real.all() else window[real]) for window, real in windows])


def _statistics(values: Tensor) -> Tensor:
    """Return one window's statistics, float64 [6, features], of float32 [tokens, features]; zeros for no tokens."""
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
    """Keep running statistics per feature of `ranks` local partial sums: EMA of the ranges, mean, standard deviation.

    gamma: the weight of a window in the averages. histograms: also count values, for clipped ranges (clipping.py).
    min_vals, max_vals: float32 [ranks, features].
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
        """Count the values of this data-parallel rank's own windows in the histograms, if there are any.

        parts: of every rank, [windows, length, features]; mask: bool [windows, length].
        """
        for histogram, y in zip(self.histograms, parts, strict=False):
            histogram.update(y[mask])

    def step(self, windows: Tensor) -> None:
        """Update the averages window after window; a window of padding only counts for nothing.

        windows: float64 [windows, ranks, 6, features], of window_statistics.
        """
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
        """Return all that the observer holds, {field: tensor}, for `load`."""
        found = {"steps": torch.tensor(self.steps), "min_vals": self.min_vals, "max_vals": self.max_vals}
        for rank, histogram in enumerate(self.histograms):
            found |= {f"{rank}/{name}": getattr(histogram, name) for name in ("counts", "exponent", "low", "high")}
        return found | {"moments": self.moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned."""
        for name, value in tensors.items():
            rank, _, field = name.rpartition("/")
            owner = self.histograms[int(rank)] if rank else self
            setattr(owner, field, int(value) if field == "steps" else value.to(self.min_vals.device))

    def feature_range(
        self, tp_group: dist.ProcessGroup | None = None, dp_group: dist.ProcessGroup | None = None
    ) -> FeatureRange:
        """Return the statistics of all ranks of tp_group, on the CPU. A collective call over both groups."""
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
        """Return low and high for each of clipping.WIDTHS, float32 [widths, 2, features]."""
        histogram.merge_ranks(dp_group)
        return torch.stack([torch.stack(histogram.clipped_range(bits)) for bits in WIDTHS])


class SharedSteps:
    """Update observers whose windows the ranks of dp_group share: all ranks take all windows' steps, in order.

    Exchanges run beside the forward: those of LAG calls are under way, so no rank waits for the others at each site.
    interleaved: data-parallel rank r has every window i with i % ranks = r, not neighbouring ones.
    """

    LAG = 4

    def __init__(self, dp_group: dist.ProcessGroup | None, interleaved: bool = False):
        self.dp_group, self.interleaved = dp_group, interleaved
        self._pending: deque[tuple[str, Sequence[RangeObserver], dist.Work | None, Tensor]] = deque()

    def observe(
        self, what: str, observers: Sequence[RangeObserver], parts: Sequence[Sequence[Tensor]], mask: Tensor
    ) -> None:
        """Start a step of `observers` on this rank's windows. A collective call over dp_group.

        what: of the error, such as "layers.0.mlp.down_proj puts out"; parts: for every observer its ranks' y [windows,
        length, features], or flat [windows * length, features]; mask: bool [windows, length], True on real tokens.
        Raises LowBitError, here or in a later call, where a part has NaN or Inf on any rank.
        """
        parts = [[as_windows(y, mask) for y in ys] for ys in parts]
        shares = torch.stack([window_statistics(y, mask) for ys in parts for y in ys], 1)  # [windows, all, 6, features]
        work, gathered = None, shares.unsqueeze(0)
        if self.dp_group is not None:
            work, gathered = start_all_gather(shares, self.dp_group)
        self._pending.append((what, observers, work, gathered))
        for observer, ys in zip(observers, parts, strict=True):
            observer.count(ys, mask)
        self.finish(self.LAG)

    def finish(self, pending: int = 0) -> None:
        """Wait for the steps that are under way, all but the `pending` newest."""
        while len(self._pending) > pending:
            what, observers, work, gathered = self._pending.popleft()
            if work is not None:
                work.wait()
            windows = (gathered.transpose(0, 1) if self.interleaved else gathered).flatten(0, 1)
            if not torch.isfinite(windows[:, :, :2]).all():  # partial sums too: in float16 their sum may still fit
                raise LowBitError(f"calibration: {what} NaN or Inf; check the model's weights and dtype")
            for observer, mine in zip(observers, windows.split([len(o.min_vals) for o in observers], 1), strict=True):
                observer.step(mine)
