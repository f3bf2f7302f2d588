"""The gather of reassembly.py, with or without the RMS norm before it, in Triton: a program makes one token.

It sweeps the token once for its mean of squares, in float64, and again, from cache by then, for the channels. What is
merged is added in the order of the entries, as no gather with atomic additions would. One operation at a time, none
fused; bf16 is rounded on its bits, since the interpreter's cast truncates.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.reassembly import NO_NORM
from megatron_lowbit.kernels.triton_hybrid import _bf16_bits


@triton.jit
def _taken(row, src, coefficient, entry, inputs, here, factor, NORM: tl.constexpr):
    """Return what entries add to their channels, float32; 0 of a channel that is not there."""
    channel = tl.load(src + entry, here, other=0)
    value = tl.load(row + channel, here & (channel >= 0) & (channel < inputs), other=0).to(tl.float32)
    if NORM:
        value = value * factor
    return value * tl.load(coefficient + entry, here, other=0)


@triton.jit
def reassemble_kernel(
    x, x_stride, src, dst, coefficient, y, inputs, width, entries,
    EPS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make y [tokens, width] of x [tokens, inputs], tokens x_stride apart; entries from `width` on are merged.

    src, dst: int64 [entries]; coefficient: float32 [entries]; EPS: of the norm, if there is NORM.
    """
    token = tl.program_id(0).to(tl.int64)
    row = x + token * x_stride
    factor = tl.full([], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, inputs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(row + at, at < inputs, other=0).to(tl.float32).to(tl.float64)
            squares += value * value
        mean = tl.sum(squares, 0) / tl.full([], inputs, tl.float64)
        factor = (1.0 / tl.sqrt(mean + tl.full([], EPS, tl.float64))).to(tl.float32)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        here = channel < width
        total = _taken(row, src, coefficient, channel, inputs, here, factor, NORM)
        for entry in range(width, entries):
            merged = _taken(row, src, coefficient, entry, inputs, True, factor, NORM)
            total = tl.where(channel == tl.load(dst + entry), total + merged, total)
        if y.dtype.element_ty == tl.bfloat16:
            total = _bf16_bits(total).to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(y + token * width + channel, total.to(y.dtype.element_ty), here)


def reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float) -> Tensor:
    """Launch reassemble_reference. x: float [tokens, in], rows of values side by side; the others contiguous."""
    y = x.new_empty((x.shape[0], width))
    if y.numel():
        block = min(max(triton.next_power_of_2(width), 32), 2048)
        reassemble_kernel[(x.shape[0],)](
            *(x, x.stride(0), src_idx, dst_idx, coefficient, y, x.shape[1], width, len(src_idx)),
            EPS=eps,
            NORM=eps != NO_NORM,
            BLOCK=block,
            num_warps=max(block // 256, 1),
            enable_fp_fusion=False,
        )
    return y
