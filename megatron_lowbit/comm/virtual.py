"""VirtualReducer: the low-bit all-reduce for ranks inside one process, which holds the partial sums of all of them.

It runs the same kernels on the same bytes as HybridReducer, so its result is bit-identical to that of N real ranks. (In
bf16 mode that holds for N = 2; beyond, the order in which a stock all-reduce adds, and rounds, is the backend's own.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lowbit.comm.reducers import Reducer
from megatron_lowbit.config import LowBitError


class VirtualReducer(Reducer):
    """HybridReducer's twin for one process that holds the partial sums of all ranks. Counts the bytes of one rank."""

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """Add up the partial sums [..., E] of ranks 0 .. N-1 -> their sum, in their dtype; each gets the gradient as it
        is."""
        return _VirtualReduce.apply(self, *partials)

    def _forward(self, partials: Sequence[Tensor]) -> Tensor:
        ranks = len(partials)
        if self.low_bit and self.plan is not None and ranks != self.plan.tp_size:
            raise LowBitError(f"the communication plan is for tp_size {self.plan.tp_size}, there are {ranks} shards")
        collective, drifted = self._next(partials[0])
        y = collective.simulate(partials, self.traffic, drifted)
        if y is None:
            y = self.stock.simulate(partials, self.traffic, None)
        assert y is not None
        self.guard.look(y)
        return y


class _VirtualReduce(torch.autograd.Function):
    """_ReduceFromTensorParallelRegion for all ranks at once."""

    @staticmethod
    def forward(ctx, reducer: VirtualReducer, *partials: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks = len(partials)
        return reducer._forward(partials)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return (None, *[grad] * ctx.ranks)
