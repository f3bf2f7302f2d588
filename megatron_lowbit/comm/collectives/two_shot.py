"""two_shot (ours): rank r gets every rank's message for its stripe of the tokens, decodes and adds, packs the sum with
ranges of its own, and all ranks gather the packed sums.

With b bits per value, and b' in the second hop, a rank receives (N - 1) / N (b + b') bits per value: from N = 3 on
fewer than in one_shot, for one more rounding. The owner of a stripe, too, uses what it sent, so that all ranks end with
the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lowbit.comm.collectives.base import Drifted, Formats, Ranks, Traffic, as_rows, register
from megatron_lowbit.comm.collectives.one_shot import OneShot
from megatron_lowbit.comm.exchange import PendingMessages, in_pieces
from megatron_lowbit.comm.plan import SitePlan


@register("two_shot")
class TwoShot(OneShot):
    """Its first hop is the reduce-scatter of one_shot."""

    scatters = True

    def __init__(self, formats: Formats):
        super().__init__(formats)
        self.second = formats.second()

    @classmethod
    def possible(cls, plan: SitePlan) -> bool:
        return plan.second is not None

    def all_reduce(self, x: Tensor, ranks: Ranks, reuse: bool, drifted: Drifted | None) -> Tensor | None:
        """Add up stripes of ceil(tokens / N) neighbouring tokens of a piece, the last ones padded."""
        rows, exchange = as_rows(x), ranks.exchange()
        y = x if reuse and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = y.view(rows.shape)

        def scatter(piece: Tensor, total: Tensor) -> tuple[PendingMessages, Tensor]:
            message = self.format.pack(piece, ranks.rank)
            ranks.traffic.count(message, piece.numel())
            each = -(-len(piece) // ranks.size)
            sizes = [max(0, min(each, len(piece) - rank * each)) for rank in range(ranks.size)]
            return exchange.all_to_all(message, sizes), total

        def requantize(scattered: PendingMessages) -> Tensor:
            return self.format.requantize(scattered.wait(), self.second)

        def gather_stripes(stripe: Tensor, total: Tensor) -> tuple[PendingMessages, Tensor]:
            missing = -(-len(total) // ranks.size) - len(stripe)
            stripe = torch.nn.functional.pad(stripe, (0, 0, 0, missing)) if missing else stripe
            ranks.traffic.count(stripe)
            return exchange.all_gather(stripe), total

        def requantize_and_gather(scattered: PendingMessages, total: Tensor) -> tuple[PendingMessages, Tensor]:
            return gather_stripes(requantize(scattered), total)

        def decode(gathered: PendingMessages, total: Tensor) -> None:
            stripes = gathered.wait().flatten(0, 1)[: len(total)]
            self.second.unpack_reduce_into(stripes.unsqueeze(0), total)

        if drifted is not None:  # the second hop encodes what the first one brings, so that one has been sent
            scattered, total = scatter(rows, sums)
            stripe = requantize(scattered)
            if drifted():
                ranks.traffic.values -= rows.numel()  # they are sent again
                return None
            decode(*gather_stripes(stripe, total))
        else:
            exchange.pipeline(in_pieces(rows, sums, ranks.size, ranks.size), scatter, requantize_and_gather, decode)
        return y

    def simulate(self, partials: Sequence[Tensor], traffic: Traffic, drifted: Drifted | None) -> Tensor | None:
        x, ranks = partials[0], len(partials)
        messages = torch.stack([self.format.pack(as_rows(own), rank) for rank, own in enumerate(partials)])
        traffic.count(messages[0], x.numel())
        stripes = messages.split(-(-messages.shape[1] // ranks) or 1, dim=1)
        sums = [self.format.requantize(stripe.contiguous(), self.second, rank) for rank, stripe in enumerate(stripes)]
        if drifted is not None and drifted():
            traffic.values -= x.numel()  # they are sent again
            return None
        traffic.count(sums[0])
        return self.second.unpack_reduce(torch.cat(sums).unsqueeze(0), x.dtype).view(x.shape)

    def link_bytes(self, tokens: int, features: int, ranks: int) -> float:
        return (ranks - 1) * -(-tokens // ranks) * (self.format.row_bytes + self.second.row_bytes)
