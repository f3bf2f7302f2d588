"""What DeepSpeed's AutoTP has made of a model's linears, and which part of each a rank holds.

    column-parallel   LinearLayer, fused_LinearLayer, GateUpPack_LinearLayer, SubParamLinearLayer, Yuan_LinearLayer
    row-parallel      LinearAllreduce, SubParamLinearAllreduce, Yuan_LinearAllreduce
    whole             nn.Linear: a partition_config, or transformers' tp_plan, has left it out
    heads             LmHeadLinearAllreduce, LinearAllreduceWithReplicatedInput, VocabParallelLinear, or a LinearLayer
                      that gathers its output

All are told by their exact type, since LmHeadLinearAllreduce subclasses LinearAllreduce and must keep its own
all-reduce of the logits.

A fused weight, such as [q | k | v] or [gate | up], is cut part by part: a rank holds a share of each, so its rows are
not neighbours in the whole weight. `held` says which they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface

_COLUMNS = (
    "LinearLayer",
    "fused_LinearLayer",
    "GateUpPack_LinearLayer",
    "SubParamLinearLayer",
    "Yuan_LinearLayer",
)
_ROWS = ("LinearAllreduce", "SubParamLinearAllreduce", "Yuan_LinearAllreduce")
_HEADS = ("LmHeadLinearAllreduce", "LinearAllreduceWithReplicatedInput", "VocabParallelLinear")
_EMBEDDINGS = ("VocabParallelEmbedding", "HiddenParallelEmbedding")
_HEAD_NAMES = ("lm_head", "embed_out")  # as AutoTP knows an output projection


@dataclass(frozen=True)
class ShardedLinears:
    """{fqn: module} of the column- and row-parallel linears and of the output projections; whole: {fqn: (kind,
    nn.Linear)} of the linears in blocks that every rank has; unknown: {other tensor-parallel type: fqn of the first}.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, tuple[huggingface.Kind, nn.Linear]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def module_of(engine: Any) -> nn.Module:
    """Return the model in a DeepSpeed engine, or the model itself."""
    module = getattr(engine, "module", None)
    return module if isinstance(module, nn.Module) else engine


def sharded_layers(model: nn.Module) -> dict[str, Any]:
    """Return {fqn: module} of all that AutoTP has put into a model, also of what low-bit modules have replaced."""
    from deepspeed.module_inject import layers

    modules = {**dict(model.named_modules()), **patching.original_modules(model)}
    return {name: module for name, module in modules.items() if isinstance(module, layers.TensorParallel_Layer)}


def tp_group(engine: Any) -> dist.ProcessGroup | None:
    """Return the tensor-parallel group, which the layers themselves hold; None for a single rank."""
    groups = (layer.mp_group for layer in sharded_layers(module_of(engine)).values())
    group = next((group for group in groups if group is not None), None)
    return group if group is not None and dist.get_world_size(group) > 1 else None


def tp_linears(engine: Any) -> ShardedLinears:
    """Return the linears of an engine, or of its module."""
    model, found = module_of(engine), ShardedLinears()
    for name, layer in sharded_layers(model).items():
        kind, gathers = type(layer).__name__, getattr(layer, "gather_output", False)
        if kind in _HEADS or (gathers and name.rpartition(".")[2] in _HEAD_NAMES):
            found.heads[name] = layer
        elif kind in _COLUMNS and not gathers and _is_deepspeed(layer):
            found.columns[name] = layer
        elif kind in _ROWS and _is_deepspeed(layer):
            found.rows[name] = layer
        elif kind not in _EMBEDDINGS:
            found.unknown.setdefault(f"{kind} that gathers its output" if gathers else kind, name)
    found.whole.update(huggingface.linears_in_blocks(model))
    return found


def _is_deepspeed(layer: nn.Module) -> bool:
    return type(layer).__module__ == "deepspeed.module_inject.layers"


def held(layer: Any, rank: int | None = None) -> Tensor:
    """Return which outputs (column-parallel) or inputs (row-parallel) of the whole linear a rank holds, in order.

    An int64 tensor [held]. rank: in the layer's group; None: this one.
    """
    from deepspeed.module_inject import fusedqkv_utils

    rank = layer.tp_index if rank is None else rank
    kind, dim = type(layer).__name__, 1 if is_row(layer) else 0
    whole = torch.arange(layer._orig_weight_shape[dim])
    if kind in ("Yuan_LinearLayer", "Yuan_LinearAllreduce"):  # V and O whose heads follow the pairs that share Q and K
        heads = fusedqkv_utils.shared_qk_value_head_ids(layer.tp_meta.num_kv_heads, layer.tp_world_size, rank)
        return whole.view(layer.tp_meta.num_kv_heads, -1)[heads].flatten()
    if kind == "SubParamLinearLayer":  # partition_config's `shape` views the outputs in several dimensions
        view = whole.view(layer._output_shape)
        return _cut(view, layer.partition_dim, layer._subparam_shard_widths, rank).flatten()
    if kind == "SubParamLinearAllreduce":
        return _cut(whole, 0, layer._subparam_shard_widths, rank)
    if kind == "fused_LinearLayer" and layer._subparam_shard_widths is None:  # GPTBigCode, CodeGen
        return fusedqkv_utils.prepare_tp_fused_qkvw(
            layer.fused_module.module, whole[:, None], layer.tp_world_size, rank, layer.tp_meta
        ).flatten()
    widths = getattr(layer, "_subparam_shard_widths", None) or [layer._partition_sizes]
    return _cut(whole, 0, widths, rank)


def _cut(whole: Tensor, dim: int, widths: Sequence[Sequence[int]], rank: int) -> Tensor:
    """Return a rank's piece of every part. widths[part][rank]: numbers along `dim` that each rank gets of a part."""
    parts = whole.split([sum(of_part) for of_part in widths], dim)
    return torch.cat([part.split(list(of_part), dim)[rank] for part, of_part in zip(parts, widths, strict=True)], dim)


def is_row(layer: Any) -> bool:
    """Tell whether a layer of AutoTP is cut along its inputs."""
    return type(layer).__name__ in (*_ROWS, "LmHeadLinearAllreduce", "LinearAllreduceWithReplicatedInput")


def cuts_across(layer: Any) -> bool:
    """Tell whether a `shape` of partition_config has cut the inputs of a column-parallel layer, or the outputs of a
    row-parallel one: it then computes no shard of the linear."""
    kind = type(layer).__name__
    inputs = kind.startswith("SubParam") and layer.partition_dim == len(layer._logical_shape) - 1
    return (kind == "SubParamLinearLayer" and inputs) or (kind == "SubParamLinearAllreduce" and not inputs)


def shares(layer: Any) -> list[int]:
    """Return how many inputs of a row-parallel layer each rank holds."""
    return [len(held(layer, rank)) for rank in range(layer.tp_world_size)]
