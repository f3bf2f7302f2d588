"""What a token becomes before it is multiplied, in one launch of Triton: codes, scales, zero points and sums.

A program takes one group of one token: it sweeps the values once for their smallest and largest, and again, from cache
by then, for the codes. All is that of quantizer.py bit for bit, one operation of float32 at a time: no multiply and add
are fused, div_rn is IEEE division, and rounding adds and subtracts 2^23, which is to even and needs no libdevice (the
interpreter has none). Only the sign of a zero point that is 0 may differ, where a row holds zeros of both signs; no
product depends on it.

For triton_linear.py codes are written in planes: with `PER` codes in a word of the packed weight, code p of every word
of a block lies side by side, so that the weight's codes are multiplied as they come out of their words. Codes of 8 bits
are written with the highest bit flipped, which is code - 128 in int8. Behind the last token a row of ones may follow,
whose products are the sums of the weight's codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.quantizer import TokenQuantizer

WHOLE: tl.constexpr = tl.constexpr(8388608.0)  # 2^23: floats from here on are whole numbers
TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
SIGN: tl.constexpr = tl.constexpr(128)  # the bit that makes code - 128 of a code of 8 bits
NUM_WARPS = 4


@triton.jit
def _round(value):
    """Round float32 to whole numbers, half to even; NaN stays."""
    size = tl.abs(value)
    near = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    return tl.where(value < 0, -near, near)


@triton.jit
def _qparams(row, width, good, low_ratio, high_ratio, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return (scale, zero_point) of the `width` values at `row`, as TokenQuantizer has them."""
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = (at < width) & good
        value = tl.load(row + at, here, other=0).to(tl.float32)
        broken |= (value != value).to(tl.int32)  # min and max may pass over NaN
        low = tl.minimum(low, tl.where(here, value, float("inf")))
        high = tl.maximum(high, tl.where(here, value, float("-inf")))
    poison = tl.where(tl.max(broken, 0) > 0, float("nan"), 0.0)
    least, most = (tl.min(low, 0) + poison) * low_ratio, (tl.max(high, 0) + poison) * high_ratio
    step = tl.div_rn(most, LEVELS * 1.0) - tl.div_rn(least, LEVELS * 1.0)
    constant = step < TINY
    scale = tl.where(constant, 1.0, tl.where(tl.abs(step) < float("inf"), step, float("nan")))
    return scale, tl.where(constant, -least, -_round(tl.div_rn(least, scale)))


_ANY = ["tokens"]


@triton.jit(do_not_specialize=_ANY)
def prepare_kernel(
    x, x_stride, tokens, out, scale, zero_point, sums, groups, blocks, width, words, low_ratio, high_ratio,
    LEVELS: tl.constexpr, FLIP: tl.constexpr, PER: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one group of one token, or of the row of ones behind the last.

    x: float [tokens, groups * blocks * width]; out: uint8 codes, or x itself where LEVELS is 0, [rows, groups, blocks,
    PER, words]; scale, zero_point: float32 [tokens, groups]; sums: int32 codes of a block added up, or float64 values,
    [tokens, groups, blocks]. blocks: of one group; width: channels of a block. low_ratio, high_ratio: float32, those of
    TokenQuantizer.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    good = token < tokens
    row = x + token * x_stride + group * (blocks * width)
    to = out + (token * groups + group) * (blocks * PER * words)
    if LEVELS:
        step, offset = _qparams(row, blocks * width, good, low_ratio, high_ratio, LEVELS, BLOCK)
        tl.store(scale + token * groups + group, step, good)
        tl.store(zero_point + token * groups + group, offset, good)
        whole = _round(offset)
        rest = offset - whole  # of a constant token
    for block in range(0, blocks):
        total = tl.zeros([BLOCK], tl.int32) if LEVELS else tl.zeros([BLOCK], tl.float64)
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            for p in tl.static_range(PER):
                at = word * PER + p
                here = (word < words) & (at < width)  # the last word may be longer than the row
                value = tl.load(row + block * width + at, here & good, other=0)
                if LEVELS:
                    code = _round(tl.div_rn(value.to(tl.float32), step) + rest) + whole
                    code = tl.minimum(tl.maximum(tl.where(code == code, code, 0.0), 0.0), LEVELS * 1.0).to(tl.int32)
                    total += tl.where(here, code, 0)
                    code = tl.where(good, code ^ FLIP, 1)
                    value = tl.where(here, code, 0).to(tl.uint8)
                else:
                    total += value.to(tl.float32).to(tl.float64)  # the interpreter has no other way from bf16
                tl.store(to + (block * PER + p) * words + word, value, word < words)
        if SUMS:
            tl.store(sums + (token * groups + group) * blocks + block, tl.sum(total, 0), good)


def quantize_tokens(x: Tensor, acts: TokenQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Launch quantize_tokens of quantizer.py. x: rows of values side by side."""
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    scale, zero_point = (x.new_empty((x.shape[0], acts.groups), dtype=torch.float32) for _ in range(2))
    if codes.numel():
        width = x.shape[1] // acts.groups
        _launch(x, codes, scale, zero_point, scale, acts, 1, width, width, 1, False, x.shape[0])
    return codes, scale, zero_point


def prepare_codes(
    x: Tensor, acts: TokenQuantizer, blocks: int, per: int, ones: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize tokens for triton_linear.py. x: float [tokens, features], rows of values side by side.

    blocks: of the whole row, a multiple of acts.groups; per: codes in a word of the weight; ones: whether a row of ones
    follows. Returns (codes int8 [tokens (+ 1), blocks, per, words], scale, zero_point float32 [tokens, groups], sums
    int32 [tokens, blocks]).
    """
    tokens, width = x.shape[0], x.shape[1] // blocks
    words = -(-width // per)
    codes = x.new_empty((tokens + ones, blocks, per, words), dtype=torch.int8)
    scale, zero_point = (x.new_empty((tokens, acts.groups), dtype=torch.float32) for _ in range(2))
    sums = x.new_empty((tokens, blocks), dtype=torch.int32)
    out = codes.view(torch.uint8)
    _launch(x, out, scale, zero_point, sums, acts, blocks // acts.groups, width, words, per, True, len(codes))
    return codes, scale, zero_point, sums


def prepare_values(x: Tensor, blocks: int, per: int) -> tuple[Tensor, Tensor]:
    """Arrange tokens that are not quantized: (values [tokens, blocks, per, words], sums float64 [tokens, blocks])."""
    tokens, width = x.shape[0], x.shape[1] // blocks
    words = -(-width // per)
    values = x.new_empty((tokens, blocks, per, words))
    sums = x.new_empty((tokens, blocks), dtype=torch.float64)
    as_they_are = TokenQuantizer(0, blocks)
    _launch(x, values, sums, sums, sums, as_they_are, 1, width, words, per, True, tokens)
    return values, sums


def _launch(
    x: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor, sums: Tensor,
    acts: TokenQuantizer, blocks: int, width: int, words: int, per: int, with_sums: bool, rows: int,
) -> None:  # fmt: skip
    prepare_kernel[(rows, acts.groups)](
        *(x, x.stride(0), x.shape[0], out, scale, zero_point, sums, acts.groups, blocks, width, words),
        *(acts.low, acts.high),
        LEVELS=2**acts.bits - 1,
        FLIP=128 if acts.bits == 8 and with_sums else 0,
        PER=per,
        SUMS=with_sums,
        **options(words, per, acts.bits),
    )


def options(words: int, per: int, bits: int) -> dict[str, int | bool]:
    """Return how many words of a plane a program takes at once, and how it is compiled: of the weight alone, so that
    the order of a sum of floats is that of every batch. bits: of codes, or 0.

    Codes of many planes, whose sums are whole numbers in any order, take twice the threads: with half of them sm_80
    would have to store registers.
    """
    block = min(max(triton.next_power_of_2(words), 32), 1024)
    return {"BLOCK": block, "num_warps": NUM_WARPS * (2 if bits and per > 2 else 1), "enable_fp_fusion": False}
