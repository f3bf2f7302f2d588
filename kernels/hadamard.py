"""The rotation of neighbouring channels by a fixed orthogonal matrix (QuaRot, arXiv 2404.00456), in plain torch.

A slice of n = 2^k m channels, m odd, is multiplied by

    R_n = 2^(-k/2) (H_{2^k} kron C_m)        H: Sylvester's Hadamard matrix, entries +-1
                                             C_m[i, j] = (cos + sin)(2 pi i j / m) / sqrt(m): the Hartley matrix

R_n is symmetric and orthogonal, so its own inverse, and no entry is above sqrt(2 / n). Hadamard matrices of other sizes
(12, 20, 28, ...) would need tables and are not known for every size; C_m exists for every m. It is multiplied densely,
m products a channel, which is why m has a limit.

The bits, in float32 (float64 for float64), one operation at a time without fused multiply-add, for channel i of every m
neighbours and then for pairs of channels h m apart, h = 1, 2, 4, ... 2^(k-1):

    z_i  = C_m[0, i] x_0 + C_m[1, i] x_1 + ...         left to right; z = x where m = 1
    a, b = a + b, a - b                                a, b: the pair
    y    = 2^(-k/2) z                                  rounded to x's dtype

Every backend makes the same bits, and a token's are the same in every batch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, library

from megatron_lowbit.kernels.ops import define, fake

MAX_ODD = 1023  # the largest odd factor: at 1,023 a channel takes as many products as in a linear of 1,023 outputs
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def split_width(width: int) -> tuple[int, int]:
    """Return (k, m) of width = 2^k m with m odd, width >= 1."""
    k = (width & -width).bit_length() - 1
    return k, width >> k


def hadamard_obstacle(width: int, groups: int = 1) -> str | None:
    """Return in one line why `groups` equal slices of `width` channels are not rotated, and which would be; None where
    they are."""
    if groups < 1 or width < 1 or width % groups:
        return f"{groups} groups do not divide {width} channels"
    n = width // groups
    k, odd = split_width(n)
    if odd <= MAX_ODD:
        return None
    fitting = max(divisor for divisor in range(1, MAX_ODD + 1) if odd % divisor == 0) << k
    return (
        f"a rotation of {n} channels would take {odd} products a channel, its odd factor, and at most {MAX_ODD} are "
        f"allowed: {width // fitting} groups of {fitting} channels would fit"
    )


def check_hadamard(x: Tensor, groups: int) -> None:
    """Raise ValueError, naming the value, where the arguments of hadamard do not fit together."""
    if x.dtype not in FLOATS or not x.dim():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, not float [..., width]")
    if obstacle := hadamard_obstacle(x.shape[-1], groups):
        raise ValueError(obstacle)


def _hartley(m: int) -> Tensor:
    """Return C_m, float64 [m, m]."""
    turns = (2 * math.pi * i / m for i in range(m))
    values = torch.tensor([(math.cos(turn) + math.sin(turn)) / math.sqrt(m) for turn in turns], dtype=torch.float64)
    i = torch.arange(m)
    return values[i[:, None] * i % m]


@lru_cache(maxsize=32)  # matrices of 4 MiB at most
def hartley(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return C_m as every backend multiplies it: float64 rounded to `dtype`, [m, m]; not to be written to."""
    return _hartley(m).to(dtype).to(device)


def hadamard_matrix(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return R_width [width, width], computed in float64. Raises ValueError for an odd factor above MAX_ODD."""
    if obstacle := hadamard_obstacle(width):
        raise ValueError(obstacle)
    k, m = split_width(width)
    matrix, sign = _hartley(m), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(k):
        matrix = torch.kron(sign, matrix)
    return (matrix * 2 ** (-k / 2)).to(dtype)


def hadamard_reference(x: Tensor, groups: int) -> Tensor:
    """Multiply each of `groups` equal slices of the last dimension by R_n, n its channels.

    x: float [..., width]; `groups` divides width, and the odd factor of width / groups is MAX_ODD at most. Returns
    float [..., width] in x's dtype. Its own inverse, but for rounding, and its own gradient. Raises ValueError where x
    and groups do not fit together.
    """
    check_hadamard(x, groups)
    k, m = split_width(x.shape[-1] // groups)
    exact = torch.promote_types(x.dtype, torch.float32)
    z = x.to(exact).unflatten(-1, (-1, m))
    if m > 1:
        matrix, values = hartley(m, exact, x.device), z
        z = matrix[0] * values[..., :1]
        for j in range(1, m):
            z = z + matrix[j] * values[..., j : j + 1]
    for h in (2**i for i in range(k)):
        a, b = z.flatten(x.dim() - 1).unflatten(-1, (-1, 2, h * m)).unbind(-2)
        z = torch.stack([a + b, a - b], dim=-2)
    return (z.flatten(x.dim() - 1) * 2 ** (-k / 2)).to(x.dtype).contiguous()


hadamard = define("hadamard(Tensor x, int groups) -> Tensor", hadamard_reference)


@fake(hadamard)
def _(x, groups):
    return x.new_empty(x.shape)


def _save_groups(ctx, inputs, output) -> None:
    ctx.groups = inputs[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return hadamard(grad, ctx.groups), None


library.register_autograd(hadamard.name(), _backward, setup_context=_save_groups)
