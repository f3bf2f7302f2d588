"""Capture what the linears of a block read, batch by batch, and run their owner on another input in its place.

A block's forward is stopped as soon as the tensor that is wanted is there; the rest of it is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.comm.observers import as_windows

OwnerForward = Callable[[Tensor], Tensor]


class _StopForward(Exception):
    """End a block's forward where its rest would be computed for nobody."""


def captured_inputs(
    block: nn.Module, group: InputGroup, forwards: Iterable[tuple[Callable[[], Any], Tensor]]
) -> Iterator[tuple[Tensor, Tensor, OwnerForward]]:
    """Yield (x, mask, owner_forward) for every batch.

    forwards: (forward of the block on a batch, its mask, bool [windows, length]). x: what the group's linears read,
    [windows, length, features]. owner_forward(other x): what the group's owner then hands to its row-parallel linear,
    [windows, length, features of that]; other x may be wider than x.
    """
    owner, row = block.get_submodule(group.owner), block.get_submodule(group.row)
    linears = [block.get_submodule(name) for name in group.linears]
    for forward, mask in forwards:
        with _recorded_call(owner) as calls:
            x = _input_of(linears[0], forward)
        args, kwargs = calls.pop()

        def owner_forward(other: Tensor, args=args, kwargs=kwargs, x=x, forward=forward, mask=mask) -> Tensor:
            other = other.view(*x.shape[:-1], other.shape[-1])
            if any(value is x for value in (*args, *kwargs.values())):
                new_args = tuple(other if value is x else value for value in args)
                new_kwargs = {name: other if value is x else value for name, value in kwargs.items()}
                return as_windows(_input_of(row, lambda: owner(*new_args, **new_kwargs)), mask)
            # The owner makes its linears' input itself: the block runs, and they are given the other one.
            with _replaced_inputs(linears, other):
                return as_windows(_input_of(row, forward), mask)

        yield as_windows(x, mask), mask, owner_forward


def arguments_of(module: nn.Module, forward: Callable[[], Any]) -> tuple[Any, ...]:
    """Run `forward` until `module` is called, and return the arguments of that call, those with names last."""
    seen: list[tuple[Any, ...]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values()))
        raise _StopForward

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _StopForward:
        pass
    finally:
        handle.remove()
    return seen.pop()


def _input_of(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    return arguments_of(module, forward)[0]


@contextmanager
def _recorded_call(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collect the (args, kwargs) that `module` is called with inside the context."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _replaced_inputs(modules: Sequence[nn.Module], x: Tensor) -> Iterator[None]:
    """Give `modules` x instead of their own input inside the context."""
    handles = [module.register_forward_pre_hook(lambda *_: (x,)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
