"""Triton's kernel of reassemble against the reference, bit for bit: `python triton_reassembly_cases.py cpu|cuda`.

On the CPU it needs TRITON_INTERPRET=1. Prints the number of cases; the first that differs ends it with an error.
"""

from __future__ import annotations

import sys

import torch
from kernel_inputs import assert_same_bits, check_all

from megatron_lowbit.kernels import NO_NORM, triton_reassembly
from megatron_lowbit.kernels.reassembly import reassemble_op, reassemble_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (tokens, inputs, channels, merged entries): one channel; less than a block, and more than the largest one; many that
# meet in one channel.
SHAPES = [(1, 1, 1, 0), (0, 8, 8, 1), (3, 173, 190, 20), (2, 64, 64, 0), (2, 2050, 2100, 7), (1, 40, 8, 32)]


def check(shape: tuple[int, int, int, int], dtype: torch.dtype, eps: float, device: str) -> None:
    tokens, inputs, width, merged = shape
    generator = torch.Generator().manual_seed(inputs)
    x = (torch.randn(tokens, inputs + 3, generator=generator)[:, 2:-1] * 3).to(dtype)  # rows that lie apart
    if tokens > 1:
        x[0, 1::7] = -0.0
        x[1, 5] = float("nan")
    src = torch.randint(inputs, (width + merged,), generator=generator)
    dst = torch.cat([torch.arange(width), torch.randint(width, (merged,), generator=generator)])
    arguments = src, dst, torch.rand(width + merged, generator=generator)
    op = reassemble_op if device == "cuda" else triton_reassembly.reassemble
    y = op(x.to(device), *(tensor.to(device) for tensor in arguments), width, eps)
    assert_same_bits(y.cpu(), reassemble_reference(x, *arguments, width, eps))


if __name__ == "__main__":
    device = sys.argv[1]
    check_all([(shape, dtype, eps, device) for shape in SHAPES for dtype in DTYPES for eps in (1e-5, NO_NORM)], check)
