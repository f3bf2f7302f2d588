"""Bits by feature: reverse water-filling under one budget over all sites (ours; arXiv 2411.07942 has two tiers, Int4
and BF16, in every layer alike).

The squared error of a code of b bits is the feature's weight (build_plan.py) times error(b):
1 / (12 (2^b - 1)^2) with static ranges, and as measured with per-token scales, whose steps are not all alike. Of all
features of all sites the one whose next bits lower the weighted error most, per bit, gets them, until the budget is
spent. The error is convex in b, so taking the steps in the order of their gain is the same as taking them one by one.

Tiers other than the narrowest hold whole words of codes (packing.py), so that no bits are lost in padding; what that
leaves of the budget is given out again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lowbit.kernels import codes_per_word, packed_bytes

WIDTHS = (2, 3, 4, 5, 6, 8)
STATIC = tuple((2.0**bits - 1) ** -2 for bits in WIDTHS)  # up to a factor, which changes nothing
MOST_LEFT = 7 * 2 * 5  # bits of a site that rounding to words may leave: 7 codes of each tier, 2 bits each
HALVINGS = 9
# SQNR in dB of the partial sums of two small Llamas (hidden 64 at 4 ranks, 256 at 8), weighted as in a site's error.
PER_TOKEN = tuple(10 ** (-sqnr / 10) for sqnr in (9.5, 15.0, 20.9, 26.3, 31.8, 42.5))


def allocate_bits(weights: Mapping[str, Tensor], budget: float, error: tuple[float, ...] = STATIC) -> dict[str, Tensor]:
    """Allocate bits to features so that their total error is least.

    weights: {site: float64 [E], what an error of the feature costs}; budget: bits of a token at all sites together;
    error: of each of WIDTHS.

    Returns {site: uint8 [E] of WIDTHS}; at least the narrowest width for every feature, whatever the budget.
    """
    names, sizes = list(weights), [len(weight) for weight in weights.values()]
    every = torch.cat([weight.double() for weight in weights.values()])
    cost = torch.tensor(WIDTHS, dtype=torch.float64).diff()
    falls = -torch.tensor(error, dtype=torch.float64).diff() / cost
    gain = every[:, None] * falls  # [features, steps], of one bit in each step
    order = torch.sort(gain.flatten(), descending=True, stable=True).indices
    spent = cost.repeat(len(every))[order].cumsum(0) + WIDTHS[0] * len(every)

    def allotted(limit: float) -> dict[str, Tensor]:
        taken = order[spent <= limit] // len(cost)
        level = torch.bincount(taken, minlength=len(every))
        bits = torch.tensor(WIDTHS, dtype=torch.uint8)[level].split(sizes)
        return {name: _whole_words(own, weights[name]) for name, own in zip(names, bits, strict=True)}

    left = MOST_LEFT * len(names)
    low, high = budget - left, budget + left
    best = allotted(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = allotted(middle)
        if _size(more) <= budget:
            best, low = more, middle
        else:
            high = middle
    return best


def _size(bits: Mapping[str, Tensor]) -> int:
    """Return the bits of a token's codes at all sites, in whole bytes."""
    counts = (torch.bincount(own.int()).tolist() for own in bits.values())
    return sum(8 * packed_bytes(n, width) for own in counts for width, n in enumerate(own) if n)


def _whole_words(bits: Tensor, weight: Tensor) -> Tensor:
    """Move what is left over beyond the last whole word of a tier, its lightest features, into the next narrower."""
    bits = bits.clone()
    for wide, narrow in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True):
        members = (bits == wide).nonzero().squeeze(1)
        extra = len(members) % codes_per_word(wide)
        lightest = torch.sort(weight[members], stable=True).indices[:extra]
        bits[members[lightest]] = narrow
    return bits
