"""Independent oracles: numpy float64, exact integers and bit operations. They share no code with the library."""

from __future__ import annotations

import math

import numpy as np

EPS32 = 2.0**-24  # largest relative error of one float32 operation, rounded to nearest
EPS16 = 2.0**-8  # the same of one rounding to bfloat16


def qparams(low, high, bits: int, symmetric: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero_point) of eq. 2 of arXiv 2310.08041 in float64; the mirrored range -a .. a where symmetric."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if symmetric:
        scale = np.maximum(abs(low), abs(high)) / (2 ** (bits - 1) - 1)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    return scale, -np.round(low / scale)


def quantize(x, scale, zero_point, bits: int) -> np.ndarray:
    """clamp(round(x / scale) + zero_point, 0, 2^bits - 1) in float64; qparams broadcast against x."""
    return np.clip(np.round(np.asarray(x, np.float64) / scale) + zero_point, 0, 2**bits - 1)


def pack_row(codes: list[int], bits: int) -> bytes:
    """One row of codes as one little-endian integer, code i shifted by bits * i, over whole runs of codes and bytes."""
    run = 8 // math.gcd(8, bits)
    size = -(-len(codes) // run) * run * bits // 8
    return sum(code << (bits * i) for i, code in enumerate(codes)).to_bytes(size, "little")


def bf16_bits(x) -> np.ndarray:
    """The upper halves of float32 bit patterns, rounded to nearest even (finite values)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_round(x) -> np.ndarray:
    """x rounded to bfloat16, as float64."""
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def fused_qkv_rows(heads: int, groups: int, head_dim: int) -> list[int]:
    """Rows of [q | k | v] in the order of Megatron's linear_qkv: group by group its queries, its key, its value."""
    order, per_group = [], heads // groups
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            order += [head * head_dim + row for row in range(head_dim)]
        for start in (heads, heads + groups):  # of the keys, of the values
            order += [(start + group) * head_dim + row for row in range(head_dim)]
    return order


def fused_gate_up_rows(ffn: int, ranks: int) -> list[int]:
    """Rows of [gate | up] in the order of Megatron's linear_fc1: rank by rank its gates, then its ups."""
    order, share = [], ffn // ranks
    for rank in range(ranks):
        for start in (0, ffn):
            order += [start + rank * share + row for row in range(share)]
    return order
