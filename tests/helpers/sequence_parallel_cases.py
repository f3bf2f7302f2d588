"""Cases for the ranks of test_sequence_parallel.py and test_calibration_ranks.py: no framework but torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from recorded_collectives import RecordedCollectives
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.comm.calibration import ParallelGroups, calibrate
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.plan import CalibrationStats, SitePlan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.comm.sequence_parallel import HybridGather
from megatron_lowbit.config import CommMode, LowBitError
from megatron_lowbit.launch.engines.prepare import share_of_batch


def upstream_of(rank: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank))


def scatter(
    rank: int,
    size: int,
    plan: SitePlan | None,
    partials: Tensor,
    mode: CommMode | None = None,
    strided: bool = False,
) -> dict[str, Any]:
    """This rank's share of the sum of partials [ranks, length, ..., E], and the whole of it by all_reduce."""
    reducer, whole = (HybridReducer(plan, dist.group.WORLD, mode) for _ in range(2))
    x = partials[rank]
    if strided:  # the same values, the last dimension first in memory
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
        assert not x.is_contiguous()
    before = x.clone()
    reducer.agreement.check(x.reshape(-1, x.shape[-1]))  # which the first call would send
    with RecordedCollectives() as recorded:
        y = reducer.reduce_scatter(x)
    return {
        "y": y,
        "all_reduce": whole.all_reduce(x),
        "calls": recorded.calls,
        "traffic": (reducer.traffic.bytes, reducer.traffic.values),
        "input_kept": torch.equal(x, before),
    }


def scatter_by_costs(rank: int, size: int, plan: SitePlan, partials: Tensor, costs: CostTable) -> tuple[int, int]:
    """Bytes that mode=auto hands over for an all-reduce, and for a reduce-scatter, of the same partial sums."""
    whole, reducer = (HybridReducer(plan, dist.group.WORLD, "auto", costs=costs) for _ in range(2))
    whole.all_reduce(partials[rank])
    reducer.reduce_scatter(partials[rank])
    return whole.traffic.bytes, reducer.traffic.bytes


def scatter_gradient(rank: int, size: int, plan: SitePlan | None, partials: Tensor) -> tuple[Tensor, Tensor | None]:
    """(upstream gradient of this rank's share, gradient of its partial sums)."""
    x = partials[rank].clone().requires_grad_()
    y = HybridReducer(plan, dist.group.WORLD).reduce_scatter(x)
    upstream = upstream_of(rank, y.shape)
    y.backward(upstream)
    return upstream, x.grad


def gather(rank: int, size: int, plan: Codec, x: Tensor) -> dict[str, Any]:
    """All ranks' shares of x [length, ..., E] together again, and the gradient of this rank's share."""
    layer = HybridGather(plan, dist.group.WORLD)
    mine = x.chunk(size)[rank].clone().requires_grad_()
    layer.agreement.check(mine.reshape(-1, mine.shape[-1]), share=size)
    with RecordedCollectives() as recorded:
        y = layer.all_gather(mine)
    upstream = upstream_of(rank, y.shape).to(y.dtype)
    with RecordedCollectives() as backward:
        y.backward(upstream)
    return {
        "y": y.detach(),
        "calls": recorded.calls,
        "traffic": (layer.traffic.bytes, layer.traffic.values),
        "upstream": upstream,
        "grad": mine.grad,
        "backward": backward.calls,
    }


def guarded_gathers(rank: int, size: int, plan: Codec, x: Tensor) -> dict[str, Any]:
    """What two all-gathers bring, by a site that may fall back; float64 all-reduces, which only the guard makes."""
    layer = HybridGather(plan, dist.group.WORLD, 0.1)
    with RecordedCollectives() as recorded:
        y = [layer.all_gather(x.chunk(size)[rank]) for _ in range(2)]
    assert torch.equal(*y)
    checks = sum(call == "all_reduce" and dtype == "float64" for call, _, dtype in recorded.calls)
    return {"y": y[0], "bf16": layer.saturation().bf16, "checks": checks}


def wrong_plans(rank: int, size: int, scatter_plan: SitePlan, gather_plan: Codec) -> list[str]:
    messages = []
    for kind, plan in ((HybridReducer, scatter_plan), (HybridGather, gather_plan)):
        try:
            kind(plan, dist.group.WORLD)
            messages.append("accepted")
        except LowBitError as error:
            messages.append(str(error))
    return messages


class Toy(nn.Module):
    """An embedding, a column-parallel linear on it, and two row-parallel ones. All are small integers, so that float32
    sums are exact however many windows go through at once."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def integers(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randint(-9, 10, shape, generator=generator).float(), requires_grad=False)

        self.embedding = nn.Embedding(11, 16)
        self.embedding.weight = integers(11, 16)
        self.column, self.first, self.second = (nn.Linear(16, features, bias=False) for features in (16, 5, 3))
        for linear in (self.column, self.first, self.second):
            linear.weight = integers(*linear.weight.shape)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        return SimpleNamespace(logits=(self.first(self.column(x)), self.second(x.flip(-1))))


Batches = list[tuple[Tensor, Tensor]]


def calibrated(rank: int, size: int, batches: Batches, parallel: str) -> CalibrationStats:
    """Statistics of Toy: every rank with its share of each batch ("dp"), or of the sites ("pp"); "none": by itself."""
    model = Toy()
    sites: dict[str, nn.Module] = {"first": model.first, "second": model.second}
    inputs: dict[str, nn.Module] = {"column": model.column}
    groups = ParallelGroups()
    if parallel == "dp":
        groups = ParallelGroups(dp=dist.group.WORLD)
        batches = [share_of_batch(ids, mask, dist.group.WORLD) for ids, mask in batches]
    if parallel == "pp":
        groups = ParallelGroups(pp=dist.group.WORLD)
        sites = {name: site for number, (name, site) in enumerate(sites.items()) if number == rank}
        inputs = inputs if rank == 0 else {}
    return calibrate(model, sites, batches, (2, 4), {"weights": {}}, 0.25, inputs=inputs, groups=groups)
