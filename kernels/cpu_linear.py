"""The ops of quantizer.py, token_rows.py, reassembly.py, hadamard.py and linear.py on CPUs, in C++ (csrc/linear.cpp).

Quantization and product are one call. The bits are the definition's (linear.py), but for weight-only products of bf16
activations, which the CPU's bf16 instructions sum in float32. Weights in panels (panels.py) are read as they are; rows
are put in order at every call.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_lowbit.kernels.hadamard import check_hadamard, factors, hadamard, hadamard_reference
from megatron_lowbit.kernels.linear import (
    FLOAT_BITS,
    check_linear,
    quant_linear,
    quant_linear_reference,
    rotated_linear,
    rotated_linear_reference,
)
from megatron_lowbit.kernels.ops import kernel
from megatron_lowbit.kernels.panels import blocks_of, linear_kernels, panels_of, rows_of
from megatron_lowbit.kernels.quantizer import TokenQuantizer, quantize_tokens
from megatron_lowbit.kernels.reassembly import reassemble_op, reassemble_reference
from megatron_lowbit.kernels.token_rows import (
    check_rows,
    decode_tokens,
    decode_tokens_reference,
    encode_tokens,
    encode_tokens_reference,
    round_tokens,
    round_tokens_reference,
    row_bytes,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in tokens.h
_HALF_AND_SINGLE = {torch.float32, torch.bfloat16, torch.float16}  # which are rotated in float32


_LINEAR = struct.Struct("PqqiiPqqPPqiiqPiffPd")  # Linear of linear.cpp; as bytes, which are made in no time


@kernel(quant_linear, "cpu")
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
    """Compute quant_linear with the C++ kernel."""
    acts = TokenQuantizer(act_bits, act_groups, low_ratio, high_ratio)
    check_linear(x, packed_weight, scale, zero_point, weight_bits, acts)
    y = _multiply(x, packed_weight, scale, zero_point, weight_bits, acts, dtype)
    if y is not None:
        return y
    rows = rows_of(packed_weight, scale.shape[0], *_layout(x, scale, weight_bits, acts))
    return quant_linear_reference(
        x, rows, scale, zero_point, weight_bits, act_bits, act_groups, dtype, low_ratio, high_ratio
    )


@kernel(rotated_linear, "cpu")
def _rotated_linear(x: Tensor, *linear: Any) -> Tensor:
    """Compute rotated_linear with the C++ kernel, which quantizes a token right after it has rotated it."""
    packed_weight, scale, zero_point, weight_bits, act_bits, act_groups, dtype, *ratios = linear
    acts = TokenQuantizer(act_bits, act_groups, *ratios)
    check_linear(x, packed_weight, scale, zero_point, weight_bits, acts)
    check_hadamard(x, act_groups)
    y = None
    if act_bits != FLOAT_BITS and x.dtype != torch.float64:  # which is rotated in float64
        rotation = factors(x, act_groups)
        y = _multiply(x, packed_weight, scale, zero_point, weight_bits, acts, dtype, rotation)
    return rotated_linear_reference(x, *linear) if y is None else y


def _layout(x: Tensor, scale: Tensor, weight_bits: int, acts: TokenQuantizer) -> tuple[int, int, int, bool]:
    """Return what panels_of is told of a weight besides its rows."""
    return weight_bits, x.shape[1], blocks_of(acts.bits, acts.groups, scale.shape[1]), acts.bits == FLOAT_BITS


def _multiply(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_bits: int,
    acts: TokenQuantizer,
    dtype: torch.dtype,
    rotation: tuple[Tensor, float] | None = None,
) -> Tensor | None:
    """Run the kernel on arguments that fit together; None where it cannot run.

    rotation: hadamard's factors for x's slices, if they are rotated first.
    """
    library, (outputs, groups), (tokens, inputs) = linear_kernels.find(), scale.shape, x.shape
    good = library is not None and x.dtype in _DTYPES and dtype in _DTYPES and outputs > 0
    if library is None or not good or scale.dtype != torch.float32 or zero_point.dtype != torch.float32:
        return None
    layout = _layout(x, scale, weight_bits, acts)
    panels = panels_of(packed_weight, *layout) if packed_weight.dim() == 2 else packed_weight
    if panels is None:
        return None
    if panels.numel() != library.lowbit_panel_bytes(outputs, inputs, layout[2], weight_bits):
        raise ValueError(f"panels of {panels.numel()} bytes are not those of a weight [{outputs}, {inputs}]")
    if x.stride(1) != 1:
        x = x.contiguous()
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    matrix, factor = (0, 0.0) if rotation is None else (rotation[0].data_ptr(), rotation[1])
    y = x.new_empty((tokens, outputs), dtype=dtype)
    job = _LINEAR.pack(
        *(x.data_ptr(), tokens, x.stride(0), _DTYPES[x.dtype], _DTYPES[dtype]),
        *(panels.data_ptr(), outputs, inputs, scale.data_ptr(), zero_point.data_ptr(), groups),
        *(weight_bits, acts.bits, acts.groups, y.data_ptr(), torch.get_num_threads()),
        *(acts.low, acts.high, matrix, factor),
    )
    library.lowbit_linear(job)
    return y


class PreparedLinear:
    """quant_linear, or rotated_linear, of one weight in panels without what takes longer than a product of one token:
    torch's dispatcher, and the checks of a weight that has run through the op before.

    The arguments and the result are those of the ops; x is [..., in], and y [..., out].
    """

    def __init__(
        self, panels: Tensor, scale: Tensor, zero_point: Tensor, weight_bits: int, inputs: int, acts: TokenQuantizer,
        rotated: bool,
    ):  # fmt: skip
        self.tensors, self.rotated = (panels, scale, zero_point), rotated
        of_float32 = scale.dtype == zero_point.dtype == torch.float32
        self._good = of_float32 and scale.is_contiguous() and zero_point.is_contiguous() and len(scale) > 0
        self._good = self._good and not (rotated and acts.bits == FLOAT_BITS)
        self._inputs, self._outputs = inputs, len(scale)
        self._weight = (scale.shape[1], weight_bits, acts.bits, acts.groups)
        self._acts = (acts.low, acts.high, 0, 0.0)
        if rotated:
            self._matrix, factor = factors(torch.empty((0, inputs)), acts.groups)
            self._acts = (acts.low, acts.high, self._matrix.data_ptr(), factor)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Compute y in `dtype`; None where the op has to: for other tensors than plain ones side by side in memory on a
        CPU, and where something listens to ops. The caller sees to autograd and torch.compile."""
        library = linear_kernels.find() if self._good else None
        if library is None or type(x) is not Tensor or x.device.type != "cpu" or not x.is_contiguous() or _listens():
            return None
        if x.dtype not in _HALF_AND_SINGLE or dtype not in _DTYPES or x.shape[-1] != self._inputs:
            return None
        y = torch.empty((*x.shape[:-1], self._outputs), dtype=dtype)
        panels, scale, zero_point = self.tensors
        job = _LINEAR.pack(
            *(x.data_ptr(), x.numel() // self._inputs, self._inputs, _DTYPES[x.dtype], _DTYPES[dtype]),
            *(panels.data_ptr(), self._outputs, self._inputs, scale.data_ptr(), zero_point.data_ptr(), *self._weight),
            *(y.data_ptr(), torch.get_num_threads(), *self._acts),
        )
        library.lowbit_linear(job)
        return y


def _listens() -> bool:
    """Tell whether something wants to see this thread's ops: a mode, torch.func or the profiler."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or is_in_torch_dispatch_mode() or torch._C._autograd._profiler_enabled()


@kernel(quantize_tokens, "cpu")
def _quantize_tokens(
    x: Tensor, num_bits: int, groups: int, low_ratio: float = 1.0, high_ratio: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute quantize_tokens with the C++ kernel."""
    quantizer = TokenQuantizer(num_bits, groups, low_ratio, high_ratio)
    quantizer.check(x)
    library = linear_kernels.find()
    if library is None or x.dtype not in _DTYPES:
        return quantizer(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    scale = x.new_empty((x.shape[0], groups), dtype=torch.float32)
    zero_point = torch.empty_like(scale)
    library.lowbit_quantize_tokens(
        *(x.data_ptr(), _DTYPES[x.dtype], x.shape[0], x.stride(0), x.shape[1], num_bits, groups),
        *(low_ratio, high_ratio),
        *(codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), torch.get_num_threads()),
    )
    return codes, scale, zero_point


def _rows_for_kernels(x: Tensor) -> tuple[Any, Tensor] | None:
    """Return (the kernels, x [..., width] as rows that they read); None where they cannot run."""
    library = linear_kernels.find()
    if library is None or x.dtype not in _DTYPES or x.dtype == torch.float64:
        return None
    rows = x.reshape(-1, x.shape[-1])
    return library, rows if rows.stride(1) == 1 else rows.contiguous()


@kernel(encode_tokens, "cpu")
def _encode_tokens(x: Tensor, num_bits: int, low_ratio: float = 1.0, high_ratio: float = 1.0) -> Tensor:
    """Compute encode_tokens_reference with the C++ kernel."""
    found = _rows_for_kernels(x)
    if found is None:
        return encode_tokens_reference(x, num_bits, low_ratio, high_ratio)
    library, tokens = found
    TokenQuantizer(num_bits, 1, low_ratio, high_ratio).check(tokens)
    rows = x.new_empty((*x.shape[:-1], row_bytes(x.shape[-1], num_bits)), dtype=torch.uint8)
    library.lowbit_encode_tokens(
        *(tokens.data_ptr(), _DTYPES[x.dtype], tokens.shape[0], tokens.stride(0), tokens.shape[1], num_bits),
        *(low_ratio, high_ratio, rows.data_ptr(), rows.shape[-1], torch.get_num_threads()),
    )
    return rows


@kernel(decode_tokens, "cpu")
def _decode_tokens(rows: Tensor, num_bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """Compute decode_tokens_reference with the C++ kernel."""
    library = linear_kernels.find()
    if library is None or dtype not in _DTYPES or dtype == torch.float64 or rows.dim() < 2 or not rows.numel():
        return decode_tokens_reference(rows, num_bits, width, dtype)
    check_rows(rows, num_bits, width)
    tokens = rows.reshape(-1, *rows.shape[-2:])  # a view of a cache whose room is not all used
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    x = rows.new_empty((*rows.shape[:-1], width), dtype=dtype)
    library.lowbit_decode_tokens(
        *(tokens.data_ptr(), tokens.shape[0], tokens.stride(0), tokens.shape[1], tokens.stride(1), tokens.shape[2]),
        *(num_bits, width, _DTYPES[dtype], x.data_ptr(), torch.get_num_threads()),
    )
    return x


@kernel(round_tokens, "cpu")
def _round_tokens(x: Tensor, num_bits: int, groups: int, low_ratio: float = 1.0, high_ratio: float = 1.0) -> Tensor:
    """Compute round_tokens_reference with the C++ kernel."""
    found = _rows_for_kernels(x)
    if found is None:
        return round_tokens_reference(x, num_bits, groups, low_ratio, high_ratio)
    library, tokens = found
    TokenQuantizer(num_bits, groups, low_ratio, high_ratio).check(tokens)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.lowbit_round_tokens(
        *(tokens.data_ptr(), _DTYPES[x.dtype], tokens.shape[0], tokens.stride(0), tokens.shape[1], num_bits),
        *(groups, low_ratio, high_ratio, y.data_ptr(), torch.get_num_threads()),
    )
    return y


@kernel(reassemble_op, "cpu")
def _reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float) -> Tensor:
    """Compute reassemble_reference with the C++ kernel."""
    library, inputs = linear_kernels.find(), x.shape[-1]
    good = library is not None and x.dtype in _DTYPES and x.dtype != torch.float64 and 0 < inputs < 2**31
    good = good and coefficient.dtype == torch.float32 and src_idx.dtype == dst_idx.dtype == torch.int64
    good = good and src_idx.shape == dst_idx.shape == coefficient.shape and 0 < width <= len(src_idx)
    if library is None or not good:
        return reassemble_reference(x, src_idx, dst_idx, coefficient, width, eps)
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    src_idx, dst_idx, coefficient = src_idx.contiguous(), dst_idx.contiguous(), coefficient.contiguous()
    y = x.new_empty((*x.shape[:-1], width))
    not_valid = library.lowbit_reassemble(
        *(rows.data_ptr(), _DTYPES[x.dtype], rows.shape[0], rows.stride(0), inputs),
        *(src_idx.data_ptr(), dst_idx.data_ptr(), coefficient.data_ptr(), src_idx.shape[0], width, eps),
        *(y.data_ptr(), torch.get_num_threads()),
    )
    if not_valid:  # an index that is not there: the error is torch's
        return reassemble_reference(x, src_idx, dst_idx, coefficient, width, eps)
    return y


@kernel(hadamard, "cpu")
def _hadamard(x: Tensor, groups: int) -> Tensor:
    """Compute hadamard_reference with the C++ kernel."""
    check_hadamard(x, groups)
    library = linear_kernels.find()
    if library is None:
        return hadamard_reference(x, groups)
    rows, (matrix, factor) = x.reshape(-1, x.shape[-1]), factors(x, groups)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.lowbit_hadamard(
        *(rows.data_ptr(), _DTYPES[x.dtype], rows.shape[0], rows.stride(0), rows.shape[1], groups),
        *(matrix.data_ptr(), factor, y.data_ptr(), torch.get_num_threads()),
    )
    return y
