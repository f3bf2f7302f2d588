"""Tokens quantized and brought back (QLLM, arXiv 2310.08041, eq. 2): as bytes that a KV cache keeps, or at once.

row    packed codes (packing.py) | float32 scale | float32 zero point
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake
from megatron_lowbit.kernels.packing import pack_bits, packed_bytes, unpack_bits
from megatron_lowbit.kernels.quantizer import TokenQuantizer, dequantize

_QPARAM_BYTES = 8  # a float32 scale and zero point


def row_bytes(width: int, num_bits: int) -> int:
    """Return the bytes of the row of a token of `width` values."""
    return packed_bytes(width, num_bits) + _QPARAM_BYTES


def encode_tokens_reference(x: Tensor, num_bits: int, low_ratio: float = 1.0, high_ratio: float = 1.0) -> Tensor:
    """Quantize and pack every row of x, float [..., width].

    num_bits: 2 to 8; low_ratio, high_ratio: TokenQuantizer's. Returns uint8 [..., row_bytes(width, num_bits)]. Raises
    ValueError where they do not fit together.
    """
    tokens = x.reshape(-1, x.shape[-1])
    quantizer = TokenQuantizer(num_bits, 1, low_ratio, high_ratio)
    quantizer.check(tokens)
    codes, scale, zero_point = quantizer(tokens)
    rows = [pack_bits(codes, num_bits), scale.view(torch.uint8), zero_point.view(torch.uint8)]
    return torch.cat(rows, dim=-1).view(*x.shape[:-1], row_bytes(x.shape[-1], num_bits))


def decode_tokens_reference(rows: Tensor, num_bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """Undo encode_tokens: rows uint8 [..., row_bytes(width, num_bits)] -> float [..., width] in `dtype`.

    Raises ValueError for rows of another length.
    """
    check_rows(rows, num_bits, width)
    qparams = rows[..., -_QPARAM_BYTES:].clone(memory_format=torch.contiguous_format)  # floats lie at multiples of four
    scale, zero_point = qparams.view(torch.float32).split(1, dim=-1)
    return dequantize(unpack_bits(rows[..., :-_QPARAM_BYTES], num_bits, width), scale, zero_point).to(dtype)


def check_rows(rows: Tensor, num_bits: int, width: int) -> None:
    """Raise ValueError for rows that do not hold `width` codes of `num_bits` bits."""
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits={num_bits} is not in 2..8")
    if rows.dtype != torch.uint8 or rows.shape[-1] != row_bytes(width, num_bits):
        found = f"{rows.dtype} {list(rows.shape)}"
        raise ValueError(
            f"rows {found} are not uint8 [..., {row_bytes(width, num_bits)}], {width} codes of {num_bits} bits"
        )


def round_tokens_reference(
    x: Tensor, num_bits: int, groups: int, low_ratio: float = 1.0, high_ratio: float = 1.0
) -> Tensor:
    """Quantize each of `groups` slices of every row of x, float [..., features], and bring it back, in x's dtype.

    The other arguments, and what is raised: quantize_tokens'.
    """
    tokens = x.reshape(-1, x.shape[-1])
    quantizer = TokenQuantizer(num_bits, groups, low_ratio, high_ratio)
    quantizer.check(tokens)
    return dequantize(*quantizer(tokens)).to(x.dtype).view(x.shape)


_RATIOS = "float low_ratio=1.0, float high_ratio=1.0"
encode_tokens = define(f"encode_tokens(Tensor x, int num_bits, {_RATIOS}) -> Tensor", encode_tokens_reference)
decode_tokens = define(
    "decode_tokens(Tensor rows, int num_bits, int width, ScalarType dtype) -> Tensor", decode_tokens_reference
)
round_tokens = define(f"round_tokens(Tensor x, int num_bits, int groups, {_RATIOS}) -> Tensor", round_tokens_reference)


@fake(encode_tokens)
def _(x, num_bits, low_ratio=1.0, high_ratio=1.0):
    return x.new_empty((*x.shape[:-1], row_bytes(x.shape[-1], num_bits)), dtype=torch.uint8)


@fake(decode_tokens)
def _(rows, num_bits, width, dtype):
    return rows.new_empty((*rows.shape[:-1], width), dtype=dtype)


@fake(round_tokens)
def _(x, num_bits, groups, low_ratio=1.0, high_ratio=1.0):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
