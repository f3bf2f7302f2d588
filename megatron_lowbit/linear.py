"""Quantized tensor-parallel linears, independent of any framework: plain modules over packed weights.

    column-parallel   y_r = Q(x) Q(W_r)^T + b_r                      the rows W_r of the weight are this rank's outputs
    row-parallel      y   = all_reduce_r( Q(x_r) Q(W_r)^T ) + b      the columns W_r are this rank's inputs

Weights carry one scale per output channel (or group); activations are quantized dynamically per token (QLLM,
arXiv 2310.08041). The input of a row-parallel linear is quantized per token and shard group (`act_groups` equal
slices of the whole input), so a rank computes what it would compute at any other tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.collectives import HybridReducer, VirtualReducer
from megatron_lowbit.kernels import quant_linear
from megatron_lowbit.quantizer import Float32QParams, QuantizedWeight, choose_qparams, quantize


class QuantColumnParallelLinear(Float32QParams):
    """x [..., in_features] -> [..., out_features_per_partition]; no communication.

    act_bits: 16 leaves the activations as they are. act_groups: slices of the input with their own scale per token.
    """

    packed_weight: Tensor  # uint8 [out_features, row_bytes]
    scale: Tensor  # float32 [out_features, groups]
    zero_point: Tensor  # float32 [out_features, groups]
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, act_bits: int = 16, act_groups: int = 1):
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.packed_weight.shape[0]
        self.weight_bits, self.act_bits, self.act_groups = weight.num_bits, act_bits, act_groups
        self.register_buffer("packed_weight", weight.packed_weight)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_parameter("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        act_scale = act_zero_point = None
        if self.act_bits < 16:
            act_scale, act_zero_point = choose_qparams(
                rows, self.act_bits, group_size=self.in_features // self.act_groups
            )
            rows = quantize(rows, act_scale, act_zero_point, self.act_bits)
        weight = (self.packed_weight, self.scale, self.zero_point, self.weight_bits)
        y = quant_linear(rows, act_scale, act_zero_point, *weight, x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        scheme = f"W{self.weight_bits}A{self.act_bits}"
        return f"{self.in_features}, {self.out_features}, {scheme}, act_groups={self.act_groups}"


class DenseShard(nn.Module):
    """Full-precision x_r W_r^T of one rank, for a row-parallel linear whose communication alone is low-bit."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_parameter("weight", weight if isinstance(weight, nn.Parameter) else _frozen(weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QuantRowParallelLinear(nn.Module):
    """x [..., in_features_per_partition] -> [..., out_features], summed over the ranks.

    shards: this rank's matrix product (without bias); in one process that stands for N virtual ranks, all N of them,
    each for an equal slice of x. reducer: None where there is nothing to sum. bias is added after the collective.
    """

    bias: nn.Parameter | None

    def __init__(
        self, shards: Sequence[nn.Module], reducer: HybridReducer | VirtualReducer | None, bias: Tensor | None = None
    ):
        super().__init__()
        self.shards = nn.ModuleList(shards)
        self.reducer = reducer
        self.register_parameter("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.reducer, VirtualReducer):
            slices = x.chunk(len(self.shards), dim=-1)
            y = self.reducer.all_reduce([shard(x_r) for shard, x_r in zip(self.shards, slices, strict=True)])
        else:
            y = self.shards[0](x)
            if self.reducer is not None:
                y = self.reducer.all_reduce(y)
        return y if self.bias is None else y + self.bias


def activation_groups(in_features: int, shard_groups: int) -> int:
    """`shard_groups`, halved until it divides the width: 8 -> 4 for 172 inputs, 1 for an odd width."""
    while in_features % shard_groups:
        shard_groups //= 2
    return max(shard_groups, 1)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
