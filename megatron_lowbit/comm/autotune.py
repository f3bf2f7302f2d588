"""Measures a CostTable (cost.py) on the ranks that will use it.

The modes take turns in each round, behind a barrier. A repetition takes as long as on the slowest rank, so all ranks
hold the same table, and choose alike. Large tensors come first and the first rounds do not count: connections and
allocators start slowly. (On the loopback of two cores, five rounds from the start put 16 KiB in bf16 at 3 ms, where it
settles at 0.6.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.collectives import COLLECTIVES
from megatron_lowbit.comm.cost import TUNED, CostTable
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.reducers import HybridReducer, is_low_bit
from megatron_lowbit.runtime.distributed import device

Way = TypeVar("Way", bound=str)

SIZES = (2**14, 2**18, 2**22)  # bytes of a bf16 tensor
WARM_UP = 3  # rounds
ROUNDS = (9, 61)  # at least, at most
SECONDS = 2.0  # for the rounds of one size


@torch.inference_mode()
def measure_costs(group: dist.ProcessGroup, plan: SitePlan, sizes: Sequence[int] = SIZES) -> CostTable:
    """Measure the table of all-reduces over `group`, of partial sums that this plan describes. A collective call.

    sizes: bytes of the bf16 tensor, rounded down to whole tokens, at least one.
    """
    features = len(plan.first.bits)
    modes = [mode for mode in TUNED if not is_low_bit(mode) or COLLECTIVES[mode].possible(plan)]
    reducers = {mode: HybridReducer(plan, group, mode) for mode in modes}
    rows: dict[str, list[tuple[int, float]]] = {mode: [] for mode in modes}
    for tokens in sorted({max(1, size // (2 * features)) for size in sizes}, reverse=True):
        x = typical(plan.first, tokens).bfloat16().to(_where(group))
        inputs = dict.fromkeys(modes, x)
        warm = slowest([one_round(reducers, n, inputs, group) for n in range(WARM_UP)], group)
        count = min(ROUNDS[1], max(ROUNDS[0], int(SECONDS / sum(warm[-1]))))  # decided once, for all ranks alike
        times = slowest([one_round(reducers, n, inputs, group) for n in range(count)], group)
        for mode, column in zip(modes, zip(*times, strict=True), strict=True):
            quartile = torch.tensor(column).quantile(0.25 if mode == "bf16" else 0.5).item()  # cost.py says why
            rows[mode].insert(0, (2 * x.numel(), quartile))
    return CostTable(dist.get_world_size(group), features, {mode: tuple(points) for mode, points in rows.items()})


def typical(codec: Codec, tokens: int) -> Tensor:
    """Draw float32 [tokens, E] like those that the plan was made for; far from them, encoding takes other paths."""
    codes = torch.randn(tokens, len(codec.bits), generator=torch.Generator().manual_seed(tokens))
    if not codec.per_token:  # a static range is about six standard deviations
        largest = 2.0**codec.bits - 1
        codes = largest / 2 + codes * largest / 6
    return (codes - codec.zero_point[0]) * codec.scale[0]


def one_round(
    ways: Mapping[Way, Any], number: int, inputs: Mapping[Way, Tensor], group: dist.ProcessGroup
) -> list[float]:
    """Measure this rank's seconds of all_reduce(a copy of its input) in every way. Each round has another order, the
    same on all ranks, so that nobody always follows the same one's backlog."""
    seconds = dict.fromkeys(ways, 0.0)
    for way in random.Random(number).sample(list(ways), len(ways)):
        own = inputs[way].clone()  # which may be summed in place
        dist.barrier(group)
        _wait(own)
        start = time.perf_counter()
        ways[way].all_reduce(own, reuse=True)
        _wait(own)
        seconds[way] = time.perf_counter() - start
    return list(seconds.values())


def slowest(rounds: list[list[float]], group: dist.ProcessGroup) -> list[list[float]]:
    """Return the largest of all ranks' seconds; the same on all of them."""
    times = torch.tensor(rounds, dtype=torch.float64, device=_where(group))
    dist.all_reduce(times, dist.ReduceOp.MAX, group)
    return times.tolist()


def _where(group: dist.ProcessGroup) -> torch.device:
    """Return the device that the group sends tensors from."""
    return device() if "nccl" in dist.get_backend(group) else torch.device("cpu")


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
