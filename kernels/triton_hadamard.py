"""The rotation of hadamard.py in Triton: a program holds some slices, each as 2^k rows of m channels.

It loads one channel of every row at a time and adds its products with a row of the Hartley matrix to the sums of the
rows. Then rows 1, 2, 4, ... apart are paired, by splitting the tensor and joining it again. One operation at a time,
none fused, as the definition has it; bf16 is rounded on its bits, since the interpreter's cast truncates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.hadamard import factors, split_width
from megatron_lowbit.kernels.triton_hybrid import _bf16_bits

FEWEST = 1024  # values of a program, where there are as many: narrow slices share one


@triton.jit(do_not_specialize=["slices"])
def hadamard_kernel(
    x, x_stride, y, matrix, slices, groups,
    K: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Rotate SLICES slices of 2^K M channels.

    x: float [tokens, groups * 2^K * M], tokens x_stride apart; y: alike, contiguous; matrix: float32 or float64 [M, M];
    slices: tokens * groups; WIDE: the power of 2 from M on; FACTOR: 2^(-K/2).
    """
    ROWS: tl.constexpr = SLICES << K
    place = tl.arange(0, ROWS)
    slice = tl.program_id(0).to(tl.int64) * SLICES + (place >> K)
    row = (place & ((1 << K) - 1)) * M
    good = slice < slices
    start = x + slice // groups * x_stride + slice % groups * (M << K) + row
    channel = tl.arange(0, WIDE)
    inside = channel < M
    z = tl.load(start, good, other=0).to(matrix.dtype.element_ty)[:, None]
    if M > 1:
        z = z * tl.load(matrix + channel, inside, other=0)[None, :]
        for j in range(1, M):
            column = tl.load(start + j, good, other=0).to(matrix.dtype.element_ty)
            z = z + column[:, None] * tl.load(matrix + j * M + channel, inside, other=0)[None, :]
    for step in tl.static_range(K):
        pairs = tl.reshape(z, [ROWS >> (step + 1), 2, WIDE << step])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        z = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, WIDE])
    z = z * tl.full([ROWS, WIDE], FACTOR, z.dtype)
    to = y + (slice * (M << K) + row)[:, None] + channel[None, :]
    if y.dtype.element_ty == tl.bfloat16:
        z = _bf16_bits(z).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(to, z.to(y.dtype.element_ty), good[:, None] & inside[None, :])


def held(channels: int) -> int:
    """Return how many values a program holds for a slice of that many channels."""
    k, m = split_width(channels)
    return triton.next_power_of_2(m) << k


def hadamard(x: Tensor, groups: int) -> Tensor:
    """Launch hadamard. x: float [tokens, width], rows of values side by side."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    slices, channels = x.shape[0] * groups, x.shape[1] // groups
    if not slices:
        return y
    (k, m), (matrix, factor) = split_width(channels), factors(x, groups)
    together = max(1, FEWEST // held(channels))
    hadamard_kernel[(triton.cdiv(slices, together),)](
        *(x, x.stride(0), y, matrix, slices, groups),
        K=k,
        M=m,
        WIDE=triton.next_power_of_2(m),
        SLICES=together,
        FACTOR=factor,
        num_warps=min(max(held(channels) // 1024, 4), 16),
        enable_fp_fusion=False,
    )
    return y
