"""The ops of hybrid.py on CUDA devices, by Triton (triton_hybrid.py), which is imported at the first call. Those of
quantizer.py, linear.py and hadamard.py are in gpu_linear.py.

Where triton is missing, and for tensors whose offsets do not fit 32 bits, the torch reference runs; the former is said
once. $MEGATRON_LOWBIT_KERNELS as in cpu.py; triton: this or an error.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.hybrid import (
    hybrid_pack,
    hybrid_unpack_reduce_into,
    hybrid_unpack_reduce_requantize,
    pack_reference,
    requantize_reference,
    unpack_reduce_into_reference,
)
from megatron_lowbit.kernels.ops import kernel, written
from megatron_lowbit.kernels.wire_format import Format

logger = logging.getLogger("megatron_lowbit")


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported."""
    try:
        import_module("triton")
    except ImportError as error:
        if os.environ.get("MEGATRON_LOWBIT_KERNELS") == "triton":
            raise RuntimeError(f"MEGATRON_LOWBIT_KERNELS=triton: {error}") from None
        logger.warning("Triton kernels: %s; the slower torch reference runs", error)
        return False
    return True


def _kernels(rows: int, row_bytes: int, *large: Tensor) -> Any:
    """Return the Triton kernels where they can run; rows, row_bytes: of the output; large: tensors that offsets go
    into."""
    if os.environ.get("MEGATRON_LOWBIT_KERNELS") == "reference":
        return None
    reach = [rows * row_bytes] + [sum(n * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in large]
    if max(reach) >= 2**31 or not has_triton():
        return None
    return import_module("megatron_lowbit.kernels.triton_hybrid")


def _plain(format: Format) -> Format:
    scale, zero_point, order = (tensor.contiguous() for tensor in format[:3])
    return Format(scale, zero_point, order, format.tiers, format.per_token)


def _rows(x: Tensor) -> Tensor:
    """Return x with the values of a row side by side; the rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


@kernel(hybrid_pack, "cuda")
def _pack(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """Compute hybrid_pack with the Triton kernel."""
    format = Format(*flat)
    kernels = _kernels(x.shape[0], format.row_bytes, x)
    if kernels is None:
        return pack_reference(x, format)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        return kernels.pack(_rows(x), _plain(format))


@kernel(hybrid_unpack_reduce_into, "cuda")
def _unpack_reduce(messages: Tensor, *rest: Any) -> None:
    """Compute hybrid_unpack_reduce_into with the Triton kernel."""
    format, out = Format(*rest[:5]), rest[5]
    kernels = _kernels(messages.shape[1], format.features, messages)
    if kernels is None or not out.is_contiguous():
        unpack_reduce_into_reference(messages, format, out)
        return
    with torch.cuda.device(messages.device):
        kernels.unpack_reduce(_rows(messages), _plain(format), out)
    written(out)


@kernel(hybrid_unpack_reduce_requantize, "cuda")
def _requantize(messages: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """Compute hybrid_unpack_reduce_requantize with the Triton kernel."""
    format, second = Format(*flat[:5]), Format(*flat[5:])
    kernels = _kernels(messages.shape[1], second.row_bytes, messages)
    if kernels is None:
        return requantize_reference(messages, format, second)
    with torch.cuda.device(messages.device):
        return kernels.requantize(_rows(messages), _plain(format), _plain(second))
