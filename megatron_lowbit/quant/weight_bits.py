"""The number of bits of every linear's weight under one budget (scheme auto): those of smallest KL divergence.

    minimise  sum_g KL_g(b_g)      where   sum_g b_g n_g <= budget * sum_g n_g   and   2 <= b_g <= 8

A group g is one linear, or those that share an input and so one number of bits: hosts that fuse them (Megatron-Core's
qkv and fc1) hold one weight. n_g: its weights; KL_g(b): what rounding it to b bits costs, with all else in full
precision. That the costs add up is exact to second order, as roundings of different weights are uncorrelated. This is
NVIDIA ModelOpt's auto_quantize; here the knapsack is solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_lowbit.io.tensors import short_repr

CANDIDATES = range(2, 9)
_STEPS = 2**16  # of size that the knapsack tells apart; more where all sizes are multiples of a larger number


@dataclass(frozen=True)
class Allocation:
    """The bits of the weights of all quantized linears.

    bits: {linear: 2 to 8}; budget: the mean bits per weight that they were chosen under; kl: the divergence from full
    precision that rounding the weights was estimated to cost, in nats per token.
    """

    bits: dict[str, int]
    budget: float
    kl: float

    __repr__ = short_repr

    def describe(self) -> dict[str, Any]:
        """Return what lowbit.json says of it."""
        return asdict(self)


def choose_bits(
    sizes: Mapping[str, int], costs: Mapping[str, Sequence[float]], budget: float
) -> tuple[dict[str, int], float]:
    """Return ({group: bits}, the sum of their costs), the smallest under the budget.

    sizes: {group: weights}. costs: {group: KL at each of CANDIDATES bits}. budget: mean bits per weight, 2 to 8. Of
    choices that cost the same the one of fewest bits in all is taken, and of these the groups that come first by name
    have more.
    """
    names, least = sorted(sizes), CANDIDATES[0]
    room = int((Fraction(str(budget)) - least) * sum(sizes.values()))  # bits above the least that a weight has
    unit = math.gcd(*sizes.values())
    unit *= -(-room // (unit * _STEPS)) or 1  # sizes are rounded up to units: the budget holds
    places = room // unit
    best = np.zeros(places + 1)  # least cost of the groups so far, by units that they may take
    chosen = []
    for name in names:
        before, best = best, np.add(best, costs[name][0])
        bits = np.full(places + 1, least, dtype=np.int8)
        for number, cost in enumerate(costs[name][1:], 1):
            taken = -(-number * sizes[name] // unit)
            if taken > places:
                break
            total = before[: places + 1 - taken] + cost
            better = total < best[taken:]
            best[taken:][better], bits[taken:][better] = total[better], least + number
        chosen.append(bits)
    place = int(best.argmin())
    least_cost, found = float(best[place]), {}
    for name, bits in zip(reversed(names), reversed(chosen), strict=True):
        found[name] = int(bits[place])
        place -= -(-(found[name] - least) * sizes[name] // unit)
    return {name: found[name] for name in names}, least_cost
