"""Tensors that are read from files: checks of their dtype, shape and values, and short descriptions of what holds them.

A check raises ValueError that names the tensor; whoever reads the file adds its name (files.complete).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int | None], finite: bool = False
) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape. None: any length above 0; finite: no NaN, no Inf."""
    fits = len(shape) == tensor.ndim and all(
        there > 0 if wanted is None else there == wanted for there, wanted in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {_brief(tensor)}, not {_name(dtype)}[{wanted}]")
    if finite and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or Inf")


def check_scale(name: str, scale: Tensor) -> None:
    """Raise ValueError for a scale of 0: the quantizer writes none, and nothing can be divided by it."""
    if (scale == 0).any():
        raise ValueError(f"{name} holds a scale of 0")


def check_index(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless every value of `index` is in 0 .. size - 1."""
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < size):
        raise ValueError(f"{name} points outside 0..{size - 1}")


def one_value(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the only value of the whole-number tensor `name`, as int. Raises ValueError for any other tensor."""
    tensor = tensors[name]
    if tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} is {_brief(tensor)}, not one whole number")
    return int(tensor)


def refuse_unused(names: Iterable[str]) -> None:
    """Raise ValueError for a tensor that nothing reads: what its JSON says of it was lost."""
    for name in sorted(names):
        raise ValueError(f"the tensor {name} belongs to nothing, or is there twice")


def short_repr(owner: Any) -> str:
    """Return a dataclass in one line: of tensors dtype and shape, of long collections the number of entries."""
    values = ", ".join(f"{field.name}={_brief(getattr(owner, field.name))}" for field in fields(owner))
    return f"{type(owner).__name__}({values})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, (str, bytes, Path)) or not isinstance(value, Collection):
        return repr(value)
    if len(value) > 4 or any(isinstance(item, (Collection, Tensor)) and not isinstance(item, str) for item in value):
        return f"<{len(value)} entries>"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_brief_value(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _brief_value(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return f"<{len(value)} entries>"
    return type(value).__name__ if hasattr(value, "__dataclass_fields__") else _brief(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
