"""The wire format of partial sums, in plain torch: the oracle of the faster kernels, and what runs without them.

One token row (arXiv 2411.07942; tiers of other widths and the token's own range are ours):

    [ header | tier 0 | tier 1 | ... ]     a tier: `count` features of `bits` each; 16 bits are bf16, fewer are codes

`order` lists the features in this order, `tiers` is [bits, count, bits, count, ...], and codes of a tier are packed as
in packing.py. The paper's format is two tiers, 16 and 4 bits.

Both schemes normalize a value by its feature's static qparams, v = x (1 / scale_f) + zero_f, and decode
x^ = (v^ - zero_f) scale_f:

static   code = clamp(round(v)), v^ = code                      scale_f, zero_f: the feature's calibrated range
         header: none where a tier is bf16, which carries a NaN; else one byte, 1 for a token that holds NaN or Inf.
rank-1   code = clamp(round((v - low_t) ((1 / span_t) (2^b - 1)))), v^ = code (span_t (1 / (2^b - 1))) + low_t
         scale_f: the feature's calibrated standard deviation, zero_f: minus its mean over that; low_t, span_t: the
         token's own range of v over the features that are not bf16, which travel as the header: two bf16 values.

Arithmetic is float32, multiplying by reciprocals, one operation at a time (no fused multiply-add), rounding half to
even: so that every backend makes the same codes and the same sums. A token with NaN or Inf comes out as NaN in its
bf16 features (static), or in all features (rank-1, or with the header byte).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_lowbit.kernels.packing import pack_bits, packed_bytes, unpack_bits

BF16_BITS = 16


def tier_slices(tiers: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """(bits, first feature in wire order, number of features, first byte after the header, number of bytes)."""
    feature = byte = 0
    for bits, count in zip(tiers[::2], tiers[1::2], strict=True):
        size = 2 * count if bits == BF16_BITS else packed_bytes(count, bits)
        yield bits, feature, count, byte, size
        feature, byte = feature + count, byte + size


def header_bytes(tiers: Sequence[int], rank1: bool) -> int:
    """Bytes in front of every row."""
    return 4 if rank1 else 0 if BF16_BITS in tiers[::2] else 1


def hybrid_row_bytes(tiers: Sequence[int], rank1: bool) -> int:
    """Bytes of one token on the wire."""
    return header_bytes(tiers, rank1) + sum(size for *_, size in tier_slices(tiers))


def pack_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor, order: Tensor, tiers: Sequence[int], rank1: bool
) -> tuple[Tensor, Tensor]:
    """Encode one rank's partial sums.

    x: float [tokens, E]; order: int64 [E]; scale, zero_point: float32 [E] in wire order (those of bf16 features are
    not read). Returns (uint8 [tokens, hybrid_row_bytes(tiers, rank1)], int64 [1]: values that lay beyond their static
    range by more than half a step, or were NaN).
    """
    tokens = x.shape[0]
    values = x.index_select(1, order).float()
    broken = (0 * values).sum(1, keepdim=True)  # NaN for a token that holds NaN or Inf, else 0
    inverse = scale.reciprocal()
    parts: list[Tensor] = []
    low = span = values
    normed = values * inverse + zero_point
    if rank1:
        first_code = sum(count for bits, _, count, _, _ in tier_slices(tiers) if bits == BF16_BITS)
        ranged = normed[:, first_code:] if first_code < normed.shape[1] else normed.new_zeros(tokens, 1)
        low = ranged.amin(1, keepdim=True).to(torch.bfloat16)
        span = (ranged.amax(1, keepdim=True) - low.float() + broken).to(torch.bfloat16)
        parts.append(torch.cat([low, span], dim=1).view(torch.uint8))
        low, span = low.float(), span.float()
    elif header_bytes(tiers, rank1):
        parts.append(broken.isnan().to(torch.uint8))
    saturated = torch.zeros(1, dtype=torch.int64, device=x.device)
    for bits, first, count, _, _ in tier_slices(tiers):
        here = slice(first, first + count)
        if bits == BF16_BITS:
            parts.append((values[:, here] + broken).to(torch.bfloat16).view(torch.uint8))
            continue
        largest = 2**bits - 1
        if rank1:
            steps = torch.where(span > 0, span.reciprocal() * largest, 0.0)
            codes = torch.round((normed[:, here] - low) * steps)
        else:
            codes = torch.round(normed[:, here])
            saturated += (~((codes >= 0) & (codes <= largest))).sum()
        parts.append(pack_bits(codes.nan_to_num_(0.0).clamp_(0, largest).to(torch.uint8), bits))
    return torch.cat(parts, dim=1), saturated


hybrid_pack = torch.library.custom_op("megatron_lowbit::hybrid_pack", pack_reference, mutates_args=())


@hybrid_pack.register_fake
def _(x, scale, zero_point, order, tiers, rank1):
    row = hybrid_row_bytes(tiers, rank1)
    return x.new_empty((x.shape[0], row), dtype=torch.uint8), x.new_empty(1, dtype=torch.int64)


def unpack_reduce_reference(
    messages: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    order: Tensor,
    tiers: Sequence[int],
    rank1: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Decode the messages of N ranks and sum them in rank order, so that every rank ends with the same bits.

    messages: uint8 [N, tokens, row_bytes]; scale, zero_point: float32 [N, E] in wire order, each sender's.
    Returns [tokens, E] in `dtype`, features in their own order; the sum is float32.
    """
    tokens, header = messages.shape[1], header_bytes(tiers, rank1)
    total = scale.new_zeros(tokens, order.shape[0])
    for message, rank_scale, rank_zero in zip(messages, scale, zero_point, strict=True):
        low = span = total
        if rank1:
            low, span = _as_bf16(message[:, :4]).float().split(1, dim=1)
        for bits, first, count, byte, size in tier_slices(tiers):
            here, sent = slice(first, first + count), message[:, header + byte : header + byte + size]
            if bits == BF16_BITS:
                total[:, here] += _as_bf16(sent).float()
                continue
            codes = unpack_bits(sent, bits, count).float()
            if rank1:
                codes = codes * (span * (1 / (2**bits - 1))) + low
            total[:, here] += (codes - rank_zero[here]) * rank_scale[here]
        if header == 1:
            total += torch.where(message[:, :1] == 0, 0.0, torch.nan)
    # Columns are gathered into place: 0.19 ms for [1024, 128] on a CPU, where scattering them took 0.34 ms.
    return total.index_select(1, torch.argsort(order)).to(dtype)


hybrid_unpack_reduce = torch.library.custom_op(
    "megatron_lowbit::hybrid_unpack_reduce", unpack_reduce_reference, mutates_args=()
)


@hybrid_unpack_reduce.register_fake
def _(messages, scale, zero_point, order, tiers, rank1, dtype):
    return scale.new_empty((messages.shape[1], order.shape[0]), dtype=dtype)


def requantize_reference(
    messages: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    order: Tensor,
    tiers: Sequence[int],
    rank1: bool,
    second_scale: Tensor,
    second_zero_point: Tensor,
    second_order: Tensor,
    second_tiers: Sequence[int],
    second_rank1: bool,
) -> tuple[Tensor, Tensor]:
    """hybrid_unpack_reduce in float32, then hybrid_pack with the qparams of the sum: between the hops of two_shot.

    second_scale, second_zero_point: float32 [E] in second_order. Returns what hybrid_pack does.
    """
    total = unpack_reduce_reference(messages, scale, zero_point, order, tiers, rank1, torch.float32)
    return pack_reference(total, second_scale, second_zero_point, second_order, second_tiers, second_rank1)


hybrid_unpack_reduce_requantize = torch.library.custom_op(
    "megatron_lowbit::hybrid_unpack_reduce_requantize", requantize_reference, mutates_args=()
)


@hybrid_unpack_reduce_requantize.register_fake
def _(
    messages,
    scale,
    zero_point,
    order,
    tiers,
    rank1,
    second_scale,
    second_zero_point,
    second_order,
    second_tiers,
    second_rank1,
):
    row = hybrid_row_bytes(second_tiers, second_rank1)
    return messages.new_empty((messages.shape[1], row)), messages.new_empty(1, dtype=torch.int64)


def _as_bf16(part: Tensor) -> Tensor:
    """uint8 [tokens, 2 n] -> bf16 [tokens, n]; copied, because a row's bytes start at any address."""
    return part.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
