"""Ranges that give up their rare ends for finer steps (ours; arXiv 2411.07942 takes moving averages of min and max).

Of a feature whose values x are coded in b bits over [low, high], rounded inside and clipped outside, the expected
squared error is

    E(low, high) = n step^2 / 12  +  sum_(x < low) (x - low)^2  +  sum_(x > high) (x - high)^2

with step = (high - low) / (2^b - 1) and n values inside. The sums come from a running histogram, whose bins stand for
their centers. Beginning with all that was seen, each end in turn moves to the bin edge of least error, the other held
where it is: E falls with every move, so this ends in a minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

BINS = 128
WIDTHS = range(2, 9)
TURNS = 6  # of both ends; more moved nothing on the models measured


class RunningHistogram:
    """Counts of values per feature in BINS bins over [-2^k, 2^k), with each feature's own k.

    When a value lies beyond, k grows and neighbouring bins merge, exactly: the counts are those that knowing k from the
    beginning would have given, whatever the order of the values. counts: float64 [features, BINS].
    """

    def __init__(self, features: int, device: torch.device):
        self.counts = torch.zeros(features, BINS, dtype=torch.float64, device=device)
        self.exponent = torch.full((features,), -100, dtype=torch.int32, device=device)
        self.low = torch.full((features,), torch.inf, device=device)
        self.high = -self.low

    def update(self, values: Tensor) -> None:
        """Count values: float [tokens, features], finite."""
        if len(values) == 0:
            return
        exact = values.float()
        self.low, self.high = torch.minimum(self.low, exact.amin(0)), torch.maximum(self.high, exact.amax(0))
        largest = torch.maximum(exact.amax(0), -exact.amin(0))
        _, needed = torch.frexp(largest)  # |x| < 2^needed
        # frexp says 0 of 0, which would widen a feature of small values to [-1, 1) for good.
        self._widen(torch.maximum(self.exponent, torch.where(largest > 0, needed, self.exponent)))
        # Multiplying by a power of 2 is exact, so a value falls into the bin that merging would put it in.
        bins = torch.floor(torch.ldexp(exact.double(), 6 - self.exponent)).long() + BINS // 2
        self.counts.scatter_add_(1, bins.t(), torch.ones_like(bins.t(), dtype=torch.float64))

    def _widen(self, exponent: Tensor) -> None:
        doublings = exponent - self.exponent
        empty = self.counts.sum(1) == 0
        doublings[empty] = 0
        while (doublings > 0).any():
            merged = torch.zeros_like(self.counts)
            merged[:, BINS // 4 : -BINS // 4] = self.counts.unflatten(1, (-1, 2)).sum(2)
            self.counts = torch.where((doublings > 0)[:, None], merged, self.counts)
            doublings = doublings - 1
        self.exponent = exponent

    def merge_ranks(self, group: dist.ProcessGroup | None) -> None:
        """Add up the counts of all ranks of `group`, which all end with the same."""
        if group is None:
            return
        exponent = self.exponent.clone()
        dist.all_reduce(exponent, dist.ReduceOp.MAX, group)
        self._widen(exponent)
        dist.all_reduce(self.counts, group=group)
        dist.all_reduce(self.low, dist.ReduceOp.MIN, group)
        dist.all_reduce(self.high, dist.ReduceOp.MAX, group)

    def clipped_range(self, num_bits: int) -> tuple[Tensor, Tensor]:
        """Return (low, high) of least expected squared error at num_bits, float32 [features]; never beyond what was
        seen."""
        width = torch.ldexp(torch.ones_like(self.counts[:, :1]), self.exponent[:, None] - 6)
        edges = torch.arange(-BINS // 2, BINS // 2 + 1, device=width.device) * width  # [features, BINS + 1]
        edges = edges.clamp(self.low.double()[:, None], self.high.double()[:, None])
        below, above = _clipping_error(self.counts, edges), _clipping_error(self.counts.flip(1), -edges.flip(1)).flip(1)
        inside = _before(self.counts)  # values below each edge
        steps = 12.0 * (2**num_bits - 1) ** 2
        low, high = torch.zeros_like(edges[:, 0], dtype=torch.int64), torch.full_like(edges[:, 0], BINS).long()
        for _ in range(TURNS):
            span = (edges.gather(1, high[:, None]) - edges).clamp_min(0)
            held = (inside.gather(1, high[:, None]) - inside).clamp_min(0)
            low = _least(held * span.square() / steps + below, up_to=high)
            span = (edges - edges.gather(1, low[:, None])).clamp_min(0)
            held = (inside - inside.gather(1, low[:, None])).clamp_min(0)
            high = BINS - _least((held * span.square() / steps + above).flip(1), up_to=BINS - low)
        return tuple(edges.gather(1, end[:, None]).squeeze(1).float() for end in (low, high))  # type: ignore[return-value]


def _before(counts: Tensor) -> Tensor:
    """Sum up [features, BINS] -> [features, BINS + 1]: the sum of all bins before each edge."""
    return torch.nn.functional.pad(counts.cumsum(1), (1, 0))


def _clipping_error(counts: Tensor, edges: Tensor) -> Tensor:
    """Sum (value - edge)^2 over the values below each edge, a bin's values at its center: [features, BINS + 1]."""
    center = (edges[:, 1:] + edges[:, :-1]) / 2
    square, first = _before(counts * center.square()), _before(counts * center)
    return (square - 2 * edges * first + edges.square() * _before(counts)).clamp_min_(0)


def _least(error: Tensor, up_to: Tensor) -> Tensor:
    """Return the index of the least error before place `up_to`: int64 [features]."""
    place = torch.arange(error.shape[1], device=error.device)
    return error.masked_fill((place >= up_to[:, None]) & (place > 0), torch.inf).argmin(1)
