"""Process groups: where this process stands among its peers, and what only one of them should do.

Every function takes the group it works on; None stands for a single process. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT are read here; launcher_env.py sets them whichever launcher it was.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.messages import decode, encode
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.launcher_env import env_rank as env_rank
from megatron_lowbit.runtime.launcher_env import env_world_size as env_world_size
from megatron_lowbit.runtime.launcher_env import launched as launched
from megatron_lowbit.runtime.preemption import Preempted

T = TypeVar("T")


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def make_groups(tp: int, dp: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return (tp_group, dp_group) of this rank; tensor-parallel ranks are neighbours. None for a size of 1."""
    tp_group = dp_group = None
    for first in range(0, tp * dp, tp):
        ranks = list(range(first, first + tp))
        group = dist.new_group(ranks) if tp > 1 else None
        tp_group = group if env_rank() in ranks else tp_group
    for first in range(tp):
        ranks = list(range(first, tp * dp, tp))
        group = dist.new_group(ranks) if dp > 1 else None
        dp_group = group if env_rank() in ranks else dp_group
    return tp_group, dp_group


def device() -> torch.device:
    """Return this rank's device: its GPU where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_steps = 0


def steps() -> int:
    """Return how many meetings of all ranks this one has come to: the same on all of them, unless one is late."""
    return _steps


def _count_step() -> None:
    global _steps
    _steps += 1


class PeerError(LowBitError):
    """A LowBitError that all ranks share and rank 0 reports."""


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 of the world only; all ranks return its value, or raise its LowBitError.

    The value is one of those that messages.py takes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    value, message = None, None
    if dist.get_rank() == 0:
        try:
            value = action()
        except LowBitError as error:
            message = str(error)
    _count_step()
    received = _broadcast([value, message])
    if received[1] is not None:
        raise _shared(received[1])
    return value if dist.get_rank() == 0 else received[0]  # type: ignore[return-value]


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it raises LowBitError on one, all ranks raise that of the first such rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    value, mine = None, None
    try:
        value = action()
    except LowBitError as error:
        mine = str(error)
    _count_step()
    for rank, message in enumerate(all_gather_values(mine, dist.group.WORLD)):
        if message is not None:
            raise _shared(f"rank {rank}: {message}" if rank else message)
    return value  # type: ignore[return-value]


def _shared(message: str) -> LowBitError:
    return LowBitError(message) if dist.get_rank() == 0 else PeerError(message)


def all_gather_values(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the value of every rank, one of those that messages.py takes, in rank order."""
    if group is None:
        return [value]
    mine = encode(value).to(_device_of(group))
    lengths = all_gather_stack(mine.new_tensor([len(mine)], dtype=torch.int64), group).flatten().tolist()
    padded = mine.new_zeros(max(lengths))
    padded[: len(mine)] = mine
    messages = all_gather_stack(padded, group)
    return [decode(message[:length]) for message, length in zip(messages, lengths, strict=True)]


def gather_values(value: Any, group: dist.ProcessGroup) -> list[Any] | None:
    """Gather large values, of those that messages.py takes: the first rank of the group has all, the others get
    None."""
    mine, first = encode(value).to(_device_of(group)), dist.get_global_rank(group, 0)
    lengths = all_gather_stack(mine.new_tensor([len(mine)], dtype=torch.int64), group).flatten().tolist()
    if dist.get_rank(group):
        dist.send(mine, first, group)
        return None
    values = [value]
    for rank, length in enumerate(lengths[1:], 1):
        message = mine.new_empty(length)
        dist.recv(message, dist.get_global_rank(group, rank), group)
        values.append(decode(message))
    return values


def _broadcast(value: Any) -> Any:
    """Return rank 0's value, on all ranks of the world."""
    mine = encode(value if dist.get_rank() == 0 else None).to(_device_of(dist.group.WORLD))
    length = mine.new_tensor([len(mine)], dtype=torch.int64)
    dist.broadcast(length, 0)
    message = mine if dist.get_rank() == 0 else mine.new_empty(int(length))
    dist.broadcast(message, 0)
    return decode(message)


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return where the group's backend takes tensors from."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device()


class PreemptionCheck:
    """Asked once per step, by all ranks at the same steps: whether to go on. One tiny all-reduce each.

    save_every: seconds after which rank 0 also asks for the state to be saved. lag: steps after which an answer is
    used, so that pipeline stages may run ahead of each other.
    """

    GO, SAVE, STOP = range(3)

    def __init__(self, save_every: float | None = None, lag: int = 0):
        self.save_every, self.lag = save_every, lag
        self.saved = time.monotonic()
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_backend() != "gloo":  # a GPU need not be waited for
            self._group = dist.new_group(backend="gloo")

    def step(self) -> int:
        """Return GO, SAVE or STOP, the same on all ranks."""
        request = self._request()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            answer = request
        else:
            _count_step()
            value = torch.tensor([request])
            work = dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True)
            self._pending.append((work, value))  # type: ignore[arg-type]
            if len(self._pending) <= self.lag:
                return self.GO
            work, value = self._pending.popleft()
            work.wait()
            answer = int(value)
        if answer == self.STOP:
            self.close()
        if answer != self.GO:
            self.saved = time.monotonic()
        return answer

    def check(self, message: str = "it starts over when it is run again") -> None:
        """Raise Preempted, on all ranks, once any of them was told to stop."""
        if self.step() == self.STOP:
            raise Preempted(message)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, with a check before each."""
        for item in items:
            self.check()
            yield item
        self.close()

    def close(self) -> None:
        """Wait for the answers that are still on their way."""
        while self._pending:
            self._pending.popleft()[0].wait()

    def _request(self) -> int:
        if preemption.asked():
            return self.STOP
        due = self.save_every is not None and env_rank() == 0 and time.monotonic() - self.saved >= self.save_every
        return self.SAVE if due else self.GO


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> tuple[dist.Work, Tensor]:
    """Start gathering x [...], the same shape on every rank -> [ranks, ...] in rank order once the work is waited
    for."""
    size = dist.get_world_size(group)
    gathered = x.new_empty(size * x.numel())  # flat, because gloo wants the input's number of dimensions
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the new name from torch 2.13 on
    work = all_gather(gathered, x.reshape(-1), group=group, async_op=True)
    return work, gathered.view(size, *x.shape)


def all_gather_stack(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather x [...], the same shape on every rank -> [ranks, ...] in rank order."""
    if group is None:
        return x.unsqueeze(0)
    work, gathered = start_all_gather(x, group)
    work.wait()
    return gathered


def reduce_scatter(output: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """Sum x [length, ...] over the ranks; rank r's slice r of it goes to output [length / N, ...]. Both contiguous."""
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    scatter(output, x, group=group)
