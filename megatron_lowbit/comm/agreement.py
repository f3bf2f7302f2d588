"""What the ranks of a collective have to agree on, and what a collective that fails says.

Backends do not check it. With other numbers of tokens (or bytes per token) on one rank, gloo ends the process of a rank
that receives more than it expects (an exception in its own thread: nothing can catch it), and on a rank that receives
less it may return as if nothing were wrong, with stale memory in the result.

So every rank tells the others a digest of its mode and plan before its first collective at a site, and its number of
tokens where that is not the number of the call before, at whatever site: once per forward whose batch has another size,
and never while sizes stay. The ranks agreed on the call before, so either all tell, and compare; or some tell and
others go on. These wait for each other in different operations (gloo keeps a broadcast apart from all that the reducers
use) until the group's time-out, and fail there, on all ranks. On a GPU, where comparing waits for the device, only the
first call at a site is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import LowBitError, one_line

_BATCHES: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # tokens that the ranks agreed on last


class Agreement:
    """An agreement of the ranks of `group` at one site; plan: all that has to be the same on every rank."""

    def __init__(self, group: dist.ProcessGroup, plan: Iterable[object]):
        self.group, self.plan = group, plan
        self.site = ""  # its name in the model, for messages
        self._digest: int | None = None
        self._agreed: tuple[int, torch.dtype] | None = None  # width and dtype that the ranks agreed on

    def check(self, x: Tensor, share: int = 1) -> None:
        """Agree with the other ranks on x [..., features] before it is sent; share: by how many ranks a batch's tokens
        are divided.

        Raises LowBitError on all ranks where they differ.
        """
        # On a CPU an idle operation of torch costs as much as 5 % of a small all-reduce: none is called here.
        tokens = x.shape[:-1].numel()
        batch, kind = share * tokens, (x.shape[-1], x.dtype)
        known = self._agreed == kind
        if known and (x.is_cuda or _BATCHES.get(self.group) == batch):
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._digest = digest(self.plan) if self._digest is None else self._digest
        mine = torch.tensor([digest([self._digest, *kind]), tokens], device=x.device)
        size = dist.get_world_size(self.group)
        every = [mine.clone() for _ in range(size)]
        with self:
            for rank, theirs in enumerate(every):
                dist.broadcast(theirs, dist.get_global_rank(self.group, rank), group=self.group)
        plans, counts = torch.stack(every).t().tolist()
        if len(set(plans)) > 1:
            odd = ", ".join(str(rank) for rank, plan in enumerate(plans) if plan != plans[0])
            raise LowBitError(
                f"{self._where()}tensor-parallel ranks disagree: rank {odd} has another mode, plan, width or dtype "
                "than rank 0; give every rank the same artifact and comm.mode"
            )
        if len(set(counts)) > 1:
            raise LowBitError(
                f"{self._where()}tensor-parallel ranks 0 .. {size - 1} hold {', '.join(map(str, counts))} tokens; "
                "give every rank the same batch"
            )
        self._agreed = kind
        _BATCHES[self.group] = batch

    def largest(self, value: Tensor) -> Tensor:
        """Replace value by the largest of all ranks' values, and return it."""
        with self:
            dist.all_reduce(value, dist.ReduceOp.MAX, self.group)
        return value

    def __enter__(self) -> None:
        """Surround calls of torch.distributed: what they raise becomes a LowBitError that says what probably
        happened."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
            raise LowBitError(
                f"{self._where()}the collective failed on tensor-parallel rank {rank} of {size}: another rank has "
                f"ended or hangs, or the ranks disagree on tokens or plan; see what the others say ({one_line(error)})"
            ) from error

    def _where(self) -> str:
        return f"{self.site}: " if self.site else ""


def digest(parts: Iterable[object]) -> int:
    """Return 63 bits of a SHA-256 of tensors, by their bytes, and of other things, by their repr."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{list(part.shape)}".encode())
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return int.from_bytes(found.digest()[:8], "big") >> 1
