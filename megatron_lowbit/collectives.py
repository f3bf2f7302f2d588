"""The low-bit all-reduce of row-parallel partial sums (Dong et al., arXiv 2411.07942).

one_shot: every rank packs its partial sums [tokens, E] into one uint8 message, all ranks gather all messages, decode
them and add them up in float32 in rank order. So every rank ends with the same bits, with one rounding per value.
Bytes handed to torch.distributed per rank: tokens * (2 k + packed_bytes(E - k, b)), about b bits per code; each rank
receives N - 1 such messages.

Under sequence parallelism the sum is scattered along the first dimension instead: every rank sends each other rank that
rank's rows only, as many bytes in one all-to-all, and decodes and adds tokens / N rows.
HybridGather sends the normed activation back in the same format, with ranges of its own.

Without a plan: the stock all-reduce, on bf16 values or in the values' own dtype.

VirtualReducer does the same in one process that holds the partial sums of all ranks. It runs the same pack and
unpack-reduce on the same bytes, so its result is bit-identical to that of N real ranks. (In bf16 mode that holds for
N = 2; beyond, the order in which a stock all-reduce adds, and rounds, is the backend's own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.artifacts import SitePlan
from megatron_lowbit.config import LowBitError
from megatron_lowbit.distributed import all_gather_stack, reduce_scatter
from megatron_lowbit.kernels import hybrid_pack, hybrid_unpack_reduce
from megatron_lowbit.quantizer import Float32QParams


@dataclass
class Traffic:
    """What one rank handed to torch.distributed: bytes, and the values they stand for."""

    bytes: int = 0
    values: int = 0

    @property
    def bits_per_value(self) -> float:
        return 8 * self.bytes / self.values if self.values else 0.0


class _Reducer(Float32QParams):
    """Shared by the real and the virtual reducer: the plan's tensors as buffers, pack and unpack-reduce."""

    scale: Tensor  # float32 [tp_size, E - k], of the features in low_idx
    zero_point: Tensor
    bf16_idx: Tensor  # int64 [k]
    low_idx: Tensor  # int64 [E - k]

    def __init__(self, plan: SitePlan | None, dtype: torch.dtype | None = torch.bfloat16):
        super().__init__()
        self.traffic = Traffic()
        self.dtype = dtype
        self.num_bits = 16 if plan is None else plan.num_bits
        if plan is not None:
            low = torch.ones(plan.scale.shape[1], dtype=torch.bool)
            low[plan.bf16_idx] = False
            low_idx = low.nonzero().squeeze(1)
            self.register_buffer("scale", plan.scale[:, low_idx].contiguous(), persistent=False)
            self.register_buffer("zero_point", plan.zero_point[:, low_idx].contiguous(), persistent=False)
            self.register_buffer("bf16_idx", plan.bf16_idx.clone(), persistent=False)
            self.register_buffer("low_idx", low_idx, persistent=False)

    @property
    def low_bit(self) -> bool:
        return self.num_bits < 16

    @property
    def native(self) -> bool:
        """Whether values travel as they are."""
        return self.dtype is None and not self.low_bit

    def _wire_dtype(self, x: Tensor) -> torch.dtype:
        """Without a plan; 16-bit values travel as they are."""
        return x.dtype if self.dtype is None or x.element_size() == 2 else self.dtype

    def _pack(self, x: Tensor, rank: int) -> Tensor:
        if self.scale.device != x.device:  # plans are loaded on the CPU
            self.to(x.device)
        return hybrid_pack(x, self.scale[rank], self.zero_point[rank], self.bf16_idx, self.low_idx, self.num_bits)

    def _unpack_reduce(self, messages: Tensor) -> Tensor:
        return hybrid_unpack_reduce(messages, self.scale, self.zero_point, self.bf16_idx, self.low_idx, self.num_bits)

    def _count(self, message: Tensor, values: int) -> None:
        self.traffic.bytes += message.nbytes
        self.traffic.values += values


class HybridReducer(_Reducer):
    """All-reduce over the ranks of `tp_group` at one site.

    plan: the site's SitePlan; without one values travel as `dtype`, None being their own. Raises LowBitError where the
    plan is for another number of ranks.
    """

    def __init__(self, plan: SitePlan | None, tp_group: dist.ProcessGroup, dtype: torch.dtype | None = torch.bfloat16):
        super().__init__(plan, dtype)
        self.tp_group = tp_group
        self.tp_rank = dist.get_rank(tp_group)
        size = dist.get_world_size(tp_group)
        if plan is not None and plan.scale.shape[0] != size:
            raise LowBitError(
                f"the communication plan is for tp_size {plan.scale.shape[0]}, this group has {size} ranks"
            )

    def all_reduce(self, x: Tensor) -> Tensor:
        """This rank's partial sums [..., E] -> the group's sum, in x's dtype; the gradient passes as it is."""
        return _ReduceFromTensorParallelRegion.apply(x, self)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's partial sums [length, ..., E] -> rank r's slice r of the sum [length / N, ..., E]; bit for bit
        that slice of all_reduce where the values are low-bit. The gradient is all-gathered in full precision.

        The first half of sequence parallelism (Megatron's [length, batch, hidden]); length is a multiple of N.
        """
        return _ReduceScatterToSequenceParallelRegion.apply(x, self)

    def _forward(self, x: Tensor) -> Tensor:
        if not self.low_bit:
            # The copy keeps the caller's tensor out of the in-place all-reduce.
            message = x.to(self._wire_dtype(x), copy=True).contiguous()
            self._count(message, x.numel())
            dist.all_reduce(message, group=self.tp_group)
            return message.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        message = self._pack(rows, self.tp_rank)
        self._count(message, x.numel())
        return self._unpack_reduce(all_gather_stack(message, self.tp_group)).to(x.dtype).view(x.shape)

    def _forward_scatter(self, x: Tensor) -> Tensor:
        """Rank r gets every rank's rows r: one all-to-all of messages, decoded and added in rank order."""
        size = dist.get_world_size(self.tp_group)
        shape = (x.shape[0] // size, *x.shape[1:])
        if not self.low_bit:
            message = x.to(self._wire_dtype(x)).contiguous()
            self._count(message, x.numel())
            total = message.new_empty(shape)
            reduce_scatter(total, message, self.tp_group)
            return total.to(x.dtype)
        message = self._pack(x.reshape(-1, x.shape[-1]), self.tp_rank)
        self._count(message, x.numel())
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message, group=self.tp_group)
        return self._unpack_reduce(received.unflatten(0, (size, -1))).to(x.dtype).view(shape)


class HybridGather(_Reducer):
    """All-gather of activations at one site: the other half of sequence parallelism, before a column-parallel linear.

    plan: scale and zero_point [1, E], of the activation itself, which is the same on every rank.
    """

    def __init__(self, plan: SitePlan, tp_group: dist.ProcessGroup):
        super().__init__(plan)
        self.tp_group = tp_group
        if plan.scale.shape[0] != 1:
            raise LowBitError(f"a plan of one sender's ranges is needed here, not of {plan.scale.shape[0]}")

    def all_gather(self, x: Tensor) -> Tensor:
        """x [length / N, ..., E] -> [length, ..., E] in rank order; the gradient is reduce-scattered, not quantized."""
        return _GatherFromSequenceParallelRegion.apply(x, self)

    def _forward(self, x: Tensor) -> Tensor:
        message = self._pack(x.reshape(-1, x.shape[-1]), 0)
        self._count(message, x.numel())
        messages = all_gather_stack(message, self.tp_group).flatten(0, 1)
        return self._unpack_reduce(messages.unsqueeze(0)).to(x.dtype).view(-1, *x.shape[1:])


class VirtualReducer(_Reducer):
    """HybridReducer's twin for one process that holds the partial sums of all ranks. Counts the bytes of one rank."""

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """Partial sums [..., E] of ranks 0 .. N-1 -> their sum, in their dtype; each gets the gradient as it is."""
        return _VirtualReduce.apply(self, *partials)

    def _forward(self, partials: Sequence[Tensor]) -> Tensor:
        x = partials[0]
        if not self.low_bit:
            dtype = self._wire_dtype(x)
            exact = torch.promote_types(dtype, torch.float32)
            total = torch.stack([p.to(dtype) for p in partials]).to(exact).sum(0).to(dtype)
            self._count(total, x.numel())
            return total.to(x.dtype)
        if len(partials) != len(self.scale):
            raise LowBitError(
                f"the communication plan is for tp_size {len(self.scale)}, there are {len(partials)} shards"
            )
        messages = torch.stack([self._pack(p.reshape(-1, x.shape[-1]), rank) for rank, p in enumerate(partials)])
        self._count(messages[0], x.numel())
        return self._unpack_reduce(messages).to(x.dtype).view(x.shape)


class _VirtualReduce(torch.autograd.Function):
    """_ReduceFromTensorParallelRegion for all ranks at once."""

    @staticmethod
    def forward(ctx, reducer: VirtualReducer, *partials: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks = len(partials)
        return reducer._forward(partials)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return (None, *[grad] * ctx.ranks)


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


class _GatherFromSequenceParallelRegion(torch.autograd.Function):
    """Forward the quantized all-gather along the first dimension, backward the reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: HybridGather) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.shape = gather.tp_group, x.shape
        return gather._forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        mine = grad.new_empty(ctx.shape)
        reduce_scatter(mine, grad.contiguous(), ctx.group)
        return mine, None
