"""Counts what a piece of code hands to torch.distributed, from outside: every collective is wrapped while in use."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import distributed as dist

# {function: position of the tensor, or list of tensors, that this rank sends}
_SENT = {
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,  # its name from torch 2.13 on
    "all_gather": 1,
    "all_reduce": 0,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "gather": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "scatter": 0,
    "all_gather_coalesced": 1,
    "all_reduce_coalesced": 0,
    "all_gather_object": 1,
    "broadcast_object_list": 0,
    "barrier": None,
}


class RecordedCollectives:
    """Context manager; `calls` is [(name, bytes that this rank sent, dtype)] in order, objects counting as 0 bytes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self._real: dict[str, Any] = {}
        self._send = vars(dist.ProcessGroup)["send"]  # as it is in the class: what getattr gives would not be a method

    def __enter__(self) -> RecordedCollectives:
        for name, position in _SENT.items():
            if not hasattr(dist, name):  # not in this version of torch
                continue
            self._real[name] = getattr(dist, name)
            setattr(dist, name, self._recorded(name, self._real[name], position))

        def send(group: dist.ProcessGroup, tensors: list[torch.Tensor], *where: int) -> dist.Work:
            self._count("send", tensors)
            return self._send.__get__(group)(tensors, *where)

        dist.ProcessGroup.send = send  # what send and isend of torch.distributed call, too
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)
        dist.ProcessGroup.send = self._send

    def _count(self, name: str, sent: Any) -> None:
        tensors = [t for t in (sent if isinstance(sent, list) else [sent]) if isinstance(t, torch.Tensor)]
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "object"
        self.calls.append((name, sum(t.nbytes for t in tensors), dtype))

    def _recorded(self, name: str, function: Any, position: int | None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(function).bind(*args, **kwargs)
            self._count(name, None if position is None else bound.args[position])
            return function(*args, **kwargs)

        return call
