"""The ops of hybrid.py and exact.py on CPUs, bit for bit, in C++: hybrid.cpp, compiled at first use (library.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.exact import carrier_words, decode_reference, encode_reference, exact_decode, exact_encode
from megatron_lowbit.kernels.hybrid import (
    hybrid_pack,
    hybrid_unpack_reduce_into,
    hybrid_unpack_reduce_requantize,
    pack_reference,
    requantize_reference,
    unpack_reduce_into_reference,
)
from megatron_lowbit.kernels.library import Library
from megatron_lowbit.kernels.ops import kernel, written
from megatron_lowbit.kernels.wire_format import BF16_BITS, Format

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in hybrid.cpp


class _Format(ctypes.Structure):
    """LowbitFormat of hybrid.cpp. Keeps alive what it points to."""

    _fields_ = [
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("tiers", ctypes.c_void_p),
        ("num_tiers", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("per_token", ctypes.c_int64),
    ]

    def __init__(self, format: Format):
        scale, zero_point, order = (tensor.contiguous() for tensor in format[:3])
        numbers = (ctypes.c_int64 * len(format.tiers))(*format.tiers)
        self.alive = scale, zero_point, order, numbers
        pointers = scale.data_ptr(), zero_point.data_ptr(), order.data_ptr(), ctypes.addressof(numbers)
        super().__init__(*pointers, len(format.tiers) // 2, format.features, format.per_token)


@kernel(hybrid_pack, "cpu")
def _pack(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """Compute hybrid_pack with the C++ kernel."""
    library, format = _library(), Format(*flat)
    good = x.dim() == 2 and x.dtype in _DTYPES and format.order.shape == x.shape[1:] and format.scale.dim() == 1
    ours = _format(format) if library and good else None
    if library is None or ours is None:
        return pack_reference(x, format)
    if x.stride(1) != 1:
        x = x.contiguous()
    message = x.new_empty((x.shape[0], format.row_bytes), dtype=torch.uint8)
    tally = torch.empty(3, dtype=torch.int64)
    not_valid = library.lowbit_pack(
        *(ctypes.byref(ours), x.data_ptr(), _DTYPES[x.dtype], x.shape[0], x.stride(0)),
        *(message.data_ptr(), tally.data_ptr(), torch.get_num_threads()),
    )
    return pack_reference(x, format) if not_valid else (message, tally)


@kernel(hybrid_unpack_reduce_into, "cpu")
def _unpack_reduce(messages: Tensor, *rest: Any) -> None:
    """Compute hybrid_unpack_reduce_into with the C++ kernel."""
    library, format, out = _library(), Format(*rest[:5]), rest[5]
    good = library and out.dtype in _DTYPES and _messages_fit(messages, format)
    good = good and out.shape == (messages.shape[1], *format.order.shape) and out.is_contiguous()
    ours = _format(format) if good else None
    if library is not None and ours is not None:
        messages = _with_plain_rows(messages)
        not_valid = library.lowbit_unpack_reduce(
            *(ctypes.byref(ours), messages.data_ptr(), *messages.shape[:2], *messages.stride()[:2]),
            *(out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads()),
        )
        if not not_valid:
            return written(out)
    unpack_reduce_into_reference(messages, format, out)


@kernel(hybrid_unpack_reduce_requantize, "cpu")
def _requantize(messages: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """Compute hybrid_unpack_reduce_requantize with the C++ kernel."""
    library, format, second = _library(), Format(*flat[:5]), Format(*flat[5:])
    good = library and _messages_fit(messages, format)
    good = good and second.order.shape == format.order.shape and second.scale.dim() == 1
    ours, theirs = (_format(one) if good else None for one in (format, second))
    if library is None or ours is None or theirs is None:
        return requantize_reference(messages, format, second)
    messages = _with_plain_rows(messages)
    out = messages.new_empty((messages.shape[1], second.row_bytes))
    tally = torch.empty(3, dtype=torch.int64)
    not_valid = library.lowbit_requantize(
        *(ctypes.byref(ours), messages.data_ptr(), *messages.shape[:2], *messages.stride()[:2]),
        *(ctypes.byref(theirs), out.data_ptr(), tally.data_ptr(), torch.get_num_threads()),
    )
    return requantize_reference(messages, format, second) if not_valid else (out, tally)


@kernel(exact_encode, "cpu")
def _exact_encode(x: Tensor, center: Tensor, step: Tensor, largest: int, carrier_bits: int) -> tuple[Tensor, Tensor]:
    """Compute exact_encode with the C++ kernel."""
    library = _library()
    if library is None or x.dim() != 2 or x.dtype not in _DTYPES or not _per_feature(center, step, x.shape[1]):
        return encode_reference(x, center, step, largest, carrier_bits)
    if x.dtype == torch.float64:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    shape = x.shape[0], carrier_words(x.shape[1], carrier_bits)
    codes = x.new_empty(shape, dtype=torch.int8 if carrier_bits == 8 else torch.int32)
    tally = torch.empty(3, dtype=torch.int64)
    library.lowbit_exact_encode(
        *(x.data_ptr(), _DTYPES[x.dtype], x.shape[0], x.stride(0), x.shape[1]),
        *(center.data_ptr(), step.data_ptr(), largest, carrier_bits),
        *(codes.data_ptr(), tally.data_ptr(), torch.get_num_threads()),
    )
    return codes, tally


@kernel(exact_decode, "cpu")
def _exact_decode(total: Tensor, center: Tensor, step: Tensor, carrier_bits: int, dtype: torch.dtype) -> Tensor:
    """Compute exact_decode with the C++ kernel."""
    library, features = _library(), step.shape[0]
    fits = total.dim() == 2 and total.shape[1] == carrier_words(features, carrier_bits)
    fits = fits and total.dtype == (torch.int8 if carrier_bits == 8 else torch.int32)
    if library is None or not fits or dtype not in _DTYPES or not _per_feature(center, step, features):
        return decode_reference(total, center, step, carrier_bits, dtype)
    total = total.contiguous()
    wide = dtype == torch.float64
    y = step.new_empty((total.shape[0], features), dtype=torch.float32 if wide else dtype)
    library.lowbit_exact_decode(
        *(total.data_ptr(), total.shape[0], features, center.data_ptr(), step.data_ptr(), carrier_bits),
        *(y.data_ptr(), _DTYPES[y.dtype], torch.get_num_threads()),
    )
    return y.to(dtype)


def _per_feature(center: Tensor, step: Tensor, features: int) -> bool:
    return features > 0 and all(
        t.dtype == torch.float32 and t.shape == (features,) and t.is_contiguous() for t in (center, step)
    )


def _messages_fit(messages: Tensor, format: Format) -> bool:
    """Return whether the kernel may take the messages: what the reference would refuse goes there, whose errors are
    torch's."""
    return (
        messages.dim() == 3
        and messages.dtype == torch.uint8
        and messages.shape[2] >= format.row_bytes
        and format.scale.dim() == 2
        and format.scale.shape[0] == messages.shape[0] > 0
    )


def _with_plain_rows(messages: Tensor) -> Tensor:
    """Return rows of bytes side by side; the rows themselves may lie anywhere."""
    return messages if messages.stride(2) == 1 else messages.contiguous()


def _format(format: Format) -> _Format | None:
    """Return the plan for the kernels; None for a plan that the kernels do not take; they see themselves whether
    `order` has every feature once."""
    scale, zero_point, order, tiers, per_token = format
    features = order.shape[0] if order.dim() == 1 else 0
    widths = list(tiers[::2])
    bf16_first = sorted(widths, key=lambda bits: bits != BF16_BITS) == widths  # where per-token ranges look for them
    if (
        not 0 < features < 2**24
        or sum(tiers[1::2]) != features
        or not all(tensor.dtype == torch.float32 for tensor in (scale, zero_point))
        or scale.shape != zero_point.shape
        or scale.shape[-1] != features
        or order.dtype != torch.int64
        or not (bf16_first or not per_token)
        or not all(tensor.device.type == "cpu" for tensor in (scale, zero_point, order))
    ):
        return None
    return _Format(format)


# Arguments of the functions, as in hybrid.cpp.
_MESSAGES = [ctypes.c_void_p] + 4 * [ctypes.c_int64]
_ENCODED = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
_ARGUMENTS: dict[str, list[Any]] = {
    "lowbit_pack": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, *_ENCODED],
    "lowbit_unpack_reduce": [ctypes.c_void_p, *_MESSAGES, ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    "lowbit_exact_encode": [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int, *_ENCODED),
    ],
    "lowbit_exact_decode": [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    ],
    "lowbit_requantize": [ctypes.c_void_p, *_MESSAGES, ctypes.c_void_p, *_ENCODED],
}


kernels_of_cpu = Library("hybrid", _ARGUMENTS)
_library = kernels_of_cpu.find
