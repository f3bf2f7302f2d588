"""Kernels of the linears in plain torch: dequantization, reassembly and the product with packed weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, library
from torch.nn import functional as F

from megatron_lowbit.kernels.packing import unpack_bits


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (codes - zero_point) * scale (QLLM, arXiv 2310.08041, eq. 2, inverted).

    codes: uint8 [..., features]; scale, zero_point: float32 [..., groups], one pair per features / groups neighbours.
    Returns float32 [..., features].
    """
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int) -> Tensor:
    """Compute x'_c = sum over entries e -> c of coefficient[e] * x[src_idx[e]] (QLLM, eqs. 3 and 4).

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


@library.custom_op("megatron_lowbit::quant_linear", mutates_args=())
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
    """Compute y = x^ W^T with packed weights; x^ is x itself (weight-only schemes) or its dequantized codes.

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
    """Compute quant_linear on codes, float64 [tokens, out]. With s, z of x and S, Z of the weight, summed over blocks
    g:

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
