"""one_shot (Dong et al., arXiv 2411.07942): every rank packs its partial sums [tokens, E] into one message, all ranks
gather all messages, decode them and add them up in float32 in rank order.

With b bits per value a rank receives (N - 1) b bits per value, and a value is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_lowbit.comm.collectives.base import Collective, Drifted, Formats, Ranks, Traffic, as_rows, register
from megatron_lowbit.comm.exchange import PendingMessages, in_pieces


@register("one_shot")
class OneShot(Collective):
    scatters: ClassVar[bool] = False

    def __init__(self, formats: Formats):
        super().__init__(formats)
        self.format = formats.first()

    def all_reduce(self, x: Tensor, ranks: Ranks, reuse: bool, drifted: Drifted | None) -> Tensor | None:
        rows, exchange = as_rows(x), ranks.exchange()
        y = x if reuse and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = y.view(rows.shape)

        def send(message: Tensor, piece: Tensor, total: Tensor) -> tuple[PendingMessages, Tensor]:
            ranks.traffic.count(message, piece.numel())
            return exchange.all_gather(message), total

        def pack_and_send(piece: Tensor, total: Tensor) -> tuple[PendingMessages, Tensor]:
            return send(self.format.pack(piece, ranks.rank), piece, total)

        def add_up(gather: PendingMessages, total: Tensor) -> None:
            self.format.unpack_reduce_into(gather.wait(), total)

        if drifted is not None:  # all rows are one piece, encoded before any is sent
            message = self.format.pack(rows, ranks.rank)
            if drifted():
                return None
            add_up(*send(message, rows, sums))
        else:
            exchange.pipeline(in_pieces(rows, sums, ranks.size, 1), pack_and_send, add_up)
        return y

    def reduce_scatter(self, x: Tensor, ranks: Ranks, drifted: Drifted | None) -> Tensor | None:
        """Reduce-scatter by one all-to-all: rank r gets every rank's rows r only, decodes them and adds them up."""
        message = self.format.pack(as_rows(x), ranks.rank)
        if drifted is not None and drifted():
            return None
        ranks.traffic.count(message, x.numel())
        received = ranks.exchange().all_to_all(message, [len(message) // ranks.size] * ranks.size).wait()
        return self.format.unpack_reduce(received, x.dtype).view(len(x) // ranks.size, *x.shape[1:])

    def simulate(self, partials: Sequence[Tensor], traffic: Traffic, drifted: Drifted | None) -> Tensor | None:
        x = partials[0]
        messages = torch.stack([self.format.pack(as_rows(own), rank) for rank, own in enumerate(partials)])
        if drifted is not None and drifted():
            return None
        traffic.count(messages[0], x.numel())
        return self.format.unpack_reduce(messages, x.dtype).view(x.shape)

    def link_bytes(self, tokens: int, features: int, ranks: int) -> float:
        return (ranks - 1) * tokens * self.format.row_bytes
