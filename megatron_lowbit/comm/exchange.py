"""Messages from every rank of a group to every other: stock collectives, or on a CPU, for large ones, pairwise rounds.

    round k = 1 .. N - 1    rank r sends to rank r + k, and receives from rank r - k (mod N)

So each link carries one message each way. gloo's all-to-all starts all N - 1 at once; they share links unevenly, and
what is left of the slow ones cannot fill theirs. Its all-gather is a ring, whose ranks wait for each other N - 1 times.
Here a round's message travels in two halves, of which two are under way at a time: while one ends, the next is there,
and mostly on the same connection. Milliseconds in gloo's all-to-all, its all-gather, and like this, over four links of
100 Mbit/s for 0.28 MB from every rank to every other: 105.6, 73.2, 68.6, where their bits take 66.0; over links of
1 Gbit/s for 1.1 MB: 46.7, 35.8, 33.6, and 26.4.

Small messages are latency, and on a CPU all of them travel in one all-to-all. On a GPU stock collectives do it all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.agreement import Agreement
from megatron_lowbit.runtime.distributed import start_all_gather

UNDER_WAY = 2  # halves of messages
TAG = 0  # of messages; those of a pair of ranks arrive in order
MOST_PIECES = 4  # of a message, so that a CPU packs and adds one up while others are on their way
PIECE_VALUES = 2**20  # from one rank to another: 512 KiB of 4 bits. Smaller ones cost more than they hide
LARGE = 2**17  # bytes from one rank to another from which rounds are faster


class PendingMessages:
    """Messages of a collective that are under way; `wait` returns what this rank has received."""

    def __init__(self, agreement: Agreement, received: Tensor, halves: list[list[dist.Work | None]]):
        self.agreement, self.received, self.halves = agreement, received, halves

    def wait(self) -> Tensor:
        with self.agreement:
            for works in self.halves:
                finish(works)
        return self.received


class Exchange:
    """Collectives of the ranks of `agreement`, which says what fails; all ranks start the same ones, in one order."""

    def __init__(self, agreement: Agreement):
        self.agreement, self.group = agreement, agreement.group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.under_way: deque[list[dist.Work | None]] = deque()

    def all_gather(self, message: Tensor) -> PendingMessages:
        """Gather message [...], the same shape on every rank -> [N, ...] in rank order."""
        with self.agreement:
            if message.is_cuda:
                work, gathered = start_all_gather(message, self.group)
                return PendingMessages(self.agreement, gathered, [[work]])
            gathered = message.new_empty(self.size, *message.shape)
            if message.nbytes >= LARGE:
                return self._rounds([message] * self.size, gathered)
            copies = message.expand_as(gathered).contiguous()
            work = dist.all_to_all_single(gathered, copies, group=self.group, async_op=True)
            return PendingMessages(self.agreement, gathered, [[work]])

    def all_to_all(self, message: Tensor, sizes: list[int]) -> PendingMessages:
        """Exchange message [sum(sizes), ...]; rank r gets the sizes[r] rows that are its own from all: [N, sizes[r],
        ...]."""
        mine = sizes[self.rank]
        received = message.new_empty(self.size, mine, *message.shape[1:])
        with self.agreement:
            if not message.is_cuda and message[: max(sizes)].nbytes >= LARGE:
                return self._rounds(message.split(sizes), received)
            work = dist.all_to_all_single(
                received.flatten(0, 1), message, [mine] * self.size, sizes, group=self.group, async_op=True
            )
            return PendingMessages(self.agreement, received, [[work]])

    def _rounds(self, send: Sequence[Tensor], received: Tensor) -> PendingMessages:
        """Send send[r] to rank r and receive received[r] from it. Returns when the last round has begun."""
        received[self.rank].copy_(send[self.rank])
        halves = []
        for k in range(1, self.size):
            to, by = (self.rank + k) % self.size, (self.rank - k) % self.size
            for ours, theirs in zip_longest(send[to].chunk(2), received[by].chunk(2)):
                if len(self.under_way) == UNDER_WAY:
                    finish(self.under_way.popleft())
                works: list[dist.Work | None] = []
                if theirs is not None and theirs.numel():  # shares of a few tokens may be empty
                    works.append(self.group.recv([theirs], by, TAG))  # dist.irecv and isend check more than they send
                if ours is not None and ours.numel():
                    works.append(self.group.send([ours], to, TAG))
                halves.append(works)
                self.under_way.append(works)
        return PendingMessages(self.agreement, received, halves)

    def pipeline(self, pieces: Iterable[tuple[Any, ...]], *stages: Callable[..., Any]) -> None:
        """Run each piece through all stages, whose results are the next one's arguments. A stage is a piece behind the
        one before: by then its messages have arrived, and newer ones are under way while it computes."""
        states = list(pieces)
        for step in range(len(states) + len(stages) - 1):
            for number, stage in enumerate(stages):
                piece = step - number
                if 0 <= piece < len(states):
                    states[piece] = stage(*states[piece])


def finish(works: list[dist.Work | None]) -> None:
    """Wait for all, once: gloo would take a second wait for that of another message."""
    while works:
        if work := works.pop():
            work.wait()


def in_pieces(rows: Tensor, sums: Tensor, ranks: int, receivers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows [tokens, E], and the place where their sums are to go, into up to MOST_PIECES, each of a multiple of
    `ranks` tokens, or the last; receivers: ranks that share a piece."""
    count = 1 if rows.is_cuda else min(MOST_PIECES, max(1, rows.numel() // (PIECE_VALUES * receivers)))
    each = max(1, -(-len(rows) // (count * ranks)) * ranks)
    return zip(rows.split(each), sums.split(each), strict=True)
