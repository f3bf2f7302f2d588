"""Round-to-nearest quantization of one rank's share of a Megatron-Core linear: what a bf16 checkpoint meets on load.

The codes are those that rounding the whole weight and sharding it afterwards gives: rows are rounded by themselves, and
the range of a row-parallel weight's output channel is taken over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.collectives import HybridReducer
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.distributed import world_size
from megatron_lowbit.kernels import pack_bits
from megatron_lowbit.linear import QuantColumnParallelLinear, QuantRowParallelLinear, activation_groups
from megatron_lowbit.quantizer import QuantizedWeight, Scheme, choose_qparams, qparams_from_range, quantize


def parse_recipe(quantization_config: Any) -> WeightsConfig:
    """The entry of Megatron's recipe file that matched a layer: the keys of our `weights` section."""
    where = f"recipe entry {quantization_config.config_key!r} (for {quantization_config.match_input.module_path})"
    given = dict(quantization_config.config)
    without_effect = [key for key in ("method", "attention") if key in given]
    if without_effect:
        raise LowBitError(f"{where}: {without_effect[0]} has no effect on load, which rounds to nearest; leave it out")
    if "scheme" not in given:
        raise LowBitError(f"{where} has no scheme; give scheme: W4A16, W4A8, W4A4, W6A6, W8A8 or none")
    try:
        return WeightsConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise LowBitError(f"{where}: {key}={problem['input']!r}: {problem['msg'].lower()}") from None


def round_column(weight: Tensor, config: WeightsConfig) -> QuantColumnParallelLinear:
    """This rank's rows [out / N, in] of a column-parallel weight, rounded to config.scheme."""
    scheme = Scheme.parse(config.scheme)
    _check(weight, config)
    qparams = choose_qparams(weight, scheme.weight_bits, config.symmetric, config.group_size)
    return QuantColumnParallelLinear(_packed(weight, qparams, scheme.weight_bits), None, scheme.act_bits)


def round_row(
    weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> QuantRowParallelLinear:
    """This rank's columns [out, in / N] of a row-parallel weight; a collective call over `group`."""
    scheme, size = Scheme.parse(config.scheme), world_size(group)
    _check(weight, config, group)
    if config.group_size is None:
        low, high = weight.amin(1, keepdim=True).float(), weight.amax(1, keepdim=True).float()
        if group is not None:
            dist.all_reduce(low, dist.ReduceOp.MIN, group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group)
        qparams = qparams_from_range(low, high, scheme.weight_bits, config.symmetric)
    else:
        qparams = choose_qparams(weight, scheme.weight_bits, config.symmetric, config.group_size)
    inputs = weight.shape[1] * size
    groups = activation_groups(inputs, config.shard_groups)
    if scheme.act_bits < 16 and groups % size:
        raise LowBitError(
            f"{groups} activation shard groups of {inputs} inputs do not divide among tp={size}; "
            f"give the recipe a shard_groups that {size} divides"
        )
    packed = _packed(weight, qparams, scheme.weight_bits)
    shard = QuantColumnParallelLinear(packed, None, scheme.act_bits, max(groups // size, 1))
    reducer = None if group is None else HybridReducer(None, group, "native")
    return QuantRowParallelLinear([shard], reducer, None, sequence_parallel)


def _check(weight: Tensor, config: WeightsConfig, group: dist.ProcessGroup | None = None) -> None:
    if Scheme.parse(config.scheme).weight_bits == 16:
        raise LowBitError(f"scheme {config.scheme} quantizes no weights; choose W4A16, W4A8, W4A4, W6A6 or W8A8")
    finite = torch.isfinite(weight).all().to(torch.int32)
    if group is not None:  # all ranks have to leave together
        dist.all_reduce(finite, dist.ReduceOp.MIN, group)
    if not finite:
        raise LowBitError("a weight that is to be quantized holds NaN or Inf; repair the checkpoint")
    if config.group_size is not None and weight.shape[1] % config.group_size:
        raise LowBitError(f"group_size={config.group_size} does not divide the {weight.shape[1]} inputs of a rank")


def _packed(weight: Tensor, qparams: tuple[Tensor, Tensor], bits: int) -> QuantizedWeight:
    return QuantizedWeight(pack_bits(quantize(weight, *qparams, bits), bits), *qparams, bits, weight.shape[1])
