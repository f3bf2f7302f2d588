"""Dense packing of b-bit codes, 2 <= b <= 8: two 4-bit codes per byte, four 6-bit codes in three bytes, and so on.

The smallest run of codes that fills whole bytes is one word, little-endian:

    word = sum_i code_i << (b * i)        byte_j = (word >> 8 j) & 255

A row whose length is no multiple of the run is padded with zero codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

# num_bits: (codes per word, bytes per word, dtype that holds the word)
_WORDS = {
    2: (4, 1, torch.uint8),
    3: (8, 3, torch.int32),
    4: (2, 1, torch.uint8),
    5: (8, 5, torch.int64),
    6: (4, 3, torch.int32),
    7: (8, 7, torch.int64),
    8: (1, 1, torch.uint8),
}


def codes_per_word(num_bits: int) -> int:
    """Return the smallest number of codes that fills whole bytes."""
    return _WORDS[num_bits][0]


def packed_bytes(num_codes: int, num_bits: int) -> int:
    """Return the bytes of one packed row of `num_codes` codes."""
    codes, size, _ = _WORDS[num_bits]
    return -(-num_codes // codes) * size


@library.custom_op("megatron_lowbit::pack_bits", mutates_args=())
def pack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes uint8 [..., n], each below 2^num_bits -> uint8 [..., packed_bytes(n, num_bits)]."""
    per_word, size, dtype = _WORDS[num_bits]
    if codes.shape[-1] % per_word:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    runs = codes.unflatten(-1, (codes.shape[-1] // per_word, per_word)).to(dtype)
    word = runs[..., 0].clone()
    for i in range(1, per_word):
        word |= runs[..., i] << (num_bits * i)
    return torch.stack([(word >> (8 * j) & 255).to(torch.uint8) for j in range(size)], dim=-1).flatten(-2)


@pack_bits.register_fake
def _(codes: Tensor, num_bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], packed_bytes(codes.shape[-1], num_bits)))


@library.custom_op("megatron_lowbit::unpack_bits", mutates_args=())
def unpack_bits(packed: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Unpack uint8 [..., packed_bytes(num_codes, num_bits)] -> codes uint8 [..., num_codes]."""
    per_word, size, dtype = _WORDS[num_bits]
    parts = packed.unflatten(-1, (packed.shape[-1] // size, size)).to(dtype)
    word = parts[..., 0].clone()
    for j in range(1, size):
        word |= parts[..., j] << (8 * j)
    mask = 2**num_bits - 1
    codes = torch.stack([(word >> (num_bits * i) & mask).to(torch.uint8) for i in range(per_word)], dim=-1)
    return codes.flatten(-2)[..., :num_codes].contiguous()


@unpack_bits.register_fake
def _(packed: Tensor, num_bits: int, num_codes: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], num_codes))
