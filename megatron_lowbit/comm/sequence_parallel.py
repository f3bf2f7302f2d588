"""HybridGather: the low-bit all-gather of sequence parallelism, which sends the normed activation back to all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.agreement import Agreement
from megatron_lowbit.comm.codec import Codec, WireFormat
from megatron_lowbit.comm.collectives.base import Traffic
from megatron_lowbit.comm.drift import DriftGuard, Saturation
from megatron_lowbit.comm.exchange import Exchange
from megatron_lowbit.comm.reducers import OverRanks
from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime.distributed import reduce_scatter


class HybridGather(OverRanks):
    """All-gather of activations at one site: the other half of sequence parallelism, before a column-parallel linear.

    codec: of one sender, the activation itself, whose ranges are the same on every rank. drift_threshold: as
    comm.drift_threshold (drift.py).
    """

    def __init__(self, codec: Codec, tp_group: dist.ProcessGroup, drift_threshold: float | None = None):
        super().__init__()
        if codec.senders != 1:
            raise LowBitError(f"a plan of one sender's ranges is needed here, not of {codec.senders}")
        self.format, self.tp_group, self.traffic = WireFormat(codec), tp_group, Traffic()
        self.guard = DriftGuard(drift_threshold, [self.format])
        tensors = codec.tensors().items()
        self.agreement = Agreement(tp_group, [drift_threshold, *(part for item in tensors for part in item)])

    def set_site(self, site: str) -> None:
        """Give it the site's name, which messages then say."""
        self.agreement.site = self.guard.site = site

    def saturation(self) -> Saturation:
        """Return what this process has encoded so far, and whether the site has fallen back. Waits for the device."""
        return self.guard.saturation()

    def all_gather(self, x: Tensor) -> Tensor:
        """All-gather x [length / N, ..., E] -> [length, ..., E] in rank order; the gradient is reduce-scattered, not
        quantized."""
        return _GatherFromSequenceParallelRegion.apply(x, self)

    def _forward(self, x: Tensor) -> Tensor:
        y = self._gather(x)
        self.guard.look(y)
        return y

    def _gather(self, x: Tensor) -> Tensor:
        self.agreement.check(x, share=dist.get_world_size(self.tp_group))
        if self.guard.tripped:
            return self._stock(x)
        message = self.format.pack(x.reshape(-1, x.shape[-1]), 0)
        if self.guard.due(x) and self.guard.trips(self.agreement.largest, x, dist.get_rank(self.tp_group)):
            return self._stock(x)
        gathered = self._gathered(message, x.numel())
        return self.format.unpack_reduce(gathered.flatten(0, 1).unsqueeze(0), x.dtype).view(-1, *x.shape[1:])

    def _stock(self, x: Tensor) -> Tensor:
        message = x if x.element_size() == 2 else x.to(torch.bfloat16)
        return self._gathered(message.contiguous(), x.numel()).flatten(0, 1).to(x.dtype)

    def _gathered(self, message: Tensor, values: int) -> Tensor:
        self.traffic.count(message, values)
        return Exchange(self.agreement).all_gather(message).wait()


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
