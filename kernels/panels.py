"""Weights in the order that the CPU kernels read: panels of 64 outputs (csrc/panels.h).

A panel tensor is uint8 [bytes]: one dimension, by which quant_linear knows it. The codes take the bytes that they take
in the artifact's rows, but for padding, and codes of odd width, which lie in the next even one (7 bits in 8). They are
ordered once, when a linear first runs on a CPU, and not kept twice; rows_of puts them back.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from array import array
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.library import Library
from megatron_lowbit.kernels.linear import FLOAT_BITS
from megatron_lowbit.kernels.packing import pack_bits, packed_bytes, unpack_bits

_SHAPE: list[Any] = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
_PANELS: list[Any] = [ctypes.c_void_p, *_SHAPE, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_TOKENS: list[Any] = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
_ARGUMENTS: dict[str, list[Any]] = {
    "lowbit_linear": [ctypes.c_void_p],
    "lowbit_linear_path": [],
    "lowbit_panel_bytes": _SHAPE,
    "lowbit_pack_panels": [ctypes.c_void_p, ctypes.c_int64, *_PANELS[1:]],
    "lowbit_unpack_panels": _PANELS,
    "lowbit_reassemble": [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_double),
        *(ctypes.c_void_p, ctypes.c_int),
    ],
    "lowbit_hadamard": [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p, ctypes.c_int),
    ],
    "lowbit_encode_tokens": [*_TOKENS, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int],
    "lowbit_decode_tokens": [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    ],
    "lowbit_round_tokens": [*_TOKENS, ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_void_p, ctypes.c_int],
    "lowbit_quantize_tokens": [
        *(*_TOKENS, ctypes.c_int64, ctypes.c_float, ctypes.c_float),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ],
}
linear_kernels = Library(
    "linear", _ARGUMENTS, {"lowbit_panel_bytes": ctypes.c_int64, "lowbit_linear_path": ctypes.c_char_p}
)


def blocks_of(act_bits: int, act_groups: int, weight_groups: int) -> int:
    """Return how many blocks of inputs have scales and zero points in common."""
    return weight_groups if act_bits == FLOAT_BITS else math.lcm(act_groups, weight_groups)


def fits(num_bits: int, inputs: int, blocks: int) -> bool:
    """Return whether the kernels multiply such a weight exactly: the dot product of a block stays below 2^32."""
    return 2 <= num_bits <= 8 and inputs > 0 and inputs // blocks * 255 * (2**num_bits - 1) < 2**32


def panels_of(packed_weight: Tensor, num_bits: int, inputs: int, blocks: int, pairs: bool) -> Tensor | None:
    """Return rows uint8 [outputs, row_bytes] as panels; None where the kernels cannot run.

    blocks: of inputs, as blocks_of says; pairs: for activations that are not quantized. Raises ValueError for rows of
    another length. The C++ function reads the rows: codes unpacked by torch left holes in the memory of a process.
    """
    library = linear_kernels.find() if packed_weight.device.type == "cpu" and fits(num_bits, inputs, blocks) else None
    if library is None:
        return None
    rows, shape = packed_weight.contiguous(), (packed_weight.shape[0], inputs, blocks, num_bits)
    if rows.shape[1] != packed_bytes(inputs, num_bits):
        raise ValueError(f"rows of {rows.shape[1]} bytes do not hold {inputs} codes of {num_bits} bits")
    panels = torch.empty(library.lowbit_panel_bytes(*shape), dtype=torch.uint8)
    threads = torch.get_num_threads()
    library.lowbit_pack_panels(rows.data_ptr(), rows.shape[1], *shape, pairs, panels.data_ptr(), threads)
    return panels


def forget_pages(packed_weight: Tensor) -> None:
    """Give back the memory of rows that are read no more: pages of a file, which an Artifact keeps open.

    Whoever does read them gets them from the file again. Memory that is no file's, or that was written to since it was
    read, is left alone.
    """
    start, size = packed_weight.data_ptr(), packed_weight.numel()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and _are_of_a_file(first, last):
        # Advice to page them out would leave what lies in large pages that reach beyond the rows.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _are_of_a_file(first: int, last: int) -> bool:
    """Return whether some pages in [first, last) are in memory, and all of those are a file's, by /proc/self/pagemap.

    A page that this process has written to is its own copy, which no file has, and so is memory of no file.
    """
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first // mmap.PAGESIZE * 8)
            flags = array("Q", file.read((last - first) // mmap.PAGESIZE * 8))
    except OSError:  # not Linux
        return False
    present = [page for page in flags if page >> 62]  # bits 63 and 62: in memory, or swapped out
    return bool(present) and all(page >> 61 & 1 for page in present)  # bit 61: the file's


def codes_of(packed_weight: Tensor, outputs: int, num_bits: int, inputs: int, blocks: int, pairs: bool) -> Tensor:
    """Return the codes uint8 [outputs, inputs] of rows or panels; the other arguments as panels_of had them."""
    if packed_weight.dim() == 2:
        return unpack_bits(packed_weight, num_bits, inputs)
    library = linear_kernels.loaded[0]  # it made the panels, whatever is to run now
    assert isinstance(library, ctypes.CDLL)
    codes = torch.empty((outputs, inputs), dtype=torch.uint8)
    shape = outputs, inputs, blocks, num_bits
    panels = packed_weight.contiguous()
    library.lowbit_unpack_panels(panels.data_ptr(), *shape, pairs, codes.data_ptr(), torch.get_num_threads())
    return codes


def rows_of(packed_weight: Tensor, outputs: int, num_bits: int, inputs: int, blocks: int, pairs: bool) -> Tensor:
    """Return rows or panels as rows uint8 [outputs, row_bytes]: the inverse of panels_of."""
    if packed_weight.dim() == 2:
        return packed_weight
    return pack_bits(codes_of(packed_weight, outputs, num_bits, inputs, blocks, pairs), num_bits)
