"""Quantized tensor-parallel linears, independent of any framework: plain modules over packed weights.

    column-parallel   y_r = Q(x) Q(W_r)^T + b_r                      the rows W_r of the weight are this rank's outputs
    row-parallel      y   = all_reduce_r( Q(x_r) Q(W_r)^T ) + b      the columns W_r are this rank's inputs

Weights carry one scale per output channel (or group); activations are quantized dynamically per token (QLLM,
arXiv 2310.08041). The input of a row-parallel linear is quantized per token and shard group (`act_groups` equal
slices of the whole input), so a rank computes what it would compute at any other tensor-parallel size.

A checkpoint of method qllm adds two things: a ReassemblyPlan, carried out by the norm before column-parallel linears
(in one gather with its gain) or by a linear on its own input; and, where the correction was not merged, a low-rank
branch:

    y = Q(x S) Q(R W)^T + Q(x S) A^T B^T

A rotated one has the input of some row-parallel linears multiplied by the Hadamard matrix of each shard group first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import (
    FLOAT_BITS,
    blocks_of,
    codes_of,
    dequantize,
    forget_pages,
    panels_of,
    quant_linear,
    quantize_tokens,
    rotated_linear,
    rows_of,
)
from megatron_lowbit.kernels.cpu_linear import PreparedLinear
from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.kernels.quantizer import TokenQuantizer
from megatron_lowbit.layers.reassembled_norm import Reassembly, check_width
from megatron_lowbit.quant.affine import (
    Float32QParams,
    LowRank,
    QuantizedWeight,
    straight_through,
)
from megatron_lowbit.quant.input_clipping import WHOLE, Clip
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan


class QuantLinear(Float32QParams):
    """A quantized linear without communication: x [..., in_features] -> [..., out_features], both of this rank.

    A column-parallel linear is one of these, and so is every shard of a QuantRowParallelLinear, which adds the sum.

    act_bits: 16 leaves the activations as they are. act_groups: slices of the input with their own scale per token.
    plan: reassembles x first, where the module before it did not. low_rank: this rank's share of the branch. rotated:
    whether each of the act_groups slices of x is multiplied by the Hadamard matrix of its width, before all else.
    clip: what is left of the two ends of a token's range.
    """

    scale: Tensor  # float32 [out_features, groups]
    zero_point: Tensor  # float32 [out_features, groups]
    bias: nn.Parameter | None
    lora_a: Tensor | None  # bf16 [rank, in_features]
    lora_b: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        act_bits: int = 16,
        act_groups: int = 1,
        plan: ReassemblyPlan | None = None,
        low_rank: LowRank | None = None,
        rotated: bool = False,
        clip: Clip = WHOLE,
    ):
        super().__init__()
        self.rotated = rotated
        if weight.in_features % act_groups:
            raise LowBitError(
                f"{act_groups} activation shard groups do not divide {weight.in_features} inputs; "
                "quantize again with another weights.shard_groups"
            )
        if plan is not None and plan.width != weight.in_features:
            raise LowBitError(
                f"a reassembly to {plan.width} channels before a weight of {weight.in_features} inputs: "
                "the checkpoint does not fit together; quantize again"
            )
        self.in_features, self.out_features = weight.in_features, weight.packed_weight.shape[0]
        self.weight_bits, self.act_bits, self.act_groups = weight.num_bits, act_bits, act_groups
        self.clip = clip
        self._panels: Tensor | None = None  # on a CPU, after the first forward, what takes the place of the rows
        self._prepared: PreparedLinear | None = None  # of the panels
        self._buffers["packed_weight"] = weight.packed_weight
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_parameter("bias", _parameter(bias))
        self.reassembly = None if plan is None else Reassembly(plan)
        self.register_buffer("lora_a", None if low_rank is None else low_rank.lora_a)
        self.register_buffer("lora_b", None if low_rank is None else low_rank.lora_b)

    @property
    def packed_weight(self) -> Tensor:
        """Return the weight's codes as the artifact stores them: uint8 [out_features, row_bytes], a buffer."""
        self._order_as_rows()
        rows = self._buffers["packed_weight"]
        assert rows is not None
        return rows

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Compute y = x^ W^T + b and the branch's share. dtype: of the result; None: x's."""
        if (prepared := self._prepared_for(x)) is not None and (y := prepared(x, dtype or x.dtype)) is not None:
            bias = self._parameters["bias"]
            return y if bias is None else y + bias
        multiply = quant_linear
        if self.rotated:
            check_width(x, self.in_features if self.reassembly is None else self.reassembly.in_features)
            if self.reassembly is None and self.lora_a is None and not (torch.is_grad_enabled() and x.requires_grad):
                multiply = rotated_linear  # nothing else reads the rotated input: each token is rotated and quantized
            else:
                x = hadamard(x, self.act_groups)
        if self.reassembly is not None:
            x = self.reassembly(x)
        check_width(x, self.in_features)
        rows = x.reshape(-1, self.in_features)
        y = self._multiply(multiply, rows, dtype or x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + F.linear(F.linear(self._rounded(rows), self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _prepared_for(self, x: Tensor) -> PreparedLinear | None:
        """Return what computes y without torch's dispatcher, unless torch.compile or autograd have to see it."""
        prepared = self._prepared
        if torch.compiler.is_compiling() or prepared is None or (torch.is_grad_enabled() and x.requires_grad):
            return None
        (_, scale, zero_point), buffers = prepared.tensors, self._buffers  # may have become others since
        same = (
            buffers["scale"] is scale and buffers["zero_point"] is zero_point and prepared.rotated is bool(self.rotated)
        )
        return prepared if same and "reassembly" not in self._modules else None

    def _multiply(self, multiply: Callable[..., Tensor], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Run quant_linear or rotated_linear on rows [tokens, in_features]."""
        if self._panels is None and rows.device.type == "cpu":
            self._order_for_kernels()
        packed = self.packed_weight if self._panels is None else self._panels
        weight = (packed, self.scale, self.zero_point, self.weight_bits)
        if torch.is_grad_enabled() and rows.requires_grad:
            return _QuantLinearFunction.apply(rows, *weight, self.act_bits, self.act_groups, dtype, *self.clip)
        return multiply(rows, *weight, self.act_bits, self.act_groups, dtype, *self.clip)

    def _rounded(self, rows: Tensor) -> Tensor:
        """Return x^, what the codes of x stand for, with the straight-through gradient; x itself where it has none."""
        if self.act_bits == FLOAT_BITS:
            return rows
        codes = quantize_tokens(rows.detach(), self.act_bits, self.act_groups, *self.clip)
        return straight_through(rows, dequantize(*codes).to(rows.dtype))

    def _layout(self) -> tuple[int, int, int, bool]:
        blocks = blocks_of(self.act_bits, self.act_groups, self.scale.shape[1])
        return self.weight_bits, self.in_features, blocks, self.act_bits == FLOAT_BITS

    @torch.compiler.disable
    def _order_for_kernels(self) -> None:
        """Put the weight in the order that the CPU kernels read, in place of the rows: once, not at every call."""
        with torch.inference_mode(False):  # training may follow, and keeps no inference tensor for its backward
            self._panels = panels_of(self.packed_weight, *self._layout())
        if self._panels is not None:
            rows = self._buffers.pop("packed_weight")
            assert rows is not None
            forget_pages(rows)
            self._prepare()

    def _prepare(self) -> None:
        """Prepare the products with the panels, where nothing is done to x before them or with it beside them."""
        if self._panels is not None and self.reassembly is None and self.lora_a is None:
            acts = TokenQuantizer(self.act_bits, self.act_groups, *self.clip)
            weight = (self._panels, self.scale, self.zero_point, self.weight_bits, self.in_features)
            self._prepared = PreparedLinear(*weight, acts, bool(self.rotated))

    def _order_as_rows(self) -> None:
        """Put the weight back into rows: for whatever stores it, loads it, moves it or looks at it."""
        panels, self._panels, self._prepared = self._panels, None, None
        if panels is not None:
            with torch.inference_mode(False):
                rows = rows_of(panels, self.out_features, *self._layout())
            self._buffers = {"packed_weight": rows, **self._buffers}  # the first of them, as in every state dict

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self._prepared = None
        if self._panels is not None:  # a move to where they are leaves them: patches are put in place by one
            if fn(self._panels.new_empty(0)).device.type == "cpu":
                self._panels = fn(self._panels)
            else:
                self._order_as_rows()
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._order_as_rows()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._order_as_rows()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._order_as_rows()
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        scheme = f"W{self.weight_bits}A{self.act_bits}"
        return f"{self.in_features}, {self.out_features}, {scheme}, act_groups={self.act_groups}"


class _QuantLinearFunction(torch.autograd.Function):
    """Forward on codes; backward straight through both roundings: dx = dy W^, W^ the dequantized weight."""

    @staticmethod
    def forward(ctx, rows, packed_weight, scale, zero_point, bits, act_bits, act_groups, dtype, *clip):  # type: ignore[override]
        ctx.save_for_backward(packed_weight, scale, zero_point)
        blocks = blocks_of(act_bits, act_groups, scale.shape[1])
        ctx.layout, ctx.dtype = (bits, rows.shape[1], blocks, act_bits == FLOAT_BITS), rows.dtype
        return quant_linear(rows.detach(), packed_weight, scale, zero_point, bits, act_bits, act_groups, dtype, *clip)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        packed_weight, scale, zero_point = ctx.saved_tensors
        weight = dequantize(codes_of(packed_weight, len(scale), *ctx.layout), scale, zero_point)
        return (grad.float() @ weight).to(ctx.dtype), *[None] * 9


class DenseShard(nn.Module):
    """Full-precision x_r W_r^T of one rank, for a row-parallel linear whose communication alone is low-bit.

    weight: the rank's own; or with `size` virtual ranks the whole one, which they share, so that it can be trained.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, rank: int = 0, size: int = 1):
        super().__init__()
        self.rank, self.size = rank, size
        self.register_parameter("weight", _parameter(weight))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.size == 1:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight.chunk(self.size, dim=1)[self.rank].contiguous())


class QuantRowParallelLinear(nn.Module):
    """x [..., in_features_per_partition] -> [..., out_features], summed over the ranks.

    shards: this rank's matrix product (without bias); in one process that stands for N virtual ranks, all N of them,
    each for an equal slice of x. reducer: None where there is nothing to sum. bias is added after the collective.
    sequence_parallel: this rank keeps its share of the sum along the first dimension (Megatron's [tokens, batch, ...]).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        shards: Sequence[nn.Module],
        reducer: HybridReducer | VirtualReducer | None,
        bias: Tensor | None = None,
        sequence_parallel: bool = False,
    ):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.shards = nn.ModuleList(shards)
        self.reducer = reducer
        self.register_parameter("bias", _parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        # Float32 partial sums that nothing rounds travel as float64: their sum is then the same for any number of
        # ranks, where an ulp could flip a code of the next layer.
        exact = x.dtype == torch.float32 and self.reducer is not None and self.reducer.native
        dtype = torch.float64 if exact else None
        if isinstance(self.reducer, VirtualReducer):
            slices = x.chunk(len(self.shards), dim=-1)
            y = self.reducer.all_reduce([shard(x_r, dtype) for shard, x_r in zip(self.shards, slices, strict=True)])
        else:
            y = self.shards[0](x, dtype)
            if self.reducer is not None:
                y = self.reducer.reduce_scatter(y) if self.sequence_parallel else self.reducer.all_reduce(y, reuse=True)
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


def activation_groups(in_features: int, shard_groups: int) -> int:
    """Return the greatest divisor of `shard_groups` that divides the width: 8 -> 4 for 172 inputs, 1 for an odd width.

    A number of ranks that divides both divides it too.
    """
    return math.gcd(in_features, shard_groups)


def check_fits(name: str, linear: nn.Module, replaced: nn.Module) -> None:
    """Raise LowBitError where a quantized linear has other widths than the linear that it replaces.

    name: the linear's name in the model, for the error. Other modules, and linears without a weight of two
    dimensions, are not looked at.
    """
    weight = getattr(replaced, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return
    outputs, inputs = weight.shape
    found, read = [outputs], inputs
    if isinstance(linear, QuantLinear):  # what it reads may be the output of a reassembling norm
        found = [linear.out_features]
    elif isinstance(linear, QuantRowParallelLinear):
        shards = [shard for shard in linear.shards if isinstance(shard, QuantLinear)]
        found = [shard.out_features for shard in shards]
        if shards:
            read = sum(s.in_features if s.reassembly is None else s.reassembly.in_features for s in shards)
        plan = None if linear.reducer is None else linear.reducer.plan
        if plan is not None:
            found.append(len(plan.first.bits))
    if read != inputs or any(width != outputs for width in found):
        width = next((w for w in found if w != outputs), outputs)
        raise LowBitError(
            f"{name} is [{outputs}, {inputs}] in the model and [{width}, {read}] in the artifact, which belongs to "
            "another model; calibrate and quantize this one"
        )


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """Return a host's own parameter as it is, so that what trains it goes on; any other tensor frozen."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)
