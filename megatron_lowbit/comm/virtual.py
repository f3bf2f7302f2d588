"""VirtualReducer: the low-bit all-reduce for ranks inside one process, which holds the partial sums of all of them.

It runs the same kernels on the same bytes as HybridReducer, so its result is bit-identical to that of N real ranks. (In
bf16 mode that holds for N = 2; beyond, the order in which a stock all-reduce adds, and rounds, is the backend's own.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lowbit.comm.reducers import LOW_BIT, _Reducer
from megatron_lowbit.config import LowBitError


class VirtualReducer(_Reducer):
    """HybridReducer's twin for one process that holds the partial sums of all ranks. Counts the bytes of one rank."""

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """Partial sums [..., E] of ranks 0 .. N-1 -> their sum, in their dtype; each gets the gradient as it is."""
        return _VirtualReduce.apply(self, *partials)

    def _forward(self, partials: Sequence[Tensor]) -> Tensor:
        y = self._sum(partials)
        self.guard.look(y)
        return y

    def _sum(self, partials: Sequence[Tensor]) -> Tensor:
        x, ranks = partials[0], len(partials)
        if self.low_bit and self.plan is not None and ranks != self.plan.tp_size:
            raise LowBitError(f"the communication plan is for tp_size {self.plan.tp_size}, there are {ranks} shards")
        rows = [p.reshape(-1, x.shape[-1]) for p in partials]
        mode = self._mode_of(x)
        if mode not in LOW_BIT:
            return self._stock(partials)
        check = self.guard.due(x)
        if mode == "exact_sum":
            assert self.exact is not None
            codes = [self.exact.encode(own, rank) for rank, own in enumerate(rows)]
            if check and self._drifted(x):
                return self._stock(partials)
            self.traffic.count(codes[0], x.numel())
            return self.exact.decode(self.exact.add(codes), x.dtype).view(x.shape)
        assert self.first is not None
        messages = torch.stack([self.first.pack(own, rank) for rank, own in enumerate(rows)])
        if mode == "one_shot":
            if check and self._drifted(x):
                return self._stock(partials)
            self.traffic.count(messages[0], x.numel())
            return self.first.unpack_reduce(messages, x.dtype).view(x.shape)
        assert self.second is not None
        self.traffic.count(messages[0], x.numel())
        stripes = messages.split(-(-len(rows[0]) // ranks) or 1, dim=1)
        sums = [self.first.requantize(stripe.contiguous(), self.second, rank) for rank, stripe in enumerate(stripes)]
        if check and self._drifted(x):
            self.traffic.values -= x.numel()  # they are sent again
            return self._stock(partials)
        self.traffic.count(sums[0])
        return self.second.unpack_reduce(torch.cat(sums).unsqueeze(0), x.dtype).view(x.shape)

    def _stock(self, partials: Sequence[Tensor]) -> Tensor:
        x, dtype = partials[0], self._wire_dtype(partials[0])
        exact = torch.promote_types(dtype, torch.float32)
        total = torch.stack([p.to(dtype) for p in partials]).to(exact).sum(0).to(dtype)
        self.traffic.count(total, x.numel())
        return total.to(x.dtype)


class _VirtualReduce(torch.autograd.Function):
    """_ReduceFromTensorParallelRegion for all ranks at once."""

    @staticmethod
    def forward(ctx, reducer: VirtualReducer, *partials: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks = len(partials)
        return reducer._forward(partials)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return (None, *[grad] * ctx.ranks)
