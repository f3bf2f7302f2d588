"""Reference kernels in plain torch: the oracle of every faster one, and what runs where there is none.

Wire format of one token row (arXiv 2411.07942; the ranges are static, so no scale or zero point travels):

    [ k features in bf16 | E - k features as num_bits codes, packed ]      2 k + ceil((E - k) / 2) bytes at 4 bits

Arithmetic is float32, cast at the store.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lowbit.kernels.packing import pack_bits, packed_bytes, unpack_bits


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(codes - zero_point) * scale (QLLM, arXiv 2310.08041, eq. 2, inverted).

    codes: uint8 [..., features]; scale, zero_point: float32 [..., groups], one pair per features / groups neighbours.
    Returns float32 [..., features].
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int) -> Tensor:
    """x'_c = sum over entries e -> c of coefficient[e] * x[src_idx[e]] (QLLM, eqs. 3 and 4).

    x: float [..., in]; src_idx, dst_idx: int64 [entries]; coefficient: float32 [entries]. Entries 0 .. width-1 go to
    channels 0 .. width-1, so only those of merged groups have to be added. Float32 arithmetic (float64 for a float64
    x), in x's dtype; differentiable.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    coefficient = coefficient.to(exact)
    gathered = x.index_select(-1, src_idx[:width]).to(exact) * coefficient[:width]
    if len(src_idx) > width:
        merged = x.index_select(-1, src_idx[width:]).to(exact) * coefficient[width:]
        gathered = gathered.index_add(-1, dst_idx[width:], merged)
    return gathered.to(x.dtype)


def hybrid_row_bytes(num_features: int, num_bf16: int, num_bits: int) -> int:
    """Bytes of one token on the wire."""
    return 2 * num_bf16 + packed_bytes(num_features - num_bf16, num_bits)


@torch.library.custom_op("megatron_lowbit::hybrid_pack", mutates_args=())
def hybrid_pack(
    x: Tensor, scale: Tensor, zero_point: Tensor, bf16_idx: Tensor, low_idx: Tensor, num_bits: int
) -> Tensor:
    """Encode one rank's partial sums.

    x: float [tokens, E]; bf16_idx: int64 [k]; low_idx: int64 [E - k], the other features in ascending order;
    scale, zero_point: float32 [E - k], this rank's static qparams of the features in low_idx.
    Returns uint8 [tokens, hybrid_row_bytes(E, k, num_bits)]. Values beyond the static range saturate; a token that
    holds NaN or Inf sends NaN in all its bf16 features, because a code could not say so (and cannot, at k = 0).
    """
    exact = x.index_select(1, bf16_idx) + 0 * x.sum(1, keepdim=True, dtype=torch.float32)
    exact_bytes = exact.to(torch.bfloat16).view(torch.uint8)
    low = x.index_select(1, low_idx).float()
    codes = torch.round(low / scale).add_(zero_point).clamp_(0, 2**num_bits - 1).to(torch.uint8)
    return torch.cat([exact_bytes, pack_bits(codes, num_bits)], dim=1)


@hybrid_pack.register_fake
def _(x, scale, zero_point, bf16_idx, low_idx, num_bits):
    return x.new_empty((x.shape[0], hybrid_row_bytes(x.shape[1], bf16_idx.shape[0], num_bits)), dtype=torch.uint8)


@torch.library.custom_op("megatron_lowbit::hybrid_unpack_reduce", mutates_args=())
def hybrid_unpack_reduce(
    messages: Tensor, scale: Tensor, zero_point: Tensor, bf16_idx: Tensor, low_idx: Tensor, num_bits: int
) -> Tensor:
    """Decode the messages of N ranks and sum them in rank order, so that every rank ends with the same bits.

    messages: uint8 [N, tokens, row_bytes]; scale, zero_point: float32 [N, E - k], each sender's qparams.
    Returns float32 [tokens, E].
    """
    num_bf16, num_low = bf16_idx.shape[0], low_idx.shape[0]
    tokens = messages.shape[1]
    exact_sum = scale.new_zeros(tokens, num_bf16)
    low_sum = scale.new_zeros(tokens, num_low)
    for message, rank_scale, rank_zero in zip(messages, scale, zero_point, strict=True):
        # A row's bytes start at any address, so they are copied to where bf16 values may lie.
        exact = message[:, : 2 * num_bf16].clone(memory_format=torch.contiguous_format).view(-1)
        exact_sum += exact.view(torch.bfloat16).view(tokens, num_bf16).float()
        codes = unpack_bits(message[:, 2 * num_bf16 :], num_bits, num_low)
        low_sum += codes.float().sub_(rank_zero).mul_(rank_scale)
    # Columns are gathered into place: 0.19 ms for [1024, 128] on a CPU, where scattering them took 0.34 ms.
    where = torch.argsort(torch.cat([bf16_idx, low_idx]))
    return torch.cat([exact_sum, low_sum], dim=1).index_select(1, where)


@hybrid_unpack_reduce.register_fake
def _(messages, scale, zero_point, bf16_idx, low_idx, num_bits):
    return scale.new_empty(messages.shape[1], bf16_idx.shape[0] + low_idx.shape[0])


@torch.library.custom_op("megatron_lowbit::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = x^ W^T with packed weights; x^ is x itself (weight-only schemes) or its dequantized codes.

    x: float [tokens, in], or uint8 codes [tokens, in] with x_scale, x_zero_point float32 [tokens, act_groups];
    packed_weight: uint8 [out, row_bytes]; weight_scale, weight_zero_point: float32 [out, weight_groups].
    Returns [tokens, out] in `dtype`. Codes are multiplied exactly, so a token's result is the same whatever batch it
    is in, and a weight's row whatever rows lie beside it.
    """
    codes = unpack_bits(packed_weight, weight_bits, x.shape[1])
    if x_scale is None or x_zero_point is None:
        return F.linear(x, dequantize(codes, weight_scale, weight_zero_point).to(x.dtype)).to(dtype)
    return _integer_linear(x, x_scale, x_zero_point, codes, weight_scale, weight_zero_point, weight_bits).to(dtype)


def _integer_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
) -> Tensor:
    """quant_linear on codes, float64 [tokens, out]. With s, z of x and S, Z of the weight, summed over blocks g:

        y = sum_g s S ( x.w  -  z (1.w)  -  (x.1 - k z) Z )        k channels that share s, z, S and Z

    x.w is a sum of whole numbers below 2^24, which float32 holds exactly in any order; float64 where it might not.
    """
    features = x.shape[1]
    blocks = math.lcm(x_scale.shape[1], weight_scale.shape[1])
    largest = 255 * (2**weight_bits - 1)
    while largest * (features // blocks) >= 2**24 and (features // blocks) % 2 == 0:
        blocks *= 2
    k = features // blocks
    exact = torch.float32 if largest * k < 2**24 else torch.float64
    s, z, scale, zero = (
        t.double().repeat_interleave(blocks // t.shape[1], 1)
        for t in (x_scale, x_zero_point, weight_scale, weight_zero_point)
    )
    a, w = (t.to(exact).unflatten(1, (blocks, k)) for t in (x, codes))
    left = torch.cat([s * z, s * (a.sum(2).double() - k * z)], dim=1)
    right = torch.cat([scale * w.sum(2).double(), scale * zero], dim=1)
    y = torch.mm(left, right.t()).neg_()
    for g in range(blocks):
        y.addcmul_(torch.mm(a[:, g], w[:, g].t()) * s[:, g, None], scale[:, g])
    return y


@quant_linear.register_fake
def _(x, x_scale, x_zero_point, packed_weight, weight_scale, weight_zero_point, weight_bits, dtype):
    return x.new_empty((x.shape[0], packed_weight.shape[0]), dtype=dtype)
