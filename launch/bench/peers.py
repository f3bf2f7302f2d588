"""What `benchmark collectives` compares with: stock all-reduces, and the two-shot scheme of dynamic int4 groups that
other systems use. Nothing else in the package runs them.

    GroupInt4   32 neighbouring values share one float16 scale s = max|x| / 7, found anew for every message:

                    q = clamp(round(x / s), -7, 7)       18 bytes per group: 2 of s, 16 of codes: 4.5 bits per value

                Rank r gets every rank's codes for its stripe of the groups (all-to-all), decodes and adds them up in
                float32, rounds the sum with scales of its own, and all ranks gather the sums.

VirtualGroupInt4 is the same for one process that holds the partial sums of all ranks: the same bits, in one hop or two.

It is written in plain torch, where our own formats have compiled kernels, so its measured seconds are an upper bound of
what it costs: to compare schemes rather than kernels, read `ideal_seconds`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.collectives.base import Traffic
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.runtime.distributed import all_gather_stack

GROUP = 32  # values that share a scale
GROUP_BYTES = 2 + GROUP // 2
LARGEST = 7  # of the symmetric 4-bit codes -7 .. 7
CHUNK = 8192  # groups worked on at once: 1 MiB in float32, which stays in a cache and needs no fresh pages


class StockAllReduce:
    """torch.distributed's own all-reduce of the values as they are. Works in place, as its users call it."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.traffic = group, Traffic()

    def all_reduce(self, x: Tensor, reuse: bool = False) -> Tensor:
        self.traffic.count(x, x.numel())
        dist.all_reduce(x, group=self.group)
        return x


class GroupInt4:
    """All-reduce in two hops of dynamic int4 groups of 32; every rank ends with the same bits."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.traffic = group, Traffic()

    def all_reduce(self, x: Tensor, reuse: bool = False) -> Tensor:
        """All-reduce this rank's partial sums, any shape -> the group's sum, in x's dtype."""
        size = dist.get_world_size(self.group)
        message = quantize_groups(_in_groups(x, size))
        self.traffic.count(message, x.numel())
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message, group=self.group)
        stripe = quantize_groups(sum_in_order(received.view(size, -1, GROUP_BYTES)))
        self.traffic.count(stripe)
        sums = all_gather_stack(stripe, self.group).flatten(0, 1)
        return sum_in_order(sums.unsqueeze(0), x.dtype).flatten()[: x.numel()].view(x.shape)


class VirtualGroupInt4(VirtualReducer):
    """GroupInt4 of all ranks in one process; counts the bytes of one rank.

    hops: 2, or 1, where every rank gathers all messages whole and adds them up, as one_shot does.
    """

    def __init__(self, hops: int):
        super().__init__(None, "bf16")  # no plan: the scales are found anew for every message
        self.hops = hops

    def _forward(self, partials: Sequence[Tensor]) -> Tensor:
        x, size = partials[0], len(partials)
        messages = torch.stack([quantize_groups(_in_groups(p, size if self.hops == 2 else 1)) for p in partials])
        self.traffic.count(messages[0], x.numel())
        if self.hops == 2:
            sums = quantize_groups(sum_in_order(messages))
            self.traffic.count(sums[: len(sums) // size])
            messages = sums.unsqueeze(0)
        return sum_in_order(messages, x.dtype).flatten()[: x.numel()].view(x.shape)


def _in_groups(x: Tensor, ranks: int) -> Tensor:
    """Cut x, of any shape, into [groups, 32]: whole groups, and as many for every rank; zeros do no harm to a scale."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % (GROUP * ranks))).view(-1, GROUP)


def quantize_groups(x: Tensor) -> Tensor:
    """Quantize float [groups, 32] -> uint8 [groups, 18]: the scale's two bytes, then codes + 8, value i beside
    value i + 16."""
    message = torch.empty(len(x), GROUP_BYTES, dtype=torch.uint8, device=x.device)
    for part, out in zip(x.split(CHUNK), message.split(CHUNK), strict=True):
        values = part.float()
        largest = values.abs().amax(1, keepdim=True)
        scale = (largest / LARGEST).clamp_(max=torch.finfo(torch.float16).max).half()
        # A group of tiny values has scale 0 in float16, and its codes are 0 whatever it is divided by.
        codes = (values / scale.float().masked_fill_(scale == 0, torch.inf)).round_().clamp_(-LARGEST, LARGEST)
        whole = codes.add_(8).to(torch.uint8)
        out[:, :2] = scale.view(torch.uint8)
        out[:, 2:] = whole[:, : GROUP // 2] | whole[:, GROUP // 2 :] << 4
    return message


def sum_in_order(messages: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum uint8 [senders, groups, 18] -> the decoded sum [groups, 32], added in float32."""
    total = torch.empty(messages.shape[1], GROUP, dtype=dtype, device=messages.device)
    for parts, out in zip(messages.split(CHUNK, dim=1), total.split(CHUNK), strict=True):
        exact = _decode(parts[0])
        for part in parts[1:]:
            exact += _decode(part)
        out.copy_(exact)
    return total


def _decode(message: Tensor) -> Tensor:
    """Decode uint8 [groups, 18] -> float32 [groups, 32]."""
    scale = message[:, :2].contiguous().view(torch.float16).float()
    packed = message[:, 2:]
    return torch.cat([packed & 15, packed >> 4], dim=1).float().sub_(8).mul_(scale)
