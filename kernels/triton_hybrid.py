"""The ops of hybrid.py in Triton, bit for bit: one launch each, a program takes a few tokens' whole rows.

A row is swept once for what holds for all of it (NaN or Inf, and the token's size), and again, from cache by then, tier
by tier. Requantizing decodes rows into scratch memory that the same program reads back and that stays in the L2 cache.

What the sums and codes depend on is spelt out, the same on a GPU as in Triton's interpreter:

- No multiply and add are fused (enable_fp_fusion=False); scales are inverted by div_rn, which is IEEE division, as in
  the interpreter.
- Values are clamped, then rounded by adding 1.5 * 2^23: floats there lie 1 apart, and additions round half to even.
  The whole number is then in the low bits. libdevice.rint would do, but the interpreter has no libdevice.
- bf16 is rounded on the bits of a float32, since the interpreter's cast truncates.

Which NaN a bf16 NaN is differs between backends, in torch too: its bits carry nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.wire_format import (
    BF16_BITS,
    BROKEN,
    FAR,
    GROUP,
    KNEE,
    MANTISSAS,
    THRESHOLDS,
    Format,
    code_span,
    header_bytes,
    headroom,
)

ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
ROUND_BITS: tl.constexpr = tl.constexpr(0x4B400000)  # its bits
BROKEN_HEADER: tl.constexpr = tl.constexpr(BROKEN)
FAR_OUT: tl.constexpr = tl.constexpr(FAR)
KNEE_AT: tl.constexpr = tl.constexpr(KNEE)
GROUP_SIZE: tl.constexpr = tl.constexpr(GROUP)
MANTISSA_BITS: tl.constexpr = tl.constexpr(tuple(MANTISSAS))
THRESHOLD_BITS: tl.constexpr = tl.constexpr(tuple(THRESHOLDS))
MANY_TOKENS = 1024  # from here on a program takes several tokens, which share the loads of scales and order
PROGRAMS_PER_SM = 4  # of requantize, where every program has scratch rows of its own
NUM_WARPS = 8
# Left alone, ptxas keeps some values in memory, to fit more programs. An option of NVIDIA's alone.
FEW_REGISTERS, MANY_REGISTERS = ({} if torch.version.hip else {"maxnreg": most} for most in (128, 255))


@triton.jit
def _bf16_bits(value):
    """Round float32 -> its bf16 in the low half of an int32, the high half zero."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(value == value, rounded, 0x7FC0)


@triton.jit
def _of_bf16_bits(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_bf16(pointer, mask):
    """Load float32 of two bytes; by byte, because a row's values start at any address."""
    low, high = tl.load(pointer, mask, other=0).to(tl.int32), tl.load(pointer + 1, mask, other=0).to(tl.int32)
    return _of_bf16_bits(low | (high << 8))


@triton.jit
def _store_bytes(pointers, words, mask, SIZE: tl.constexpr, PAD: tl.constexpr):
    """Store the lower SIZE bytes of every word, little-endian, from its pointer on. PAD: SIZE's next power of 2.

    pointers, words: [...]; mask: broadcasts to them.
    """
    j = tl.arange(0, PAD)
    byte = (words.expand_dims(-1) >> (8 * j)) & 255
    tl.store(pointers.expand_dims(-1) + j, byte.to(tl.uint8), mask.expand_dims(-1) & (j < SIZE))


@triton.jit
def _normalized(value, scale, zero_point, feature, mask):
    """Return value (1 / scale_f) + zero_f."""
    inverse = tl.div_rn(1.0, tl.load(scale + feature, mask, other=1.0))
    return value * inverse + tl.load(zero_point + feature, mask, other=0.0)


@triton.jit
def _clip(value):
    return tl.minimum(tl.maximum(value, -KNEE_AT), KNEE_AT)


@triton.jit
def _scale_header(largest):
    """Compute scale_header of wire_format.py: float32 -> int32."""
    bits = largest.to(tl.int32, bitcast=True)
    j = 8 * ((bits >> 23) - 127)
    for i in tl.static_range(8):
        j += ((bits & 0x7FFFFF) >= THRESHOLD_BITS[i]).to(tl.int32)
    header = tl.where(largest > 0, tl.minimum(tl.maximum(j, -127), 126) + 128, 0)
    return tl.where(largest < float("inf"), header, BROKEN_HEADER)


@triton.jit
def _header_scale(header):
    """Compute header_scale of wire_format.py: int32 -> float32."""
    j = header - 128
    bits = ((j >> 3) + 127) << 23
    for i in tl.static_range(8):
        bits |= tl.where((j & 7) == i, MANTISSA_BITS[i], 0)
    scale = tl.where(header == 0, 0.0, bits.to(tl.float32, bitcast=True))
    return tl.where(header == BROKEN_HEADER, float("nan"), scale)


@triton.jit
def _whole(value, LARGEST: tl.constexpr):
    """Round float32 -> int32: what lies below -0.5, and NaN, becomes -1; what would exceed LARGEST, LARGEST + 1."""
    clamped = tl.minimum(tl.maximum(tl.where(value == value, value, -1.0), -1.0), LARGEST + 1.0)
    return (clamped + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def _row_facts(
    x, x_rows, good, features, headroom, scale, zero_point,
    PER_TOKEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ([TOKENS] whether a row holds NaN or Inf; per-token only: its token_header, and how many lie far out)."""
    WIDE: tl.constexpr = BLOCK if BLOCK > GROUP_SIZE else GROUP_SIZE  # whole groups
    GROUPS: tl.constexpr = WIDE // GROUP_SIZE
    broken = tl.zeros([TOKENS, WIDE], tl.int32)
    undefined = tl.zeros([TOKENS, WIDE], tl.int32)
    far = tl.zeros([TOKENS, WIDE], tl.int32)
    total = tl.zeros([TOKENS, GROUPS], tl.int32)
    given = tl.zeros([TOKENS, GROUPS], tl.int32)
    most = tl.zeros([TOKENS, GROUPS], tl.int32)
    for start in range(0, features, WIDE):
        at = start + tl.arange(0, WIDE)
        here = at < features
        mask = good[:, None] & here[None, :]
        value = tl.load(x + (x_rows[:, None] + at[None, :]), mask, other=0).to(tl.float32)
        broken |= (~(tl.abs(value) < float("inf"))).to(tl.int32)
        if PER_TOKEN:
            coded = mask & (tl.load(scale + at, here, other=0.0) < float("inf"))[None, :]
            size = tl.where(coded, tl.abs(_normalized(value, scale, zero_point, at, here)), 0.0)
            undefined |= (size != size).to(tl.int32)  # max may pass over NaN
            far += (~(size <= FAR_OUT)).to(tl.int32)
            header = _scale_header(tl.max(tl.reshape(size, [TOKENS, GROUPS, GROUP_SIZE]), 2))
            total += header
            given += (header > 0).to(tl.int32)
            most = tl.maximum(most, header)
    count, largest = tl.sum(given, 1), tl.max(most, 1)
    mean = (2 * tl.sum(total, 1) + count) // (2 * tl.maximum(count, 1))
    token = tl.maximum(mean, largest - headroom)
    token = tl.where((largest == BROKEN_HEADER) | (tl.max(undefined, 1) > 0), BROKEN_HEADER, token)
    return tl.max(broken, 1) > 0, token, tl.sum(far)


@triton.jit
def _encode_tier(
    x, x_rows, good, first, count, scale, zero_point, order, poison, token_scale, pointers,
    BITS: tl.constexpr, SPAN: tl.constexpr, PER_TOKEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one tier, in words of packing.py. pointers: [TOKENS] its first bytes. Returns the count saturated."""
    LARGEST: tl.constexpr = 2**BITS - 1
    # Codes and bytes of a word: 1 and 1 at 8 bits, 2 and 1 at 4 bits, 4 and 3 at 6 bits; 1 and 2 in bf16.
    PER: tl.constexpr = 1 if BITS % 8 == 0 else (2 if BITS == 4 else (4 if BITS % 2 == 0 else 8))
    SIZE: tl.constexpr = PER * BITS // 8
    PAD: tl.constexpr = SIZE if SIZE <= 2 else (4 if SIZE == 3 else 8)
    WORDS: tl.constexpr = BLOCK // PER
    outside = tl.zeros([TOKENS, WORDS, PER], tl.int32)
    place = tl.arange(0, PER)
    for start in range(0, tl.cdiv(count, PER), WORDS):
        word_at = start + tl.arange(0, WORDS)
        code_at = word_at[:, None] * PER + place[None, :]
        here = code_at < count
        wire = first + code_at
        mask = good[:, None, None] & here[None, :, :]
        feature = tl.load(order + wire, here, other=0).to(tl.int32)
        value = tl.load(x + (x_rows[:, None, None] + feature[None, :, :]), mask, other=0).to(tl.float32)
        if BITS == 16:
            code = _bf16_bits(value + poison[:, None, None])
        else:
            normed = _normalized(value, scale, zero_point, feature, here)
            if PER_TOKEN:
                inverse = tl.where(token_scale > 0, tl.div_rn(1.0, token_scale), 0.0)
                normed = normed * inverse[:, None, None]
                normed = (normed + _clip(normed)) * (1 / SPAN) + LARGEST / 2
            code = _whole(normed, LARGEST)
            if not PER_TOKEN:
                outside += (mask & ((code < 0) | (code > LARGEST))).to(tl.int32)
            code = tl.where(mask, tl.minimum(tl.maximum(code, 0), LARGEST), 0)
        if SIZE > 4:
            code = code.to(tl.int64)
        words = tl.sum(code << (BITS * place), 2)
        _store_bytes(
            pointers[:, None] + (word_at * SIZE)[None, :],
            words,
            good[:, None] & (word_at * PER < count)[None, :],
            SIZE,
            PAD,
        )
    return tl.sum(outside)


@triton.jit
def _encode(
    x, x_rows, good, features, headroom, scale, zero_point, order, rows, counts,
    WIDTHS: tl.constexpr, SPANS: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute pack_reference for TOKENS rows. x_rows: int32 [TOKENS] offsets in x; rows: [TOKENS] pointers to the
    messages. Returns how many values saturated, and how many rows travel as NaN."""
    broken, header, saturated = _row_facts(
        x, x_rows, good, features, headroom, scale, zero_point, PER_TOKEN, TOKENS, BLOCK
    )
    poison = tl.where(broken, float("nan"), 0.0)
    token_scale = poison
    if PER_TOKEN:
        header = tl.where(broken, BROKEN_HEADER, header)
        token_scale = _header_scale(header)
        tl.store(rows, header.to(tl.uint8), good)
    elif HEADER == 1:
        tl.store(rows, broken.to(tl.uint8), good)
    nonfinite = tl.sum((token_scale != token_scale).to(tl.int32))
    first = 0
    pointers = rows + HEADER
    for t in tl.static_range(len(WIDTHS)):
        count = counts[t] // 16
        saturated += _encode_tier(
            x, x_rows, good, first, count, scale, zero_point, order, poison, token_scale, pointers,
            WIDTHS[t], SPANS[t], PER_TOKEN, TOKENS, BLOCK,
        )  # fmt: skip
        first += count
        pointers += _tier_bytes(count, WIDTHS[t])
    return saturated, nonfinite


@triton.jit
def _tier_bytes(count, BITS: tl.constexpr):
    """Return 2 count in bf16; else packed_bytes(count, BITS), whole words."""
    PER: tl.constexpr = 1 if BITS % 8 == 0 else (2 if BITS == 4 else (4 if BITS % 2 == 0 else 8))
    return tl.cdiv(count, PER) * (PER * BITS // 8)


@triton.jit
def _decode_tier(
    rows, rank_stride, ranks, good, features, scale, zero_point, order, first, count, byte, mark, total,
    total_rows, BITS: tl.constexpr, SPAN: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode and sum one tier. rows: [TOKENS] pointers to rank 0's messages; byte: the tier's first, in a row; mark:
    the first of bf16."""
    LARGEST: tl.constexpr = 2**BITS - 1
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < count
        mask = good[:, None] & here[None, :]
        # A tier is one string of bits: code i starts at bit BITS i, and a code lies in at most two bytes.
        bit = at * BITS
        shift = bit & 7
        split = mask & (shift + BITS > 8)[None, :]
        feature = tl.load(order + first + at, here, other=0).to(tl.int32)
        summed = tl.zeros([TOKENS, BLOCK], tl.float32)
        for rank in range(0, ranks):
            sent = rows + rank * rank_stride
            pointer = sent[:, None] + (byte + (bit >> 3))[None, :]
            if BITS == 16:
                summed += _load_bf16(pointer, mask)
            else:
                code = tl.load(pointer, mask, other=0).to(tl.int32)
                if 8 % BITS != 0:
                    code |= tl.load(pointer + 1, split, other=0).to(tl.int32) << 8
                value = ((code >> shift[None, :]) & LARGEST).to(tl.float32)
                if PER_TOKEN:
                    token_scale = _header_scale(tl.load(sent, good, other=0).to(tl.int32))
                    value = (value - LARGEST / 2) * SPAN
                    value = (value - _clip(value * 0.5)) * token_scale[:, None]
                own_zero = tl.load(zero_point + rank * features + feature, here, other=0.0)
                own_scale = tl.load(scale + rank * features + feature, here, other=0.0)
                summed += (value - own_zero[None, :]) * own_scale[None, :]
            if not PER_TOKEN:
                if HEADER == 1:
                    broken = tl.load(sent, good, other=0) != 0
                else:
                    marked = _load_bf16(sent + mark, good & (tl.full([TOKENS], 0, tl.int32) + mark >= 0))
                    broken = marked != marked
                summed += tl.where(broken, float("nan"), 0.0)[:, None]
        out = total + (total_rows[:, None] + feature[None, :])
        if total.dtype.element_ty == tl.bfloat16:
            tl.store(out, _bf16_bits(summed).to(tl.int16).to(tl.bfloat16, bitcast=True), mask)
        else:
            tl.store(out, summed.to(total.dtype.element_ty), mask)


@triton.jit
def _decode(
    rows, rank_stride, ranks, good, features, scale, zero_point, order, total, total_rows, counts,
    WIDTHS: tl.constexpr, SPANS: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute unpack_reduce_reference for TOKENS rows. total_rows: int32 [TOKENS] offsets in total."""
    mark, byte = -1, HEADER
    for t in tl.static_range(len(WIDTHS)):
        if WIDTHS[t] == 16:
            mark = tl.where(counts[t] > 0, byte, -1)
        byte += _tier_bytes(counts[t] // 16, WIDTHS[t])
    first = 0
    byte = HEADER
    for t in tl.static_range(len(WIDTHS)):
        count = counts[t] // 16
        _decode_tier(
            rows, rank_stride, ranks, good, features, scale, zero_point, order, first, count, byte, mark, total,
            total_rows, WIDTHS[t], SPANS[t], PER_TOKEN, HEADER, TOKENS, BLOCK,
        )  # fmt: skip
        first += count
        byte += _tier_bytes(count, WIDTHS[t])


# These take many values; a kernel serves them all.
_ANY = ["tokens", "ranks", "row_bytes", "token_stride", "rank_stride", "tiles", "headroom"]


@triton.jit(do_not_specialize=_ANY)
def pack_kernel(
    x, x_stride, tokens, features, headroom, scale, zero_point, order, message, row_bytes, tally, counts,
    WIDTHS: tl.constexpr, SPANS: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    outside, nonfinite = _encode(
        x, token * x_stride, token < tokens, features, headroom, scale, zero_point, order, message + token * row_bytes,
        counts, WIDTHS, SPANS, PER_TOKEN, HEADER, TOKENS, BLOCK,
    )  # fmt: skip
    _count(tally, tokens * features, outside, nonfinite)


@triton.jit
def _count(tally, values, outside, nonfinite):
    """Add a program's counts; values: of all programs."""
    tl.store(tally, tl.cast(values, tl.int64), tl.program_id(0) == 0)
    tl.atomic_add(tally + 1, outside.to(tl.int64))
    tl.atomic_add(tally + 2, nonfinite.to(tl.int64))


@triton.jit(do_not_specialize=_ANY)
def unpack_reduce_kernel(
    messages, rank_stride, token_stride, ranks, tokens, features, scale, zero_point, order, total, counts,
    WIDTHS: tl.constexpr, SPANS: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    _decode(
        messages + token * token_stride, rank_stride, ranks, token < tokens, features, scale, zero_point, order,
        total, token * features, counts,
        WIDTHS, SPANS, PER_TOKEN, HEADER, TOKENS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ANY)
def requantize_kernel(
    messages, rank_stride, token_stride, ranks, tokens, tiles, features, scale, zero_point, order, counts,
    headroom, second_scale, second_zero_point, second_order, second_counts, message, row_bytes, tally, scratch,
    WIDTHS: tl.constexpr, SPANS: tl.constexpr, PER_TOKEN: tl.constexpr, HEADER: tl.constexpr,
    SECOND_WIDTHS: tl.constexpr, SECOND_SPANS: tl.constexpr,
    SECOND_PER_TOKEN: tl.constexpr, SECOND_HEADER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode, sum and encode again. scratch: float32 [programs, TOKENS, features]."""
    outside = tl.full([], 0, tl.int32)
    nonfinite = tl.full([], 0, tl.int32)
    own = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)) * features
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        good = token < tokens
        _decode(
            messages + token * token_stride, rank_stride, ranks, good, features, scale, zero_point, order,
            scratch, own, counts,
            WIDTHS, SPANS, PER_TOKEN, HEADER, TOKENS, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read what a thread wrote
        more_outside, more_nonfinite = _encode(
            scratch, own, good, features, headroom, second_scale, second_zero_point, second_order,
            message + token * row_bytes, second_counts,
            SECOND_WIDTHS, SECOND_SPANS, SECOND_PER_TOKEN, SECOND_HEADER, TOKENS, BLOCK,
        )  # fmt: skip
        outside += more_outside
        nonfinite += more_nonfinite
        tl.debug_barrier()  # and are done reading before the next tile overwrites it
    _count(tally, tokens * features, outside, nonfinite)


def pack(x: Tensor, format: Format, tile: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Launch hybrid_pack. x: rows of values side by side; the format's tensors: contiguous.

    tile: tokens and features that a program holds at a time, powers of 2 and no fewer than 8 features.
    """
    tokens, features = x.shape
    message = x.new_empty((tokens, format.row_bytes), dtype=torch.uint8)
    tally = torch.zeros(3, dtype=torch.int64, device=x.device)
    if tokens:
        at_once, block = tile or _tile(tokens)
        pack_kernel[(triton.cdiv(tokens, at_once),)](
            *(x, x.stride(0), tokens, features, _headroom(format.tiers), *format[:3]),
            *(message, format.row_bytes, tally),
            *_format(format.tiers, format.per_token),
            **_options(at_once, block),
            **FEW_REGISTERS,
        )
    return message, tally


def unpack_reduce(messages: Tensor, format: Format, total: Tensor, tile: tuple[int, int] | None = None) -> None:
    """Launch hybrid_unpack_reduce_into, into `total`. Layouts and `tile` as in `pack`."""
    ranks, tokens, _ = messages.shape
    if tokens:
        at_once, block = tile or _tile(tokens)
        unpack_reduce_kernel[(triton.cdiv(tokens, at_once),)](
            *(messages, messages.stride(0), messages.stride(1), ranks, tokens, format.features),
            *(*format[:3], total),
            *_format(format.tiers, format.per_token),
            **_options(at_once, block),
            **FEW_REGISTERS,
        )


def requantize(
    messages: Tensor,
    format: Format,
    second: Format,
    tile: tuple[int, int] | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch hybrid_unpack_reduce_requantize. Layouts and `tile` as in `pack`; programs: at most so many."""
    (ranks, tokens, _), features = messages.shape, format.features
    message = messages.new_empty((tokens, second.row_bytes))
    tally = torch.zeros(3, dtype=torch.int64, device=messages.device)
    if tokens:
        at_once, block = tile or _tile(tokens)
        tiles = triton.cdiv(tokens, at_once)
        programs = min(tiles, programs or PROGRAMS_PER_SM * _multiprocessors(messages.device))
        scratch = format.scale.new_empty((programs, at_once, features))
        counts, *constants = _format(format.tiers, format.per_token)
        second_counts, *second_constants = _format(second.tiers, second.per_token)
        requantize_kernel[(programs,)](
            *(messages, messages.stride(0), messages.stride(1), ranks, tokens, tiles, features),
            *(*format[:3], counts, _headroom(second.tiers), *second[:3], second_counts),
            *(message, second.row_bytes, tally, scratch, *constants, *second_constants),
            **_options(at_once, block),
            **MANY_REGISTERS,
        )
    return message, tally


def _headroom(tiers: Sequence[int]) -> int:
    return headroom(sum(count for bits, count in zip(tiers[::2], tiers[1::2], strict=True) if bits != BF16_BITS))


def _tile(tokens: int) -> tuple[int, int]:
    """Return how many tokens a program takes: of few tokens one, for as many programs as can be."""
    return (1, 1024) if tokens < MANY_TOKENS else (4, 512)


def _format(
    tiers: Sequence[int], per_token: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], bool, int]:
    """Return a kernel's arguments counts, WIDTHS, SPANS, PER_TOKEN and HEADER.

    Triton compiles anew for an argument that is 1 or a multiple of 16. Counts differ from layer to layer; 16 times a
    count is always such a multiple.
    """
    counts, widths = tuple(16 * count for count in tiers[1::2]), tuple(tiers[::2])
    spans = tuple(0.0 if bits == BF16_BITS else code_span(bits) for bits in widths)
    return counts, widths, spans, per_token, header_bytes(tiers, per_token)


def _options(at_once: int, block: int) -> dict[str, int | bool]:
    return {"TOKENS": at_once, "BLOCK": block, "num_warps": NUM_WARPS, "enable_fp_fusion": False}


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
