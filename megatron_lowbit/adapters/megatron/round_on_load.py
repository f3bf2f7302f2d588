"""Round-to-nearest quantization of one rank's share of a Megatron-Core linear: once for all, or in every forward pass.

    round_column, round_row   a weight that is not trained is packed when a checkpoint has been loaded
    StraightThrough           a weight that is trained stays, and is rounded to the same codes in every forward pass

The codes are those that rounding the whole weight and sharding it afterwards gives: rows are rounded by themselves, and
the range of a row-parallel weight's output channel is taken over all ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ValidationError
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.kernels import pack_bits
from megatron_lowbit.layers.linear import (
    DenseShard,
    QuantLinear,
    QuantRowParallelLinear,
    activation_groups,
)
from megatron_lowbit.quant.affine import (
    QuantizedWeight,
    Scheme,
    choose_qparams,
    fake_quantize,
    fake_quantize_with,
    qparams_from_range,
    quantize,
)
from megatron_lowbit.quant.tp_sizes import default_shard_groups, groups_for
from megatron_lowbit.runtime.distributed import world_size


def parse_recipe(quantization_config: Any) -> WeightsConfig:
    """Parse the entry of Megatron's recipe file that matched a layer: the keys of our `weights` section."""
    where = f"recipe entry {quantization_config.config_key!r} (for {quantization_config.match_input.module_path})"
    given = dict(quantization_config.config)
    refused = ("method", "attention", "rotation", "lm_head_bits", "clipping", "rounding")
    without_effect = [key for key in refused if key in given]
    if without_effect:
        raise LowBitError(f"{where}: {without_effect[0]} has no effect on load, which rounds to nearest; leave it out")
    if "scheme" not in given:
        raise LowBitError(f"{where} has no scheme; give scheme: W4A16, W4A8, W4A4, W6A6, W8A8 or none")
    scheme = given["scheme"]
    any_bits = isinstance(scheme, str) and re.fullmatch(r"W[2-8]A(4|6|8|16)", scheme)  # as write_recipe has them
    try:
        config = WeightsConfig.model_validate({**given, "scheme": "none"} if any_bits else given)
        check_equal_bits(config, where)
        return config.model_copy(update={"scheme": scheme})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise LowBitError(f"{where}: {key}={problem['input']!r}: {problem['msg'].lower()}") from None


def with_shard_groups(config: WeightsConfig, host: TransformerConfig) -> WeightsConfig:
    """Return the settings with a number of shard groups: where it is not given, that of an artifact of this model."""
    if config.shard_groups is not None:
        return config
    heads, kv_heads = host.num_attention_heads, host.num_query_groups or host.num_attention_heads
    channels = host.kv_channels or host.hidden_size // heads
    known = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=host.ffn_hidden_size
    )
    widths = {host.hidden_size, host.ffn_hidden_size, channels * heads, channels * kv_heads}
    return config.model_copy(update={"shard_groups": default_shard_groups(known, widths)})


def check_equal_bits(config: WeightsConfig, where: str) -> None:
    """Raise LowBitError for a scheme that chooses bits, which rounding on load cannot."""
    if config.chooses_bits:
        raise LowBitError(
            f"{where}: scheme={config.scheme} chooses bits on text: quantize with it, and use the recipe that it writes"
        )


def round_column(weight: Tensor, config: WeightsConfig) -> QuantLinear:
    """Round this rank's rows [out / N, in] of a column-parallel weight to config.scheme."""
    scheme = Scheme.parse(config.scheme)
    _check(weight, config)
    qparams = _row_qparams(weight, config, None)  # a rank holds whole rows
    return QuantLinear(_packed(weight, qparams, scheme.weight_bits), None, scheme.act_bits)


def round_row(
    weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> QuantRowParallelLinear:
    """Round this rank's columns [out, in / N] of a row-parallel weight; a collective call over `group`."""
    scheme = Scheme.parse(config.scheme)
    _check(weight, config, group)
    qparams = _row_qparams(weight, config, group)
    act_groups = _act_groups(weight, config, group)
    shard = QuantLinear(_packed(weight, qparams, scheme.weight_bits), None, scheme.act_bits, act_groups)
    reducer = None if group is None else HybridReducer(None, group, "native")
    return QuantRowParallelLinear([shard], reducer, None, sequence_parallel)


@dataclass(frozen=True)
class StraightThrough:
    """The product of a layer that is trained at a scheme: Q(x) Q(W)^T forward, and straight through both roundings
    backward, dx = dy Q(W) and dW = dy^T Q(x).

    config: the scheme. is_row: of a row-parallel layer, whose input has a scale per token and shard group. group: the
    ranks that share the inputs of a row-parallel weight, whose scales span them (every call is a collective call
    then); None where a rank holds whole rows.
    """

    config: WeightsConfig
    is_row: bool
    group: dist.ProcessGroup | None = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the rounded weight: x [..., in], weight [out, in] in full precision -> [..., out] in x's dtype."""
        scheme = Scheme.parse(self.config.scheme)
        _check_shapes(weight, self.config)
        with torch.no_grad():
            qparams = _row_qparams(weight, self.config, self.group)
        groups = _act_groups(weight, self.config, self.group) if self.is_row else 1
        if scheme.act_bits < 16:
            x = fake_quantize(x, scheme.act_bits, group_size=x.shape[-1] // groups)
        return F.linear(x, fake_quantize_with(weight, *qparams, scheme.weight_bits))


class StraightThroughShard(DenseShard):
    """StraightThrough on a weight that it shares with the layer whose place it takes: only communication changes."""

    def __init__(self, weight: Tensor, rounding: StraightThrough):
        super().__init__(weight)
        self.rounding = rounding

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.rounding(x, self.weight)


def _row_qparams(weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of the rows of a weight whose columns the ranks of `group` share."""
    bits = Scheme.parse(config.scheme).weight_bits
    if group is None or config.group_size is not None:
        return choose_qparams(weight, bits, config.symmetric, config.group_size, real_zero=config.real_zero)
    low, high = weight.amin(1, keepdim=True).float(), weight.amax(1, keepdim=True).float()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    return qparams_from_range(low, high, bits, config.symmetric, config.real_zero)


def _act_groups(weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None) -> int:
    """Return the number of slices of this rank's inputs of a row-parallel weight that have a scale of their own per
    token."""
    size = world_size(group)
    inputs = weight.shape[1] * size
    assert config.shard_groups is not None, "with_shard_groups has chosen it"
    groups = activation_groups(inputs, config.shard_groups)
    if Scheme.parse(config.scheme).act_bits < 16 and groups % size:
        raise LowBitError(
            f"{groups} activation shard groups of {inputs} inputs do not divide among tp={size}; "
            f"give the recipe shard_groups: {groups_for(size, [inputs])}"
        )
    return max(groups // size, 1)


def _check(weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None = None) -> None:
    finite = torch.isfinite(weight).all().to(torch.int32)
    if group is not None:  # all ranks have to leave together
        dist.all_reduce(finite, dist.ReduceOp.MIN, group)
    if not finite:
        raise LowBitError("a weight that is to be quantized holds NaN or Inf; repair the checkpoint")
    _check_shapes(weight, config)


def _check_shapes(weight: Tensor, config: WeightsConfig) -> None:
    if Scheme.parse(config.scheme).weight_bits == 16:
        raise LowBitError(f"scheme {config.scheme} quantizes no weights; choose W4A16, W4A8, W4A4, W6A6 or W8A8")
    if config.group_size is not None and weight.shape[1] % config.group_size:
        raise LowBitError(f"group_size={config.group_size} does not divide the {weight.shape[1]} inputs of a rank")


def _packed(weight: Tensor, qparams: tuple[Tensor, Tensor], bits: int) -> QuantizedWeight:
    return QuantizedWeight(pack_bits(quantize(weight, *qparams, bits), bits), *qparams, bits, weight.shape[1])
