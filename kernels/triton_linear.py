"""quant_linear in Triton, from the packed rows of an artifact: y^T = W x^T, in three launches without a wait.

    prepare   tokens -> codes (or values) in planes, scales, zero points, sums                    (triton_quantize.py)
    product   sums of products of neighbouring channels, int32 on integer tensor cores; float32 where the activations
              are not quantized
    combine   the definition of linear.py in float64, one operation at a time, and its one rounding

The weight is the left operand: its codes go from their words to the tensor cores in registers, where the hardware takes
one operand from there. Word j of a row holds PER codes; plane p, code p of every word, is multiplied by plane p of the
tokens, so nothing is interleaved, and one kernel does 2 to 8 bits. Codes that need all 8 bits of an unsigned byte are
taken less 128, in int8, and the integers put right: exactly.

Few tokens (`split`): every program multiplies one piece of one block, combine adds the pieces in their order. A row of
ones among the tokens gives the sums of the weight's codes. Many (`whole`): a program goes over all blocks and pieces
and combines them itself; one launch before it sums the codes. Both do the same operations in the same order, and the
pieces depend on the width alone: float32 sums do not depend on the batch, nor on which program was first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.linear import FLOAT_BITS
from megatron_lowbit.kernels.packing import codes_per_word, packed_bytes, unpack_bits
from megatron_lowbit.kernels.quantizer import TokenQuantizer
from megatron_lowbit.kernels.triton_hybrid import _bf16_bits
from megatron_lowbit.kernels.triton_quantize import prepare_codes, prepare_values

BEYOND: tl.constexpr = tl.constexpr(2**29 - 1)  # the bits of a float64 that float32 has no place for
PIECE = 1024  # channels of a piece of floats
SPLIT_TOKENS = 64  # from here on a program combines what it has multiplied
EXACT_WIDTH = 2**17  # channels whose products fit int32: 128 * 128 each
COMBINED = 256  # channels of a program of combine
HIP = torch.version.hip is not None  # an AMD device


class Tile(NamedTuple):
    """What a program of the product multiplies at a time, and how it is compiled."""

    channels: int
    tokens: int
    words: int
    warps: int
    stages: int


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    return tl.load(pointer, mask, other=0) if MASKED else tl.load(pointer)


@triton.jit
def _code(byte, more, P: tl.constexpr, BITS: tl.constexpr):
    """Return code P of a word, uint8, of the byte where it begins and, where it goes on there, the next."""
    SHIFT: tl.constexpr = P * BITS % 8
    code = byte >> SHIFT
    if SHIFT + BITS > 8:
        code |= more << (8 - SHIFT)
    return code & (2**BITS - 1)


@triton.jit
def _multiply(
    row, token, first, last, words, acc,
    BITS: tl.constexpr, PER: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Add the products of words `first` to `last` of a block to acc [channels, tokens].

    row: [channels] pointers to the block's words of SIZE bytes; token: [tokens] pointers to its planes of `words` each.
    """
    TYPE: tl.constexpr = token.dtype.element_ty
    for start in range(first, last, WORDS):
        j = start + tl.arange(0, WORDS)
        here = j < last
        at = row[:, None] + (j * SIZE)[None, :]
        byte = _load(at, here[None, :], MASKED)
        for p in tl.static_range(PER):
            more = byte
            if (p + 1) * BITS // 8 > p * BITS // 8 and (p + 1) * BITS // 8 < SIZE:  # every byte is loaded once
                more = _load(at + (p + 1) * BITS // 8, here[None, :], MASKED)
            code = _code(byte, more, p, BITS)
            byte = more
            x = _load(token[None, :] + (p * words + j)[:, None], here[:, None], MASKED)
            if tl.int8 == TYPE:
                if BITS == 8:
                    code = code ^ 128
                acc = tl.dot(code.to(tl.int8, bitcast=True), x, acc, out_dtype=tl.int32)
            else:  # by way of float32: the interpreter has no other to bf16
                acc = tl.dot(code.to(tl.float32).to(TYPE), x, acc, input_precision="ieee")
    return acc


@triton.jit
def _bracket(dot, ones, total, z, zero_point, width, BITS: tl.constexpr, ACT_BITS: tl.constexpr):
    """Compute the bracket of linear.py, float64. dot: of codes from which 128 was taken where they have 8 bits; ones,
    total: sums of the weight's codes and of the token's; z: None where the token has no codes."""
    wide = width * 1.0  # below 2^17 and so exact in float32
    if ACT_BITS == 16:
        return dot - total * zero_point
    if BITS == 8:  # whole numbers below 2^53, so exact in any order
        dot += 128.0 * total
    if ACT_BITS == 8:
        dot += 128.0 * ones
        if BITS == 8:
            dot -= 16384.0 * wide
    bracket = dot - z * ones
    return bracket - (total - wide * z) * zero_point


@triton.jit
def _store(pointer, y, mask):
    """Store float64 rounded once to the pointer's type: round_to of linear.py."""
    TYPE: tl.constexpr = pointer.dtype.element_ty
    if tl.float64 == TYPE:
        tl.store(pointer, y, mask)
    elif tl.float32 == TYPE:
        tl.store(pointer, y.to(tl.float32), mask)
    else:
        bits = y.to(tl.int64, bitcast=True)
        odd = (bits & ~BEYOND) | (((bits & BEYOND) != 0).to(tl.int64) << 29)
        near = odd.to(tl.float64, bitcast=True).to(tl.float32)
        if tl.bfloat16 == TYPE:
            tl.store(pointer, _bf16_bits(near).to(tl.int16).to(tl.bfloat16, bitcast=True), mask)
        else:
            tl.store(pointer, near.to(TYPE), mask)


_ANY = ["tokens", "rows"]


@triton.jit(do_not_specialize=_ANY)
def split_kernel(
    weight, row_bytes, out_features, x, rows, partial, words, piece_words, pieces,
    ACC: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    CHANNELS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Multiply one piece of one block. x: [rows, blocks, PER, words]; partial: [blocks, pieces, rows, out]."""
    block, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    blocks = tl.num_programs(2) // pieces
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    # Rows beyond the last are the last once more: no mask is in the loop.
    row = weight + tl.minimum(channel, out_features - 1).to(tl.int64) * row_bytes + block * (words * SIZE)
    planes = x + tl.minimum(token, rows - 1).to(tl.int64) * (blocks * PER * words) + block * (PER * words)
    first = piece * piece_words
    last = tl.minimum(first + piece_words, words)
    acc = tl.zeros([CHANNELS, TOKENS], ACC)
    acc = _multiply(row, planes, first, last, words, acc, BITS, PER, SIZE, MASKED, WORDS)
    here = (channel < out_features)[:, None] & (token < rows)[None, :]
    to = partial + (tl.program_id(2).to(tl.int64) * rows) * out_features
    tl.store(to + (token[None, :] * out_features + channel[:, None]), acc, here)


@triton.jit(do_not_specialize=_ANY)
def combine_kernel(
    partial, rows, out_features, sums, x_scale, x_zero, scale, zero_point, y,
    weight_groups, blocks_per_weight_group, act_groups, blocks_per_act_group, pieces, width,
    BITS: tl.constexpr, ACT_BITS: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    """Make outputs of one token of what split_kernel wrote. sums: [tokens, blocks]; x_scale, x_zero: [tokens,
    act_groups]; scale, zero_point: [out, weight_groups]; y: [tokens, out]."""
    token = tl.program_id(0)
    channel = tl.program_id(1) * COMBINED + tl.arange(0, COMBINED)
    here = channel < out_features
    blocks = weight_groups * blocks_per_weight_group
    step = rows.to(tl.int64) * out_features
    to = y + token.to(tl.int64) * out_features + channel
    of_ones = partial + (rows - 1) * out_features + channel
    partial += token * out_features + channel
    result = tl.zeros([COMBINED], tl.float64)
    for h in tl.range(0, weight_groups, loop_unroll_factor=4):
        inner = tl.zeros([COMBINED], tl.float64)
        zero = tl.load(zero_point + channel * weight_groups + h, here, other=0).to(tl.float64)
        for i in range(0, blocks_per_weight_group):
            b = h * blocks_per_weight_group + i
            dot = tl.zeros([COMBINED], tl.float64)
            ones = tl.zeros([COMBINED], tl.float64)
            for piece in tl.range(0, pieces, loop_unroll_factor=4):
                at = (b * pieces + piece) * step
                dot += tl.load(partial + at, here, other=0).to(tl.float64)
                if ACT_BITS != 16:
                    ones += tl.load(of_ones + at, here, other=0).to(tl.float64)
            if BITS == 8:
                ones += 128.0 * (width * 1.0)
            total = tl.load(sums + token * blocks + b).to(tl.float64)
            if ACT_BITS == 16:
                inner += _bracket(dot, ones, total, total, zero, width, BITS, ACT_BITS)
            else:
                g = token * act_groups + b // blocks_per_act_group
                s, z = tl.load(x_scale + g).to(tl.float64), tl.load(x_zero + g).to(tl.float64)
                inner += s * _bracket(dot, ones, total, z, zero, width, BITS, ACT_BITS)
        result += inner * tl.load(scale + channel * weight_groups + h, here, other=0).to(tl.float64)
    _store(to, result, here)


@triton.jit
def sums_kernel(
    weight, row_bytes, out_features, ones, words,
    BITS: tl.constexpr, PER: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Add up the codes of every channel and block. ones: int32 [blocks, out]."""
    block = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < out_features
    row = weight + channel.to(tl.int64) * row_bytes + block * (words * SIZE)
    total = tl.zeros([CHANNELS, WORDS], tl.int32)
    for start in range(0, words, WORDS):
        j = start + tl.arange(0, WORDS)
        mask = here[:, None] & (j < words)[None, :]
        at = row[:, None] + (j * SIZE)[None, :]
        byte = tl.load(at, mask, other=0)
        for p in tl.static_range(PER):
            more = byte
            if (p + 1) * BITS // 8 > p * BITS // 8 and (p + 1) * BITS // 8 < SIZE:
                more = tl.load(at + (p + 1) * BITS // 8, mask, other=0)
            total += _code(byte, more, p, BITS).to(tl.int32)
            byte = more
    tl.store(ones + block * out_features + channel, tl.sum(total, 1), here)


@triton.jit(do_not_specialize=_ANY)
def whole_kernel(
    weight, row_bytes, out_features, x, tokens, ones, sums, x_scale, x_zero, scale, zero_point, y,
    weight_groups, blocks_per_weight_group, act_groups, blocks_per_act_group, words, piece_words, pieces, width,
    ACC: tl.constexpr, BITS: tl.constexpr, ACT_BITS: tl.constexpr, PER: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Multiply and combine outputs of all blocks. ones: int32 [blocks, out], sums_kernel's; others as above."""
    blocks = weight_groups * blocks_per_weight_group
    own_channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    own_token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.minimum(own_channel, out_features - 1)
    token = tl.minimum(own_token, tokens - 1).to(tl.int64)
    row = weight + channel.to(tl.int64) * row_bytes
    planes = x + token * (blocks * PER * words)
    result = tl.zeros([CHANNELS, TOKENS], tl.float64)
    for h in range(0, weight_groups):
        inner = tl.zeros([CHANNELS, TOKENS], tl.float64)
        for i in range(0, blocks_per_weight_group):
            b = h * blocks_per_weight_group + i
            dot = tl.zeros([CHANNELS, TOKENS], tl.float64)
            for piece in range(0, pieces):
                first = piece * piece_words
                last = tl.minimum(first + piece_words, words)
                acc = tl.zeros([CHANNELS, TOKENS], ACC)
                dot += _multiply(
                    row + b * (words * SIZE), planes + b * (PER * words), first, last, words, acc,
                    BITS, PER, SIZE, MASKED, WORDS,
                ).to(tl.float64)  # fmt: skip
            zero = tl.load(zero_point + channel * weight_groups + h).to(tl.float64)[:, None]
            total = tl.load(sums + token * blocks + b).to(tl.float64)[None, :]
            if ACT_BITS == 16:
                inner += _bracket(dot, total, total, total, zero, width, BITS, ACT_BITS)
            else:
                g = token * act_groups + b // blocks_per_act_group
                s = tl.load(x_scale + g).to(tl.float64)[None, :]
                z = tl.load(x_zero + g).to(tl.float64)[None, :]
                of_ones = tl.load(ones + b * out_features + channel).to(tl.float64)[:, None]
                inner += s * _bracket(dot, of_ones, total, z, zero, width, BITS, ACT_BITS)
        result += inner * tl.load(scale + channel * weight_groups + h).to(tl.float64)[:, None]
    here = (own_channel < out_features)[:, None] & (own_token < tokens)[None, :]
    _store(y + (token[None, :] * out_features + channel[:, None]), result, here)


class Problem(NamedTuple):
    """A product's shape, as the kernels take it. Blocks: neighbouring channels with one scale on both sides."""

    out_features: int
    width: int  # channels of a block
    weight_groups: int
    act_groups: int
    bits: int
    act_bits: int
    dtype: torch.dtype  # of the tokens, if they are not quantized
    per: int  # codes in a word
    size: int  # bytes of a word

    @property
    def blocks(self) -> int:
        return math.lcm(self.weight_groups, self.act_groups)

    @property
    def words(self) -> int:
        """Return the words of a block, in a row and in a plane."""
        return -(-self.width // self.per)

    @property
    def floats(self) -> bool:
        return self.act_bits == FLOAT_BITS

    @property
    def exact_floats(self) -> bool:
        """Return whether the values are float32. A tile of 64 channels and more is multiplied in the tensor memory of
        Blackwell, which takes float32 for tf32 (10 bits), whatever precision Triton 3.7 is asked for."""
        return self.floats and self.dtype == torch.float32


def problem(x: Tensor, scale: Tensor, weight_bits: int, act_bits: int, act_groups: int) -> Problem:
    """Return a product's shape. Blocks that begin inside a word are multiplied from unpacked codes, a byte each."""
    groups = 1 if act_bits == FLOAT_BITS else act_groups
    out_features, weight_groups = scale.shape
    blocks = math.lcm(weight_groups, groups)
    width, per = x.shape[1] // blocks, codes_per_word(weight_bits)
    if blocks > 1 and width % per:
        per, size = 1, 1
    else:
        size = packed_bytes(per, weight_bits)
    return Problem(out_features, width, weight_groups, groups, weight_bits, act_bits, x.dtype, per, size)


def usual_tile(problem: Problem, tokens: int) -> Tile:
    """Return a tile that compiles without spilling everywhere, for a product that nobody has timed (gpu_tiles.py)."""
    words, channels = plane_words(problem), 32 if problem.exact_floats else 64
    if is_split(tokens):
        rows = min(max(triton.next_power_of_2(tokens + (not problem.floats)), 16), 64)
        return Tile(channels, rows, words, 8 if rows > 32 or problem.exact_floats else 4, 3)
    # Of several blocks or pieces, float64 sums stay in registers meanwhile.
    if problem.blocks > 1 or problem.floats:
        return Tile(channels, 64, min(words, 32), 8, 3)
    return Tile(128, 64, words, 8, 3)


def plane_words(problem: Problem) -> int:
    """Return how many words are multiplied at a time; of floats, that is the order of their sum."""
    return 32 if problem.floats else min(max(128 // problem.per, 32), 64)


def is_split(tokens: int) -> bool:
    return tokens < SPLIT_TOKENS


def pieces(problem: Problem, tile: Tile, programs: int) -> tuple[int, int]:
    """Return (pieces of a block, words of a piece). programs: without pieces, of a machine that has room for more."""
    most = -(-problem.words // tile.words)
    # Of integers any number: so that there are two programs for each multiprocessor of an H100, if they have work.
    wanted = -(-problem.width // PIECE) if problem.floats else max(1, min(264 // programs, most // 4))
    size = -(-most // min(wanted, most)) * tile.words
    return -(-problem.words // size), size


def quant_linear(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_bits: int,
    acts: TokenQuantizer,
    dtype: torch.dtype,
    tile: Tile | None = None,
    split: bool | None = None,
) -> Tensor:
    """Launch quant_linear of linear.py. Rows of x: values side by side; the other tensors: contiguous.

    tile: None: usual_tile's; split: whether the pieces are combined by a kernel of its own, None: where tokens are few.
    """
    shape = problem(x, scale, weight_bits, acts.bits, acts.groups)
    y = x.new_empty((len(x), shape.out_features), dtype=dtype)
    if not y.numel():
        return y
    if packed_weight.shape[1] != shape.blocks * shape.words * shape.size:
        packed_weight = unpack_bits(packed_weight, weight_bits, x.shape[1])
    tile = tile or usual_tile(shape, len(x))
    split = is_split(len(x)) if split is None else split
    if shape.floats:
        values, sums = prepare_values(x, shape.blocks, shape.per)
        x_scale = x_zero = sums
    else:
        values, x_scale, x_zero, sums = prepare_codes(x, acts, shape.blocks, shape.per, ones=split)
    run = _split if split else _whole
    run(shape, tile, packed_weight, values, sums, (x_scale, x_zero), (scale, zero_point), y)
    return y


Pair = tuple[Tensor, Tensor]


def _split(
    shape: Problem, tile: Tile, weight: Tensor, values: Tensor, sums: Tensor, of_x: Pair, of_w: Pair, y: Tensor
) -> None:
    rows, out = len(values), shape.out_features
    grid = triton.cdiv(out, tile.channels), triton.cdiv(rows, tile.tokens)
    count, size = pieces(shape, tile, grid[0] * grid[1] * shape.blocks)
    kind = torch.float32 if shape.floats else torch.int32
    partial = y.new_empty((shape.blocks, count, rows, out), dtype=kind)
    split_kernel[(*grid, shape.blocks * count)](
        *(weight, weight.stride(0), out, values, rows, partial, shape.words, size, count), **_constants(shape, tile)
    )
    combine_kernel[(len(y), triton.cdiv(out, COMBINED))](
        *(partial, rows, out, sums, *of_x, *of_w, y, *_groups(shape), count, shape.width),
        BITS=shape.bits,
        ACT_BITS=shape.act_bits,
        COMBINED=COMBINED,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _whole(
    shape: Problem, tile: Tile, weight: Tensor, values: Tensor, sums: Tensor, of_x: Pair, of_w: Pair, y: Tensor
) -> None:
    out, ones = shape.out_features, sums
    count, size = pieces(shape, tile, 264)
    if not shape.floats:
        ones = sums.new_empty((shape.blocks, out))
        sums_kernel[(triton.cdiv(out, 32), shape.blocks)](
            *(weight, weight.stride(0), out, ones, shape.words), **sums_options(shape)
        )
    whole_kernel[(triton.cdiv(out, tile.channels), triton.cdiv(len(y), tile.tokens))](
        *(weight, weight.stride(0), out, values, len(y), ones, sums, *of_x, *of_w, y),
        *(*_groups(shape), shape.words, size, count, shape.width),
        ACT_BITS=shape.act_bits,
        **_constants(shape, tile),
    )


def _groups(shape: Problem) -> tuple[int, int, int, int]:
    blocks, w, a = shape.blocks, shape.weight_groups, shape.act_groups
    return w, blocks // w, a, blocks // a


def sums_options(shape: Problem) -> dict[str, int | bool]:
    constants = {"BITS": shape.bits, "PER": shape.per, "SIZE": shape.size, "CHANNELS": 32, "WORDS": 64}
    return {**constants, "num_warps": 4, "enable_fp_fusion": False}


def _constants(shape: Problem, tile: Tile) -> dict[str, object]:
    """Return the constants of split_kernel and whole_kernel and how they are compiled."""
    # AMD has instructions for tiles of 16 and of 32, which add up unlike numbers of floats at a time. Of 16 a thread
    # holds fewer sums, too.
    one_instruction = {"matrix_instr_nonkdim": 16} if HIP else {}
    return {
        **one_instruction,
        "ACC": tl.float32 if shape.floats else tl.int32,
        "BITS": shape.bits,
        "PER": shape.per,
        "SIZE": shape.size,
        "MASKED": shape.words % tile.words != 0,
        "CHANNELS": tile.channels,
        "TOKENS": tile.tokens,
        "WORDS": tile.words,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }
