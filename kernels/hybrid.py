"""Ops on the wire format (wire_format.py) in plain torch: the oracle of the faster kernels, and what runs without them.

A Format is five arguments of an op, because schemas know no tuples of tensors: hybrid_pack(x, *format).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake
from megatron_lowbit.kernels.packing import pack_bits, unpack_bits
from megatron_lowbit.kernels.wire_format import (
    BF16_BITS,
    BROKEN,
    FAR,
    KNEE,
    Format,
    code_span,
    header_bytes,
    header_scale,
    tier_slices,
    token_header,
)

FORMAT = "Tensor scale, Tensor zero_point, Tensor order, int[] tiers, bool per_token"
SECOND = "Tensor scale2, Tensor zero_point2, Tensor order2, int[] tiers2, bool per_token2"


def pack_reference(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Encode one rank's partial sums.

    x: float [tokens, E]. Returns (uint8 [tokens, hybrid_row_bytes(tiers, per_token)], int64 [3]: the values; of
    them those that lay beyond their static range by more than half a step (per-token: more than FAR standard deviations
    from their mean), or were NaN; the tokens that travel as NaN).
    """
    scale, zero_point, order, tiers, per_token = format
    values = x.float()
    broken = (0 * values).sum(1, keepdim=True)  # NaN for a token that holds NaN or Inf, else 0
    parts: list[Tensor] = []
    normed = values * scale.reciprocal() + zero_point
    saturated = torch.zeros(1, dtype=torch.int64, device=x.device)
    inverse, nonfinite = broken, broken.isnan()
    if per_token:
        first_code = sum(count for bits, _, count, _, _ in tier_slices(tiers) if bits == BF16_BITS)
        size = normed.abs().index_fill(1, order[:first_code], 0.0)
        saturated += (~(size <= FAR)).sum()
        parts.append(token_header(size + broken, len(order) - first_code))
        nonfinite = parts[0] == BROKEN
        token_scale = header_scale(parts[0])
        inverse = torch.where(token_scale > 0, token_scale.reciprocal(), 0.0)
    elif header_bytes(tiers, per_token):
        parts.append(nonfinite.to(torch.uint8))
    for bits, first, count, _, _ in tier_slices(tiers):
        here = order[first : first + count]
        if bits == BF16_BITS:
            parts.append((values[:, here] + broken).to(torch.bfloat16).view(torch.uint8))
            continue
        top = 2**bits - 1
        if per_token:
            u = normed[:, here] * inverse
            codes = torch.round((u + u.clamp(-KNEE, KNEE)) * (1 / code_span(bits)) + top / 2)
        else:
            codes = torch.round(normed[:, here])
            saturated += (~((codes >= 0) & (codes <= top))).sum()
        parts.append(pack_bits(codes.nan_to_num_(0.0).clamp_(0, top).to(torch.uint8), bits))
    tally = torch.cat([torch.full_like(saturated, x.numel()), saturated, nonfinite.sum().reshape(1)])
    return torch.cat(parts, dim=1), tally


def pack_flat(x: Tensor, *format: Any) -> tuple[Tensor, Tensor]:
    """Call pack_reference with the arguments of the op."""
    return pack_reference(x, Format(*format))


hybrid_pack = define(f"hybrid_pack(Tensor x, {FORMAT}) -> (Tensor, Tensor)", pack_flat)


@fake(hybrid_pack)
def _(x, *format):
    row = Format(*format).row_bytes
    return x.new_empty((x.shape[0], row), dtype=torch.uint8), x.new_empty(3, dtype=torch.int64)


def unpack_reduce_reference(messages: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """Decode the messages of N ranks and sum them in rank order, so that every rank ends with the same bits.

    messages: uint8 [N, tokens, row_bytes]; format: of all N senders.
    Returns [tokens, E] in `dtype`, features in their own order; the sum is float32.
    """
    scale, zero_point, order, tiers, per_token = format
    tokens, header = messages.shape[1], header_bytes(tiers, per_token)
    total = scale.new_zeros(tokens, order.shape[0])
    for message, rank_scale, rank_zero in zip(messages, scale[:, order], zero_point[:, order], strict=True):
        token_scale = header_scale(message[:, :1]) if per_token else total
        for bits, first, count, byte, size in tier_slices(tiers):
            here, sent = slice(first, first + count), message[:, header + byte : header + byte + size]
            if bits == BF16_BITS:
                total[:, here] += _as_bf16(sent).float()
                continue
            codes = unpack_bits(sent, bits, count).float()
            if per_token:
                w = (codes - (2**bits - 1) / 2) * code_span(bits)
                codes = (w - (w * 0.5).clamp(-KNEE, KNEE)) * token_scale
            total[:, here] += (codes - rank_zero[here]) * rank_scale[here]
        if not per_token:  # whose scale is NaN
            total += torch.where(_travels_as_nan(message, tiers), torch.nan, 0.0)
    # Columns are gathered into place: 0.19 ms for [1024, 128] on a CPU, where scattering them took 0.34 ms.
    return total.index_select(1, torch.argsort(order)).to(dtype)


def unpack_reduce_into_reference(messages: Tensor, format: Format, out: Tensor) -> None:
    """Decode and sum like unpack_reduce_reference, into `out` [tokens, E]: memory that is there already needs no fresh
    pages."""
    out.copy_(unpack_reduce_reference(messages, format, out.dtype))


def unpack_reduce_into_flat(messages: Tensor, *format_and_out: Any) -> None:
    """Call unpack_reduce_into_reference with the arguments of the op."""
    unpack_reduce_into_reference(messages, Format(*format_and_out[:5]), format_and_out[5])


hybrid_unpack_reduce_into = define(
    f"hybrid_unpack_reduce_into(Tensor messages, {FORMAT}, Tensor(a!) out) -> ()", unpack_reduce_into_flat
)


@fake(hybrid_unpack_reduce_into)
def _(messages, *format_and_out):
    pass


def hybrid_unpack_reduce(messages: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """Decode the messages of N ranks and sum them in rank order, by the kernel of the device
    (unpack_reduce_reference)."""
    total = format.scale.new_empty((messages.shape[1], format.features), dtype=dtype)
    hybrid_unpack_reduce_into(messages, *format, total)
    return total


def requantize_reference(messages: Tensor, format: Format, second: Format) -> tuple[Tensor, Tensor]:
    """Compute hybrid_unpack_reduce in float32, then hybrid_pack with the qparams of the sum: between the hops of
    two_shot.

    Returns what hybrid_pack does.
    """
    return pack_reference(unpack_reduce_reference(messages, format, torch.float32), second)


def requantize_flat(messages: Tensor, *formats: Any) -> tuple[Tensor, Tensor]:
    """Call requantize_reference with the arguments of the op."""
    return requantize_reference(messages, Format(*formats[:5]), Format(*formats[5:]))


hybrid_unpack_reduce_requantize = define(
    f"hybrid_unpack_reduce_requantize(Tensor messages, {FORMAT}, {SECOND}) -> (Tensor, Tensor)", requantize_flat
)


@fake(hybrid_unpack_reduce_requantize)
def _(messages, *formats):
    row = Format(*formats[5:]).row_bytes
    return messages.new_empty((messages.shape[1], row)), messages.new_empty(3, dtype=torch.int64)


def _travels_as_nan(message: Tensor, tiers: Sequence[int]) -> Tensor:
    """Return whether a sender's token travels as NaN, in a static format: uint8 [tokens, row_bytes] -> bool [tokens,
    1]."""
    if header_bytes(tiers, False):
        return message[:, :1] != 0
    first = next((byte for bits, _, count, byte, _ in tier_slices(tiers) if bits == BF16_BITS and count), None)
    return message[:, :1] != message[:, :1] if first is None else _as_bf16(message[:, first : first + 2]).isnan()


def _as_bf16(part: Tensor) -> Tensor:
    """View uint8 [tokens, 2 n] as bf16 [tokens, n]; copied, because a row's bytes start at any address."""
    return part.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
