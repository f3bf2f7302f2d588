"""Ops of PyTorch for calls of a few microseconds.

custom_op does more at every call, 70 microseconds of it before a token is packed and 110 where an op writes to an
argument, against 10 here (measured around the CPU kernels): its backward raises, where here it warns and has no
gradient, and it counts writes to arguments, which a kernel here does itself (`written`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library


def define(schema: str, reference: Callable[..., Any]) -> Any:
    """Define the op megatron_lowbit::<schema>, which is `reference` where no kernel is registered."""
    name, bracket, types = schema.partition("(")
    qualified = f"megatron_lowbit::{name}"
    library.define(qualified, bracket + types, tags=torch.Tag.pt2_compliant_tag)
    library.impl(qualified, "default", reference)
    return getattr(torch.ops.megatron_lowbit, name).default


def fake(op: Any) -> Callable[..., Any]:
    """Decorate what makes its results' shapes and dtypes, for torch.compile and CUDA graphs."""
    return library.register_fake(op.name())


def kernel(op: Any, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate its kernel for a type of device, which torch.compile does not look into."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        library.register_kernel(op.name(), device, function)
        return function

    return register


def written(out: torch.Tensor) -> None:
    """Note that a kernel wrote to its argument, through a pointer: what autograd saved of it is void."""
    torch.autograd.graph.increment_version(out)
