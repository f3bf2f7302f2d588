"""quantize_tokens, quant_linear, hadamard and reassemble on CUDA devices, by Triton, imported at the first call.

The torch reference runs where triton is missing, which is said once, and where a kernel's integers would not hold the
result. $MEGATRON_LOWBIT_KERNELS as in cpu.py; triton: these or an error.
"""

from __future__ import annotations

import os
from importlib import import_module
from math import lcm
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.gpu import has_triton
from megatron_lowbit.kernels.hadamard import check_hadamard, hadamard, hadamard_reference, split_width
from megatron_lowbit.kernels.linear import FLOAT_BITS, quant_linear, quant_linear_reference
from megatron_lowbit.kernels.ops import kernel
from megatron_lowbit.kernels.quantizer import TokenQuantizer, quantize_tokens, quantize_tokens_reference
from megatron_lowbit.kernels.reassembly import reassemble_op, reassemble_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GRID = 2**16 - 1  # programs of a launch's second and third dimension
HELD = 2**16  # bytes that a program rotates: they pass through shared memory, and AMD's GPUs have no more


def _kernels(name: str, obstacle: str | None) -> Any:
    """Return the module of Triton kernels; None where the reference is to run. obstacle: what is in the way."""
    mode = os.environ.get("MEGATRON_LOWBIT_KERNELS")
    if mode == "reference":
        return None
    if obstacle is not None:
        if mode == "triton":
            raise RuntimeError(f"MEGATRON_LOWBIT_KERNELS=triton: {obstacle}")
        return None
    return import_module(f"megatron_lowbit.kernels.{name}") if has_triton() else None


def _rows(x: Tensor) -> Tensor:
    """Return x with the values of a row side by side; the rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def tokens_obstacle(x: Tensor, acts: TokenQuantizer) -> str | None:
    """Return why the kernel does not quantize these tokens; None where it does."""
    if x.dim() != 2 or x.dtype not in (*FLOATS, torch.float64):
        return f"tokens are {x.dtype} of {x.dim()} dimensions"
    if not 2 <= acts.bits <= 8 or not 1 <= acts.groups <= GRID or x.shape[1] % acts.groups or not x.shape[1]:
        return f"{acts.bits} bits, {acts.groups} groups of {x.shape[1]} channels"
    if not (0 < acts.low <= 1 and 0 < acts.high <= 1):
        return f"ratios {acts.low} and {acts.high} of a range"
    return None


def linear_obstacle(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_bits: int,
    acts: TokenQuantizer,
    dtype: torch.dtype,
) -> str | None:
    """Return why the kernels do not multiply these; None where they do."""
    floats = acts.bits == FLOAT_BITS
    obstacle = tokens_obstacle(x, TokenQuantizer(8) if floats else acts)
    if obstacle is not None or (floats and x.dtype not in FLOATS):
        return obstacle or f"tokens are {x.dtype}"
    if packed_weight.dim() != 2 or not 2 <= weight_bits <= 8:
        return f"the weight has {packed_weight.dim()} dimensions and {weight_bits} bits"
    if any(t.dtype != torch.float32 or t.dim() != 2 or t.shape != scale.shape for t in (scale, zero_point)):
        return "scales and zero points of the weight are not float32 of one shape"
    if dtype not in (*FLOATS, torch.float64):
        return f"the result is {dtype}"
    blocks = lcm(scale.shape[1], 1 if floats else acts.groups)
    if x.shape[1] % blocks:
        return f"{blocks} blocks do not divide {x.shape[1]} channels"
    if x.shape[1] // blocks >= 2**17:  # products of 2^14 add up to int32, and their count is exact in float32
        return f"blocks of {x.shape[1] // blocks} channels"
    # Rows begin anywhere; inside a row, and in what few tokens' pieces take, offsets are int32.
    far = scale.numel() >= 2**31 or 64 * scale.shape[0] >= 2**31 or len(x) >= 2**31 or 8 * x.shape[1] >= 2**31
    if far or x.shape[1] // 64 + blocks > GRID or len(x) // 16 >= GRID:
        return f"a product of {len(x)} tokens, {x.shape[1]} channels, {scale.shape[0]} outputs"
    return None


@kernel(quantize_tokens, "cuda")
def _quantize_tokens(
    x: Tensor, num_bits: int, groups: int, low_ratio: float = 1.0, high_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute quantize_tokens with the Triton kernel."""
    acts = TokenQuantizer(num_bits, groups, low_ratio, high_ratio)
    kernels = _kernels("triton_quantize", tokens_obstacle(x, acts))
    if kernels is None:
        return quantize_tokens_reference(x, *acts)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        return kernels.quantize_tokens(_rows(x), acts)


@kernel(quant_linear, "cuda")
def _quant_linear(
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
    """Compute quant_linear with the Triton kernels."""
    acts = TokenQuantizer(act_bits, act_groups, low_ratio, high_ratio)
    kernels = _kernels("gpu_tiles", linear_obstacle(x, packed_weight, scale, zero_point, weight_bits, acts, dtype))
    if kernels is None:
        flat = weight_bits, act_bits, act_groups, dtype, low_ratio, high_ratio
        return quant_linear_reference(x, packed_weight, scale, zero_point, *flat)
    weight = packed_weight.contiguous(), scale.contiguous(), zero_point.contiguous()
    with torch.cuda.device(x.device):
        return kernels.quant_linear(_rows(x), *weight, weight_bits, acts, dtype)


def rotation_obstacle(x: Tensor, groups: int) -> str | None:
    """Return why the kernel does not rotate these slices, which the op does; None where it does."""
    k, m = split_width(x.shape[-1] // groups)
    held = (1 << (m - 1).bit_length() + k) * max(x.element_size(), 4)
    if held > HELD:
        return f"slices of {m << k} channels, {held} bytes of a program"
    return f"{x.numel()} values" if x.numel() // (m << k) >= 2**31 else None


@kernel(hadamard, "cuda")
def _hadamard(x: Tensor, groups: int) -> Tensor:
    """Compute hadamard with the Triton kernel."""
    check_hadamard(x, groups)
    kernels = _kernels("triton_hadamard", rotation_obstacle(x, groups))
    if kernels is None:
        return hadamard_reference(x, groups)
    with torch.cuda.device(x.device):
        return kernels.hadamard(_rows(x.reshape(-1, x.shape[-1])), groups).view(x.shape)


def reassembly_obstacle(
    x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float
) -> str | None:
    """Return why the kernel does not gather these channels, which the op does; None where it does."""
    if x.dtype not in FLOATS or not x.dim() or not x.shape[-1]:
        return f"tokens are {x.dtype} {list(x.shape)}"
    if src_idx.dtype != torch.int64 or dst_idx.dtype != torch.int64 or coefficient.dtype != torch.float32:
        return f"entries are {src_idx.dtype}, {dst_idx.dtype} and {coefficient.dtype}"
    if not 0 < width <= len(src_idx) or not len(src_idx) == len(dst_idx) == len(coefficient):
        return f"{len(src_idx)}, {len(dst_idx)} and {len(coefficient)} entries make {width} channels"
    return f"{len(src_idx)} entries" if max(x.numel(), len(src_idx)) >= 2**31 else None


@kernel(reassemble_op, "cuda")
def _reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float) -> Tensor:
    """Compute reassemble with the Triton kernel."""
    arguments = src_idx, dst_idx, coefficient, width, eps
    kernels = _kernels("triton_reassembly", reassembly_obstacle(x, *arguments))
    if kernels is None:
        return reassemble_reference(x, *arguments)
    entries = src_idx.contiguous(), dst_idx.contiguous(), coefficient.contiguous()
    with torch.cuda.device(x.device):
        y = kernels.reassemble(_rows(x.reshape(-1, x.shape[-1])), *entries, width, eps)
    return y.view(*x.shape[:-1], width)
