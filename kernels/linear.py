"""The product of a token with a packed weight: what every backend computes, bit for bit.

With s, z the scale and zero point of a token, S, Z those of an output channel, x and w the codes, over the blocks of
neighbouring channels that share s, z, S and Z:

    bracket = x.w - z (1.w) - (x.1 - k z) Z            k channels in the block; float64, in this order
    y       = sum_h S_h sum_g s_g bracket_gh           float64; blocks in their order, then weight groups in theirs

x.w, 1.w and x.1 are whole numbers and exact, and so is the bracket as long as its terms are whole and below 2^53. One
operation at a time (no fused multiply-add), and one rounding to the output's dtype at the end. No order of work
changes a bit: a token's result is the same whatever batch it is in, and a channel's whatever channels lie beside it.

Weight-only schemes (activations of 16 bits) have no codes of x: s = 1, z = 0, and x.w, x.1 are sums of floats. Here
they are float64; a backend may sum bf16 activations in float32, in an order that no batch changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.kernels.ops import define, fake
from megatron_lowbit.kernels.packing import packed_bytes, unpack_bits
from megatron_lowbit.kernels.quantizer import TokenQuantizer

FLOAT_BITS = 16  # act_bits of activations that are not quantized


def quant_linear_reference(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_bits: int,
    act_bits: int,
    act_groups: int,
    dtype: torch.dtype,
    low_ratio: float = 1.0,
    high_ratio: float = 1.0,
) -> Tensor:
    """Compute y = x^ W^T with a packed weight W, x^ being x quantized per token (QLLM, arXiv 2310.08041, eq. 2).

    x: float [tokens, in]; packed_weight: uint8 [out, row_bytes] (packing.py); the op of CPUs takes 1-D panels, too
    (panels.py); scale, zero_point: float32 [out, weight_groups]; weight_bits: 2 to 8. act_bits: 2 to 8, each of
    `act_groups` equal slices of a token with its own scale; 16: x is not quantized. low_ratio, high_ratio: what is left
    of the ends of a token's range (TokenQuantizer).
    Returns [tokens, out] in `dtype`. Raises ValueError where they do not fit together.
    """
    acts = TokenQuantizer(act_bits, act_groups, low_ratio, high_ratio)
    check_linear(x, packed_weight, scale, zero_point, weight_bits, acts)
    if packed_weight.dim() == 1:
        raise ValueError(f"a weight in the order of the CPU kernels cannot be multiplied on {x.device}")
    codes = unpack_bits(packed_weight, weight_bits, x.shape[1])
    if act_bits == FLOAT_BITS:
        one = x.new_ones((x.shape[0], 1), dtype=torch.float64)
        return round_to(multiply(x.double(), one, one - 1, codes, scale, zero_point), dtype)
    return round_to(multiply(*acts(x), codes, scale, zero_point), dtype)


def check_linear(
    x: Tensor, packed_weight: Tensor, scale: Tensor, zero_point: Tensor, weight_bits: int, acts: TokenQuantizer
) -> None:
    """Raise ValueError, naming the value, where the arguments of quant_linear do not fit together."""
    if not 2 <= weight_bits <= 8:
        raise ValueError(f"weight_bits={weight_bits} is not in 2..8")
    if not 2 <= acts.bits <= 8 and acts.bits != FLOAT_BITS:
        raise ValueError(f"act_bits={acts.bits} is not in 2..8 or {FLOAT_BITS}")
    acts.check_ratios()
    if x.dim() != 2 or scale.dim() != 2 or zero_point.shape != scale.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (x, scale, zero_point))
        raise ValueError(f"x, scale and zero_point {shapes} are not [tokens, in], [out, groups] and [out, groups]")
    inputs, (outputs, weight_groups) = x.shape[1], scale.shape
    for name, groups in (("activation groups", acts.groups), ("weight groups", weight_groups)):
        if groups < 1 or inputs % groups:
            raise ValueError(f"{groups} {name} do not divide {inputs} inputs")
    rows = [outputs, packed_bytes(inputs, weight_bits)]
    if packed_weight.dtype != torch.uint8 or (packed_weight.dim() != 1 and list(packed_weight.shape) != rows):
        found = f"{packed_weight.dtype} {list(packed_weight.shape)}"
        raise ValueError(f"packed_weight {found} is not uint8 {rows}, which {inputs} inputs of {weight_bits} bits take")


def multiply(x: Tensor, x_scale: Tensor, x_zero: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Sum what the module's docstring writes down: float64 [tokens, out].

    x: uint8 codes [tokens, in], or float64 values with scale 1 and zero point 0; x_scale, x_zero: [tokens, act_groups];
    codes: uint8 [out, in]; scale, zero_point: float32 [out, weight_groups].
    """
    x_scale, x_zero = x_scale.double(), x_zero.double()
    weight_groups, act_groups = scale.shape[1], x_scale.shape[1]
    blocks = math.lcm(weight_groups, act_groups)
    k = x.shape[1] // blocks
    y = x_scale.new_zeros((x.shape[0], codes.shape[0]))
    for h, columns in enumerate(range(0, blocks, blocks // weight_groups)):
        inner = torch.zeros_like(y)
        for b in range(columns, columns + blocks // weight_groups):
            here, g = slice(b * k, (b + 1) * k), b * act_groups // blocks
            a, w, s, z = x[:, here], codes[:, here], x_scale[:, g, None], x_zero[:, g, None]
            bracket = _dot(a, w) - z * w.sum(1, dtype=torch.float64)
            bracket -= (a.sum(1, keepdim=True, dtype=torch.float64) - k * z) * zero_point[:, h].double()
            inner += s * bracket
        y += inner * scale[:, h].double()
    return y


def _dot(a: Tensor, w: Tensor) -> Tensor:
    """Compute a w^T in float64. Codes are multiplied in float32, which holds whole numbers below 2^24 in any order."""
    if a.dtype != torch.uint8:
        return torch.mm(a, w.to(a.dtype).t())
    exact = 2**24 // 255**2  # channels
    total = torch.zeros((len(a), len(w)), dtype=torch.float64, device=a.device)
    for x, y in zip(a.float().split(exact, 1), w.float().split(exact, 1), strict=True):
        total += torch.mm(x, y.t())
    return total


def round_to(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype` once. torch goes to 16 bits by way of float32, which would round twice.

    So the bits that float32 cannot hold are cut off, and the last one that it holds is set where any was lost: never a
    tie, it then rounds to 16 bits as the whole number would have (rounding to odd; exact above 2^-126).
    """
    if dtype in (torch.float64, torch.float32):
        return y.to(dtype)
    bits, beyond = y.contiguous().view(torch.int64), 2**29 - 1
    odd = (bits & ~beyond) | ((bits & beyond) != 0).to(torch.int64) << 29
    return odd.view(torch.float64).to(torch.float32).to(dtype)


def rotated_linear_reference(x: Tensor, *linear: Any) -> Tensor:
    """Compute quant_linear of x whose act_groups slices are rotated first (hadamard.py), as the weight's inputs were
    before it was quantized.

    linear: the other arguments of quant_linear. Returns and raises what hadamard and quant_linear do.
    """
    return quant_linear(hadamard(x, linear[5]), *linear)


_ARGUMENTS = (
    "Tensor x, Tensor packed_weight, Tensor scale, Tensor zero_point, int weight_bits, int act_bits, int act_groups, "
    "ScalarType dtype, float low_ratio=1.0, float high_ratio=1.0"
)
quant_linear = define(f"quant_linear({_ARGUMENTS}) -> Tensor", quant_linear_reference)
rotated_linear = define(f"rotated_linear({_ARGUMENTS}) -> Tensor", rotated_linear_reference)


@fake(quant_linear)
@fake(rotated_linear)
def _(x, packed_weight, scale, zero_point, weight_bits, act_bits, act_groups, dtype, low_ratio=1.0, high_ratio=1.0):
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=dtype)
