"""Measures a CostTable (cost.py) on the ranks that will use it.

After a round that warms up, the modes take turns in each round, behind a barrier. A repetition takes as long as on the
slowest rank and a cell of the table is the median, so all ranks hold the same table, and choose alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import distributed as dist

from megatron_lowbit.artifacts import SitePlan
from megatron_lowbit.collectives import HybridReducer
from megatron_lowbit.config import CommMode
from megatron_lowbit.cost import TUNED, CostTable
from megatron_lowbit.distributed import device

SIZES = (2**14, 2**18, 2**22)  # bytes of a bf16 tensor
ROUNDS = 5


@torch.inference_mode()
def measure_costs(group: dist.ProcessGroup, plan: SitePlan, sizes: Sequence[int] = SIZES) -> CostTable:
    """The table of all-reduces over `group`, of partial sums that this plan describes. A collective call.

    sizes: bytes of the bf16 tensor, rounded down to whole tokens, at least one.
    """
    features = len(plan.first.bits)
    where = device() if "nccl" in dist.get_backend(group) else torch.device("cpu")
    modes = [mode for mode in TUNED if mode != "two_shot" or plan.second is not None]
    reducers = {mode: HybridReducer(plan, group, mode) for mode in modes}
    rows: dict[str, list[tuple[int, float]]] = {mode: [] for mode in modes}
    for tokens in sorted({max(1, size // (2 * features)) for size in sizes}):
        x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)).bfloat16().to(where)
        rounds = [one_round(reducers, modes[n % len(modes) :] + modes[: n % len(modes)], x) for n in range(ROUNDS + 1)]
        times = torch.tensor([[seconds[mode] for mode in modes] for seconds in rounds[1:]], device=where)
        dist.all_reduce(times, dist.ReduceOp.MAX, group)
        for mode, column in zip(modes, times.t().tolist(), strict=True):
            rows[mode].append((2 * x.numel(), statistics.median(column)))
    return CostTable(dist.get_world_size(group), features, {mode: tuple(points) for mode, points in rows.items()})


def one_round(
    reducers: dict[CommMode, HybridReducer], modes: Sequence[CommMode], x: torch.Tensor
) -> dict[CommMode, float]:
    """{mode: this rank's seconds}, in the order of `modes`."""
    seconds = {}
    for mode in modes:
        reducer = reducers[mode]
        dist.barrier(reducer.tp_group)
        _wait(x)
        start = time.perf_counter()
        reducer.all_reduce(x)
        _wait(x)
        seconds[mode] = time.perf_counter() - start
    return seconds


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
