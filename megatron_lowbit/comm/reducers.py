"""The low-bit all-reduce of row-parallel partial sums at one site (Dong et al., arXiv 2411.07942).

HybridReducer chooses one of the collectives (collectives/), has its ranks agree that they can (agreement.py), and sends
in bf16 where calibrated ranges do not hold (drift.py). comm.mode names the collective; auto takes, for each message,
whichever a cost table says is the fastest (cost.py). Every rank ends with the same bits in all of them.

Under sequence parallelism the sum is scattered along the first dimension instead: every rank sends each other rank that
rank's rows only, in one all-to-all, which is the first hop of two_shot. HybridGather (sequence_parallel.py), its second
hop, sends the normed activation back, with ranges of its own. VirtualReducer (virtual.py) does the same in one process
that holds the partial sums of all ranks.
"""

from __future__ import annotations

import copy
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.comm.agreement import Agreement
from megatron_lowbit.comm.collectives import COLLECTIVES, Collective
from megatron_lowbit.comm.collectives.base import Drifted, Formats, Ranks, Traffic
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.drift import DriftGuard, Saturation
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.config import CommMode, LowBitError, check_mode
from megatron_lowbit.runtime.distributed import all_gather_stack


def is_low_bit(mode: str | None) -> bool:
    """Return whether a comm.mode sends codes, for which it needs a plan."""
    return mode == "auto" or (mode in COLLECTIVES and COLLECTIVES[mode].low_bit)


class Reducer(nn.Module):
    """The part that both reducers share: the collectives that the mode may take, and the guard over them.

    mode None: one_shot with a plan, bf16 without. drift_threshold: that of comm.drift_threshold (drift.py). costs: of
    as many ranks, for auto.
    """

    def __init__(
        self,
        plan: SitePlan | None,
        mode: CommMode | None = None,
        drift_threshold: float | None = None,
        costs: CostTable | None = None,
    ):
        super().__init__()
        if mode not in COLLECTIVES:
            check_mode("mode", mode)
        if plan is not None and not isinstance(plan, SitePlan):
            raise LowBitError(
                f"a reducer takes the SitePlan of one site, not a {type(plan).__name__}; give plan.sites[name]"
            )
        self.mode: CommMode = mode or ("bf16" if plan is None else "one_shot")
        self.plan, self.costs = plan, costs
        self.tp_rank = 0
        self.traffic = Traffic()
        self.formats = Formats(plan)
        self.stock = COLLECTIVES["bf16"](self.formats)
        self.collectives = {name: COLLECTIVES[name](self.formats) for name in self._names()}
        self._choices: dict[tuple[int, bool], Collective] = {}
        self.guard = DriftGuard(drift_threshold, list(self.formats.by_name.values()))  # type: ignore[arg-type]

    def _names(self) -> list[str]:
        """Return the collectives that the mode may take. Raises LowBitError where it lacks a plan or a cost table."""
        if not self.low_bit:
            return [self.mode]
        if self.plan is None:
            raise LowBitError(f"comm.mode={self.mode} needs a communication plan; calibrate one")
        if self.mode == "auto":
            if self.costs is None:
                raise LowBitError("comm.mode=auto needs comm.cost_table here; benchmark collectives --tune writes one")
            if self.costs.tp_size != self.plan.tp_size:
                raise LowBitError(
                    f"the cost table is for tp_size {self.costs.tp_size}, there are {self.plan.tp_size} ranks; "
                    "write one with benchmark collectives --tune"
                )
            return [name for name, found in COLLECTIVES.items() if found.low_bit and found.possible(self.plan)]
        return [self.mode]

    @property
    def low_bit(self) -> bool:
        """Return whether the mode sends codes."""
        return is_low_bit(self.mode)

    @property
    def native(self) -> bool:
        """Return whether values travel as they are."""
        return self.mode == "native"

    def set_site(self, site: str) -> None:
        """Give it the site's name, which messages then say.

        Args:
            site: the linear's name in the model.
        """
        self.guard.site = site

    def saturation(self) -> Saturation:
        """Return what this process has encoded so far, and whether the site has fallen back. Waits for the device.

        Returns:
            A Saturation: values, saturated, nonfinite, bf16.
        """
        return self.guard.saturation()

    def choose(self, values: int, scattered: bool = False) -> Collective:
        """Return the collective that so many partial sums take: the mode's or, where that is auto, the fastest.

        Args:
            values: tokens * features.
            scattered: in a reduce-scatter. It is half of each way of two hops, bf16 among them, and so goes by their
                costs.

        Returns:
            One of the collectives of megatron_lowbit/comm/collectives/.
        """
        if self.mode != "auto" or self.costs is None:
            return self.collectives[self.mode]
        if (values, scattered) not in self._choices:
            among = [name for name, c in self.collectives.items() if c.scatters or not scattered]
            name = self.costs.choose(2 * values, among)
            self._choices[values, scattered] = self.collectives.get(name, self.stock)
        return self._choices[values, scattered]

    def _next(self, x: Tensor, scattered: bool = False) -> tuple[Collective, Drifted | None]:
        """Return the collective for partial sums x, and what it has to ask once they are encoded, if this call is
        checked."""
        collective = self.choose(x.numel(), scattered)
        if not collective.low_bit or self.guard.tripped:
            return self.stock if collective.low_bit else collective, None
        return collective, (lambda: self.guard.trips(self._largest, x, self.tp_rank)) if self.guard.due(x) else None

    def _largest(self, share: Tensor) -> Tensor:
        """Return the largest of all ranks' shares."""
        return share


class OverRanks(nn.Module):
    """A module that holds the process group `tp_group`: a copy shares it, and a file cannot keep it."""

    tp_group: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, object]) -> OverRanks:
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.tp_group)] = copied, self.tp_group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise LowBitError(
            "a model whose ranks communicate cannot be pickled, because a process group lives in its process; "
            "call save_pretrained, or state_dict, instead"
        )


class HybridReducer(OverRanks, Reducer):
    """The low-bit all-reduce of one site, over the ranks of a tensor-parallel group.

    all_reduce and reduce_scatter are collective calls: every rank of the group makes them, in the same order.

    Args:
        plan: the site's SitePlan (CommPlan.sites); None for the modes bf16 and native, which need none.
        tp_group: the process group of the tensor-parallel ranks.
        mode: native (the stock all-reduce in x's dtype), bf16, one_shot, two_shot, exact_sum or auto; None: one_shot
            with a plan, bf16 without.
        drift_threshold: the share of values beyond their calibrated ranges above which the site falls back to bf16;
            None: it never does, but logs a warning.
        costs: the CostTable that auto chooses by.

    Raises:
        LowBitError: the plan is for another number of ranks, or lacks what the mode needs.

    Example, on each of two ranks:
        >>> import torch
        >>> from torch import distributed as dist
        >>> import megatron_lowbit as lowbit
        >>> site = lowbit.Artifact.load("artifact").plan(2).sites["model.layers.0.mlp.down_proj"]
        >>> reducer = lowbit.HybridReducer(site, dist.group.WORLD)
        >>> reducer.all_reduce(torch.zeros(5, 64, dtype=torch.bfloat16)).shape
        torch.Size([5, 64])
        >>> reducer.traffic.bits_per_value < 6
        True
    """

    def __init__(
        self,
        plan: SitePlan | None,
        tp_group: dist.ProcessGroup,
        mode: CommMode | None = None,
        drift_threshold: float | None = None,
        costs: CostTable | None = None,
    ):
        super().__init__(plan, mode, drift_threshold, costs)
        self.tp_group = tp_group
        self.tp_rank, self.tp_size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
        if plan is not None and plan.tp_size != self.tp_size:
            raise LowBitError(
                f"the communication plan is for tp_size {plan.tp_size}, this group has {self.tp_size} ranks"
            )
        tensors = plan.tensors().items() if plan is not None and self.low_bit else ()
        self.agreement = Agreement(
            tp_group, [self.mode, drift_threshold, costs, *(part for item in tensors for part in item)]
        )
        self.ranks = Ranks(self.agreement, self.tp_rank, self.tp_size, self.traffic)

    def set_site(self, site: str) -> None:
        """Give it the site's name, which messages then say.

        Args:
            site: the linear's name in the model.
        """
        super().set_site(site)
        self.agreement.site = site

    def all_reduce(self, x: Tensor, reuse: bool = False) -> Tensor:
        """Add up the partial sums of all ranks. The gradient passes as it is.

        Args:
            x: this rank's partial sums [..., features], float32, bf16 or float16; of the same shape on every rank.
            reuse: x is not needed any more, so without a gradient the sum may be made in its place.

        Returns:
            The group's sum, of x's shape and dtype, the same bits on every rank.

        Raises:
            LowBitError: the ranks differ in tokens, plan or mode, or one of them has ended.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return _ReduceFromTensorParallelRegion.apply(x, self)
        return self._forward(x, reuse)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Add up the partial sums of all ranks, and keep this rank's share of the tokens.

        Under sequence parallelism this takes the place of the all-reduce after a row-parallel linear. The gradient is
        all-gathered in full precision.

        Args:
            x: this rank's partial sums [length, ..., features], such as Megatron's [length, batch, hidden]; length is
                a multiple of the number of ranks N.

        Returns:
            Rank r's slice r of the sum [length / N, ..., features]; in one_shot and exact_sum bit for bit that slice of
            what all_reduce returns.

        Raises:
            LowBitError: the ranks differ in tokens, plan or mode, or one of them has ended.
        """
        return _ReduceScatterToSequenceParallelRegion.apply(x, self)

    def _forward(self, x: Tensor, reuse: bool = False) -> Tensor:
        self.agreement.check(x)
        collective, drifted = self._next(x)
        y = collective.all_reduce(x, self.ranks, reuse, drifted)
        if y is None:
            y = self.stock.all_reduce(x, self.ranks, reuse, None)
        assert y is not None
        self.guard.look(y)
        return y

    def _forward_scatter(self, x: Tensor) -> Tensor:
        self.agreement.check(x)
        collective, drifted = self._next(x, scattered=True)
        y = collective.reduce_scatter(x, self.ranks, drifted)
        if y is None:
            y = self.stock.reduce_scatter(x, self.ranks, None)
        assert y is not None
        self.guard.look(y)
        return y

    def _largest(self, share: Tensor) -> Tensor:
        return self.agreement.largest(share)


class _ReduceFromTensorParallelRegion(torch.autograd.Function):
    """Forward the (quantized) all-reduce, backward the identity: Megatron's mapping of that name."""

    @staticmethod
    def forward(ctx, x: Tensor, reducer: HybridReducer) -> Tensor:  # type: ignore[override]
        return reducer._forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


class _ReduceScatterToSequenceParallelRegion(torch.autograd.Function):
    """Forward the (quantized) reduce-scatter along the first dimension, backward the all-gather."""

    @staticmethod
    def forward(ctx, x: Tensor, reducer: HybridReducer) -> Tensor:  # type: ignore[override]
        ctx.group = reducer.tp_group
        return reducer._forward_scatter(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return all_gather_stack(grad.contiguous(), ctx.group).flatten(0, 1), None
