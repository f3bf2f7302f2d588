"""The low-bit all-reduce of row-parallel partial sums (Dong et al., arXiv 2411.07942, and two of our own).

    one_shot     every rank packs its partial sums [tokens, E] into one message, all ranks gather all messages, decode
                 them and add them up in float32 in rank order
    two_shot     rank r gets every rank's message for its stripe of the tokens, decodes and adds, packs the sum with
                 ranges of its own, and all ranks gather the packed sums
    exact_sum    a stock all-reduce of integers that cannot overflow (exact_sum.py)
    bf16         a stock all-reduce of bf16 values;  native: of the values as they are
    auto         for each message one of these, whichever a cost table says is the fastest (cost.py)

So every rank ends with the same bits in all of them. With b bits per code a rank receives (N - 1) b bits per value in
one_shot, and (N - 1) / N (b + b_second) in two_shot; a bf16 ring moves 2 (N - 1) / N 16. One-shot rounds a value once.
In two_shot the owner of a stripe, too, uses what it sent.

Under sequence parallelism the sum is scattered along the first dimension instead: every rank sends each other rank that
rank's rows only, in one all-to-all, which is the first hop of two_shot. HybridGather, its second hop, sends the normed
activation back, with ranges of its own.

VirtualReducer does the same in one process that holds the partial sums of all ranks. It runs the same kernels on the
same bytes, so its result is bit-identical to that of N real ranks. (In bf16 mode that holds for N = 2; beyond, the
order in which a stock all-reduce adds, and rounds, is the backend's own.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.comm.agreement import Agreement
from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.drift import DriftGuard, Saturation
from megatron_lowbit.comm.exact_sum import ExactSum
from megatron_lowbit.comm.exchange import Arrival, Exchange
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.config import CommMode, LowBitError, check_mode
from megatron_lowbit.runtime.distributed import all_gather_stack, reduce_scatter

MOST_PIECES = 4  # of a message, so that a CPU packs and adds one up while others are on their way
PIECE_VALUES = 2**20  # from one rank to another: 512 KiB of 4 bits. Smaller ones cost more than they hide
LOW_BIT: tuple[CommMode, ...] = ("one_shot", "two_shot", "exact_sum", "auto")


@dataclass
class Traffic:
    """What one rank handed to torch.distributed: bytes, and the values they stand for."""

    bytes: int = 0
    values: int = 0

    def count(self, message: Tensor, values: int = 0) -> None:
        self.bytes += message.nbytes
        self.values += values

    @property
    def bits_per_value(self) -> float:
        return 8 * self.bytes / self.values if self.values else 0.0


class _Reducer(nn.Module):
    """Shared by the real and the virtual reducer: the plan's formats, and which of them the mode uses.

    mode None: one_shot with a plan, bf16 without. drift_threshold: as comm.drift_threshold (drift.py). costs: of as
    many ranks, for auto.
    """

    first: WireFormat | None
    second: WireFormat | None
    exact: ExactSum | None

    def __init__(
        self,
        plan: SitePlan | None,
        mode: CommMode | None = None,
        drift_threshold: float | None = None,
        costs: CostTable | None = None,
    ):
        super().__init__()
        check_mode("mode", mode)
        if plan is not None and not isinstance(plan, SitePlan):
            raise LowBitError(
                f"a reducer takes the SitePlan of one site, not a {type(plan).__name__}; give plan.sites[name]"
            )
        self.mode: CommMode = mode or ("bf16" if plan is None else "one_shot")
        self.plan = plan
        self.tp_rank, self.costs = 0, costs
        self._choices: dict[tuple[int, bool], CommMode] = {}
        self.traffic = Traffic()
        self.first = self.second = self.exact = None
        if self.low_bit:
            self._lay_out(plan)
        parts: list[WireFormat | ExactSum | None] = [self.first, self.second, self.exact]
        self.guard = DriftGuard(drift_threshold, [part for part in parts if part is not None])

    def _lay_out(self, plan: SitePlan | None) -> None:
        """The formats that the mode needs."""
        costs = self.costs
        if plan is None:
            raise LowBitError(f"comm.mode={self.mode} needs a communication plan; calibrate one")
        if self.mode == "auto":
            if costs is None:
                raise LowBitError("comm.mode=auto needs comm.cost_table here; benchmark collectives --tune writes one")
            if costs.tp_size != plan.tp_size:
                raise LowBitError(
                    f"the cost table is for tp_size {costs.tp_size}, there are {plan.tp_size} ranks; "
                    "write one with benchmark collectives --tune"
                )
        if self.mode in ("exact_sum", "auto"):
            self.exact = ExactSum(plan)
        if self.mode == "exact_sum":
            return
        self.first = WireFormat(plan.first)
        if self.mode == "two_shot" or (self.mode == "auto" and plan.second is not None):
            if plan.second is None:
                raise LowBitError(
                    "the communication plan has no ranges of the sum, which two_shot needs; calibrate again"
                )
            self.second = WireFormat(plan.second, plan.tp_size)

    @property
    def low_bit(self) -> bool:
        return self.mode in LOW_BIT

    @property
    def native(self) -> bool:
        """Whether values travel as they are."""
        return self.mode == "native"

    def at(self, site: str) -> None:
        """Give it the site's name, which messages then say."""
        self.guard.site = site

    def saturation(self) -> Saturation:
        """Return what this process has encoded so far, and whether the site has fallen back. Waits for the device."""
        return self.guard.saturation()

    def _mode_of(self, x: Tensor, scattered: bool = False) -> CommMode:
        """How partial sums [..., E] travel, unless the site has drifted: then in bf16."""
        mode = self.chosen(x.numel(), scattered)
        return "bf16" if mode in LOW_BIT and self.guard.tripped else mode

    def _drifted(self, x: Tensor) -> bool:
        """Whether x, which has been encoded, has to travel in bf16 after all. A collective call."""
        return self.guard.trips(self._largest, x, self.tp_rank)

    def chosen(self, values: int, scattered: bool = False) -> CommMode:
        """How so many partial sums travel: the mode or, where that is auto, one of the others.

        scattered: in a reduce-scatter. It is half of each way of two hops, bf16 among them, and so goes by their costs.
        """
        if self.mode != "auto" or self.costs is None:
            return self.mode
        if (values, scattered) not in self._choices:
            has = {"one_shot": self.first, "two_shot": self.second, "exact_sum": self.exact}
            among = [mode for mode, part in has.items() if part is not None and not (scattered and mode == "one_shot")]
            self._choices[values, scattered] = self.costs.choose(2 * values, among)
        return self._choices[values, scattered]

    def _largest(self, share: Tensor) -> Tensor:
        """The largest of all ranks' shares."""
        return share

    def _wire_dtype(self, x: Tensor) -> torch.dtype:
        """Without a plan; 16-bit values travel as they are."""
        return x.dtype if self.native or x.element_size() == 2 else torch.bfloat16


class _OverRanks(nn.Module):
    """A module that holds the process group `tp_group`: a copy shares it, and a file cannot keep it."""

    tp_group: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, object]) -> _OverRanks:
        twin = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.tp_group)] = twin, self.tp_group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise LowBitError(
            "a model whose ranks communicate cannot be pickled, because a process group lives in its process; "
            "call save_pretrained, or state_dict, instead"
        )


class HybridReducer(_OverRanks, _Reducer):
    """All-reduce over the ranks of `tp_group` at one site.

    plan: the site's SitePlan, which bf16 and native do without. Raises LowBitError where the plan is for another number
    of ranks, or lacks what the mode needs. Its methods do where the ranks differ in tokens, plan or mode, or a rank has
    ended (agreement.py).
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

    def at(self, site: str) -> None:
        super().at(site)
        self.agreement.site = site

    def all_reduce(self, x: Tensor, reuse: bool = False) -> Tensor:
        """This rank's partial sums [..., E] -> the group's sum, in x's dtype; the gradient passes as it is.

        reuse: x is the caller's own and not needed any more, so without a gradient the sum may be made in its place.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return _ReduceFromTensorParallelRegion.apply(x, self)
        return self._forward(x, reuse)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's partial sums [length, ..., E] -> rank r's slice r of the sum [length / N, ..., E]; bit for bit
        that slice of all_reduce in one_shot and exact_sum. The gradient is all-gathered in full precision.

        The first half of sequence parallelism (Megatron's [length, batch, hidden]); length is a multiple of N.
        """
        return _ReduceScatterToSequenceParallelRegion.apply(x, self)

    def _forward(self, x: Tensor, reuse: bool = False) -> Tensor:
        y = self._sum(x, reuse)
        self.guard.look(y)
        return y

    def _sum(self, x: Tensor, reuse: bool) -> Tensor:
        self.agreement.check(x)
        mode = self._mode_of(x)
        if mode not in LOW_BIT:
            return self._stock(x, reuse)
        rows, check = x.reshape(-1, x.shape[-1]), self.guard.due(x)
        if mode == "exact_sum":
            assert self.exact is not None
            codes = self.exact.encode(rows, self.tp_rank)
            if check and self._drifted(x):
                return self._stock(x, reuse)
            self.traffic.count(codes, x.numel())
            with self.agreement:
                dist.all_reduce(codes, group=self.tp_group)
            return self.exact.decode(codes, x.dtype).view(x.shape)
        y = x if reuse and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        one_way = self._one_shot if mode == "one_shot" else self._two_shot
        return y if one_way(rows, y.view(rows.shape), check) else self._stock(x, reuse)

    def _stock(self, x: Tensor, reuse: bool) -> Tensor:
        dtype = self._wire_dtype(x)
        own = reuse and x.dtype == dtype and x.is_contiguous()  # the all-reduce works in place
        message = x if own else x.to(dtype, copy=True).contiguous()
        self.traffic.count(message, message.numel())
        with self.agreement:
            dist.all_reduce(message, group=self.tp_group)
        return message if message.dtype == x.dtype else message.to(x.dtype)

    def _largest(self, share: Tensor) -> Tensor:
        return self.agreement.largest(share)

    def _pieces(self, rows: Tensor, ranks: int) -> tuple[Tensor, ...]:
        """rows [tokens, E] in up to MOST_PIECES, each of a multiple of N tokens, or the last; `ranks` share a piece."""
        count = 1 if rows.is_cuda else min(MOST_PIECES, max(1, rows.numel() // (PIECE_VALUES * ranks)))
        each = -(-len(rows) // (count * self.tp_size)) * self.tp_size
        return rows.split(max(each, 1))

    def _one_shot(self, rows: Tensor, sums: Tensor, check: bool) -> bool:
        """Returns False where nothing was sent, since the site has drifted.

        check: whether to find out, for which all rows are one piece.
        """
        first, exchange = self.first, Exchange(self.agreement)
        assert first is not None

        def send(message: Tensor, piece: Tensor, total: Tensor) -> tuple[Arrival, Tensor]:
            self.traffic.count(message, piece.numel())
            return exchange.all_gather(message), total

        def pack_and_send(piece: Tensor, total: Tensor) -> tuple[Arrival, Tensor]:
            return send(first.pack(piece, self.tp_rank), piece, total)

        def add_up(gather: Arrival, total: Tensor) -> None:
            first.unpack_reduce_into(gather.wait(), total)

        if check:
            message = first.pack(rows, self.tp_rank)
            if self._drifted(rows):
                return False
            add_up(*send(message, rows, sums))
        else:
            pieces = zip(self._pieces(rows, 1), self._pieces(sums, 1), strict=True)
            exchange.pipeline(pieces, pack_and_send, add_up)
        return True

    def _two_shot(self, rows: Tensor, sums: Tensor, check: bool) -> bool:
        """Stripes of a piece are ceil(tokens / N) neighbouring tokens, the last ones shorter or empty, and padded.

        check, and False: as in _one_shot, but the first hop has been sent, since the second encodes what it brings.
        """
        first, second, exchange = self.first, self.second, Exchange(self.agreement)
        assert first is not None and second is not None

        def scatter(piece: Tensor, total: Tensor) -> tuple[Arrival, Tensor]:
            message = first.pack(piece, self.tp_rank)
            self.traffic.count(message, piece.numel())
            each = -(-len(piece) // self.tp_size)
            sizes = [max(0, min(each, len(piece) - rank * each)) for rank in range(self.tp_size)]
            return exchange.all_to_all(message, sizes), total

        def add_up(scattered: Arrival) -> Tensor:
            return first.requantize(scattered.wait(), second)

        def give_back(stripe: Tensor, total: Tensor) -> tuple[Arrival, Tensor]:
            missing = -(-len(total) // self.tp_size) - len(stripe)
            stripe = torch.nn.functional.pad(stripe, (0, 0, 0, missing)) if missing else stripe
            self.traffic.count(stripe)
            return exchange.all_gather(stripe), total

        def add_up_and_give_back(scattered: Arrival, total: Tensor) -> tuple[Arrival, Tensor]:
            return give_back(add_up(scattered), total)

        def decode(gather: Arrival, total: Tensor) -> None:
            stripes = gather.wait().flatten(0, 1)[: len(total)]
            second.unpack_reduce_into(stripes.unsqueeze(0), total)

        if check:
            scattered, total = scatter(rows, sums)
            stripe = add_up(scattered)
            if self._drifted(rows):
                self.traffic.values -= rows.numel()  # they are sent again
                return False
            decode(*give_back(stripe, total))
        else:
            pieces = zip(self._pieces(rows, self.tp_size), self._pieces(sums, self.tp_size), strict=True)
            exchange.pipeline(pieces, scatter, add_up_and_give_back, decode)
        return True

    def _forward_scatter(self, x: Tensor) -> Tensor:
        y = self._scatter(x)
        self.guard.look(y)
        return y

    def _scatter(self, x: Tensor) -> Tensor:
        """Rank r gets every rank's rows r: one all-to-all of messages, decoded and added in rank order."""
        shape = (x.shape[0] // self.tp_size, *x.shape[1:])
        self.agreement.check(x)
        mode = self._mode_of(x, scattered=True)
        if mode not in LOW_BIT:
            return self._stock_scatter(x)
        rows, check = x.reshape(-1, x.shape[-1]), self.guard.due(x)
        part = self.exact if mode == "exact_sum" else self.first
        assert part is not None
        message = part.encode(rows, self.tp_rank) if isinstance(part, ExactSum) else part.pack(rows, self.tp_rank)
        if check and self._drifted(x):
            return self._stock_scatter(x)
        if isinstance(part, ExactSum):
            return part.decode(self._scattered(message, x.numel()), x.dtype).view(shape)
        self.traffic.count(message, x.numel())
        sizes = [len(message) // self.tp_size] * self.tp_size
        received = Exchange(self.agreement).all_to_all(message, sizes).wait()
        return part.unpack_reduce(received, x.dtype).view(shape)

    def _stock_scatter(self, x: Tensor) -> Tensor:
        return self._scattered(x.to(self._wire_dtype(x)).contiguous(), x.numel()).to(x.dtype)

    def _scattered(self, message: Tensor, values: int) -> Tensor:
        self.traffic.count(message, values)
        total = message.new_empty(len(message) // self.tp_size, *message.shape[1:])
        with self.agreement:
            reduce_scatter(total, message, self.tp_group)
        return total


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
