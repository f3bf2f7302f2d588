"""Triton's kernel of hadamard against the reference, bit for bit: `python triton_hadamard_cases.py cpu|cuda`.

On the CPU it needs TRITON_INTERPRET=1. Prints the number of cases; the first that differs ends it with an error.
"""

from __future__ import annotations

import sys

import torch
from kernel_inputs import DTYPES, assert_same_bits, check_all

from megatron_lowbit.kernels import hadamard, triton_hadamard
from megatron_lowbit.kernels.hadamard import hadamard_reference

# (tokens, groups, channels of a slice): one row and many, odd factors of one channel, of a power of 2 less one, and of
# others; slices that share a program, the last not full.
SMALL = [(2, 1, 1), (1, 3, 3), (3, 2, 8), (1, 1, 37), (5, 1, 64), (3, 5, 72), (7, 1, 128), (0, 2, 64)]
LARGE = [(2, 3, 88), (3, 3, 96), (2, 2, 172), (1, 2, 576), (1, 2, 1376), (2, 1, 7 * 256)]


def check(tokens: int, groups: int, channels: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(tokens, groups * channels + 3, generator=generator)[:, 2:-1]  # rows that lie apart
    x[:, ::7] = -0.0
    x[:, 1::11] *= 1e-39
    for token, value in enumerate((float("nan"), float("inf"), 3e38)[: max(0, tokens - 1)]):
        x[token, (5 * token) % x.shape[1]] = value
    x = x.to(dtype).to(device)
    op = hadamard if device == "cuda" else triton_hadamard.hadamard
    y = op(x, groups)
    assert y.is_contiguous()
    assert_same_bits(y.cpu(), hadamard_reference(x.cpu(), groups))


if __name__ == "__main__":
    device = sys.argv[1]
    every = [(*case, dtype, device) for case in SMALL for dtype in DTYPES]
    large = DTYPES if device == "cuda" else [torch.bfloat16]
    check_all([*every, *((*case, dtype, device) for case in LARGE for dtype in large)], check)
