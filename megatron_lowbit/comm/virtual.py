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
    """The low-bit all-reduce of one site, for ranks inside one process that holds the partial sums of all of them.

    It gives the same bits as as many processes with a HybridReducer (in bf16 that holds for two), and counts the bytes
    that one rank would send.

    Args:
        plan: the site's SitePlan (CommPlan.sites); None for the modes bf16 and native, which need none.
        mode: native (a plain sum in the dtype of the partial sums), bf16, one_shot, two_shot, exact_sum or auto; None:
            one_shot with a plan, bf16 without.
        drift_threshold: the share of values beyond their calibrated ranges above which the site falls back to bf16;
            None: it never does, but logs a warning.
        costs: the CostTable that auto chooses by.

    Raises:
        LowBitError: the plan lacks what the mode needs.

    Example:
        >>> import torch
        >>> import megatron_lowbit as lowbit
        >>> site = lowbit.Artifact.load("artifact").plan(2).sites["model.layers.0.mlp.down_proj"]
        >>> reducer = lowbit.VirtualReducer(site)
        >>> reducer.all_reduce([torch.zeros(5, 64), torch.zeros(5, 64)]).shape
        torch.Size([5, 64])
        >>> reducer.traffic.bits_per_value < 6
        True
    """

    def all_reduce(self, partials: Sequence[Tensor]) -> Tensor:
        """Add up the partial sums of all ranks. Each gets the gradient as it is.

        Args:
            partials: of ranks 0 .. N-1, each [..., features], float32, bf16 or float16, all of one shape.

        Returns:
            Their sum, of the same shape and dtype.

        Raises:
            LowBitError: the plan is for another number of ranks.
        """
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
