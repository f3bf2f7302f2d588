"""Low-bit layers in Megatron's distributed checkpoints: which axis of which tensor the ranks share.

    column   packed_weight, scale, zero_point, lora_b, bias   axis 0 (fc1's through Megatron's SwiGLU factory)
             lora_a                                           the same on all ranks
    row      packed_weight, lora_a                            axis 1; scale and zero_point too where weights are grouped
             scale, zero_point, lora_b, bias                  the same on all ranks
    both     reassembly.{src, coefficient, merged_into}       ReassemblyPlan.dense: axis 0 of a row-parallel linear
             plan_tp<N>.*                                     SitePlan.tensors, of what N ranks send: whole, for every N
                                                              of the artifact; N = 1: Codec.tensors, of the all-gather
                                                              before a column
             lowbit                                           int64 [6], of a rotated artifact [7]: see Shape; tells a
                                                              reader what to allocate
    experts  packed_weight, scale, zero_point                 as of a column (linear_fc1) or a row (linear_fc2), behind
                                                              an axis of the experts, which lowbit lacks

Keys are Megatron's own with these names in place of `weight`, so layers of equal shape are stacked as Megatron stacks
them. A row-parallel rank stores whole bytes: where its share of the inputs ends inside one, saving is refused.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import packed_bytes
from megatron_lowbit.layers.linear import QuantLinear, QuantRowParallelLinear
from megatron_lowbit.layers.reassembled_norm import Reassembly
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight
from megatron_lowbit.quant.input_clipping import WHOLE
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import group_rank, world_size

_REASSEMBLY_LEAVES = ("src", "coefficient", "merged_into")


@dataclass(frozen=True)
class Shape:
    """The sizes of a whole low-bit linear, which a reader has to know before it can allocate it."""

    weight_bits: int
    act_bits: int
    act_groups: int
    width: int  # inputs after reassembly
    grouped: int  # whether a row of the weight has several scales
    attention_bits: int  # of Q, K and V; on linear_qkv
    rotated: int | None = None  # whether a row's input is, and of linear_qkv Q and K; None: not a rotated artifact

    def tensor(self) -> Tensor:
        return torch.tensor([value for value in astuple(self) if value is not None])


def quantized_linear(layer: Any) -> QuantLinear | None:
    """Return the packed matrix product inside a low-bit layer; None where its weight is in full precision."""
    low_bit = layer.low_bit.shards[0] if isinstance(layer.low_bit, QuantRowParallelLinear) else layer.low_bit
    return low_bit if isinstance(low_bit, QuantLinear) else None


def shape_of(layer: Any, linear: QuantLinear) -> Shape:
    ranks = world_size(layer.tp_group) if layer.is_row else 1
    return Shape(
        linear.weight_bits,
        linear.act_bits,
        linear.act_groups * ranks,
        linear.in_features * ranks,
        int(layer.grouped),
        layer.attention_bits,
        None if layer.rotated is None else int(layer.rotated),
    )


def sharded_state(layer: Any, prefix: str, sharded_offsets: tuple, metadata: Any) -> dict[str, Any]:
    """Return Megatron's sharded state dict of a low-bit layer.

    Its keys are the names that load_state_dict expects; the tensors' own keys are those of the checkpoint. Raises
    LowBitError where a rank's share ends inside a byte.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    linear, row = quantized_linear(layer), layer.is_row
    names = {_stored_name(name): name for name in layer.state_dict(keep_vars=True)}
    tensors = {stored: value for stored, value in zip(names, layer.state_dict(keep_vars=True).values(), strict=True)}
    split = dict.fromkeys(("weight", "packed_weight", "lora_a"), 1) if row else {}
    split |= {} if row else dict.fromkeys(("weight", "packed_weight", "scale", "zero_point", "lora_b", "bias"), 0)
    if row and layer.grouped:
        split |= {"scale": 1, "zero_point": 1}
    if linear is not None:
        if linear.clip != WHOLE:
            raise LowBitError(
                f"{prefix.rstrip('.')}: clipped activations are not kept in distributed checkpoints; save the artifact"
            )
        tensors["lowbit"] = shape_of(layer, linear).tensor()
        if row:
            check_bytes(prefix, linear.in_features, linear.weight_bits)
        if layer.stores_reassembly:
            plan = own_plan(linear)
            offset = group_rank(layer.tp_group) if row else 0
            tensors |= dense_tensors(plan, offset)
            split |= {f"reassembly.{leaf}": 0 for leaf in _REASSEMBLY_LEAVES} if row else {}
    for size, plan in layer.plans.items():
        tensors |= {f"plan_tp{size}.{leaf}": value for leaf, value in plan.tensors().items()}
    dp_cp_group = None if metadata is None else metadata.get("dp_cp_group")
    groups = {"tp_group": layer.tp_group, "dp_cp_group": dp_cp_group} if dp_cp_group is not None else {}
    sharded = make_sharded_tensors_for_checkpoint(tensors, prefix, split, sharded_offsets, **groups)
    if layer.gated:  # Megatron's MLP does this for bias itself, and for a weight that is not inside low_bit
        single = (metadata or {}).get("singleton_local_shards", False)
        for leaf in ("weight", "packed_weight", "scale", "zero_point", "lora_b"):
            if leaf in tensors:
                key = prefix + leaf
                sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, single)
    return {prefix + names.get(key.removeprefix(prefix), key.removeprefix(prefix)): v for key, v in sharded.items()}


def sharded_experts(layer: Any, prefix: str, sharded_offsets: tuple, metadata: Any) -> dict[str, Any]:
    """Return Megatron's sharded state dict of LowBitExperts, with the keys that its SequentialMLP has for its weights.

    Raises LowBitError where a rank's share ends inside a byte.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    state: dict[str, Any] = {}
    axes, rank, ranks = len(sharded_offsets) + 1, group_rank(layer.tp_group), world_size(layer.tp_group)
    for role, held in (("linear_fc1", "up"), ("linear_fc2", "down")):
        key, linears, row = f"{prefix}experts.{role}.", getattr(layer, held), held == "down"
        bits, width = linears[0].weight_bits, linears[0].in_features
        if row:
            check_bytes(key, width, bits)
        shape = Shape(bits, layer.act_bits, 1, width * (ranks if row else 1), int(layer.grouped), 16)
        state |= replicated({"lowbit": shape.tensor()}, key, sharded_offsets, metadata, {})
        for place, (number, linear) in enumerate(zip(layer.numbers, linears, strict=True)):
            offsets = (*sharded_offsets, (axes - 1, number, layer.count))
            for leaf in ("packed_weight", "scale", "zero_point"):
                shared = not row or layer.grouped or leaf == "packed_weight"
                share = [(axes + row, rank, ranks)] if shared else []
                tensor = ShardedTensor.from_rank_offsets(
                    key + leaf,
                    getattr(linear, leaf),
                    *offsets,
                    *share,
                    replica_id=(0, 0 if shared else rank, layer.replica),
                    prepend_axis_num=axes,
                )
                name = f"{prefix}{held}.{place}.{leaf}"
                state[name] = tensor if row else apply_swiglu_sharded_factory(tensor, offsets)
    return state


def replicated(
    tensors: dict[str, Tensor], prefix: str, sharded_offsets: tuple, metadata: Any, names: dict[str, str]
) -> dict[str, Any]:
    """Return the sharded state dict of tensors that all tensor-parallel ranks hold alike; names: {stored name: the
    module's}."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    sharded = make_sharded_tensors_for_checkpoint(tensors, prefix, {}, sharded_offsets)
    return {prefix + names.get(key.removeprefix(prefix), key.removeprefix(prefix)): v for key, v in sharded.items()}


def check_bytes(name: str, in_features: int, bits: int) -> None:
    """Raise LowBitError where a rank's rows of codes do not fill whole bytes."""
    if in_features * bits % 8:
        raise LowBitError(
            f"{name.rstrip('.')}: a rank's {in_features} inputs of {bits} bits end inside a byte, "
            "which a distributed checkpoint cannot split; use a smaller tp"
        )


def dense_tensors(plan: ReassemblyPlan, rank: int = 0) -> dict[str, Tensor]:
    """Return a plan as it is stored; a row-parallel rank's channels are counted over all ranks."""
    src, coefficient, merged = plan.dense()
    merged = torch.where(merged < 0, merged, merged + rank * plan.width)
    values = (src + rank * plan.in_features, coefficient, merged)
    return {f"reassembly.{leaf}": value for leaf, value in zip(_REASSEMBLY_LEAVES, values, strict=True)}


def take_reassembly(state_dict: dict[str, Any], prefix: str, rank: int = 0) -> ReassemblyPlan | None:
    """Remove a stored plan from a state dict and return it, with a rank's channels counted from its own first."""
    if f"{prefix}reassembly.src" not in state_dict:
        return None
    src, coefficient, merged = (state_dict.pop(f"{prefix}reassembly.{leaf}") for leaf in _REASSEMBLY_LEAVES)
    merged = torch.where(merged < 0, merged, merged - rank * len(src))
    return ReassemblyPlan.from_dense(src - rank * len(merged), coefficient, merged)


def own_plan(linear: QuantLinear) -> ReassemblyPlan:
    """Return the reassembly that a linear carries out itself; the identity where it does none."""
    if linear.reassembly is not None:
        return linear.reassembly.plan()
    return ReassemblyPlan.identity(linear.in_features).to(linear.packed_weight.device)


def take_plans(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Take from a state dict, before load_state_dict, what sharded_state added beyond the layer's own tensors."""
    state_dict.pop(f"{prefix}lowbit", None)
    linear = None if layer.low_bit is None else quantized_linear(layer)
    rank = group_rank(layer.tp_group) if layer.is_row else 0
    plan = take_reassembly(state_dict, prefix, rank)
    if plan is not None and linear is not None:
        linear.reassembly = None if plan.is_identity else Reassembly(plan)
    found = {key.removeprefix(f"{prefix}plan_tp") for key in state_dict if key.startswith(f"{prefix}plan_tp")}
    for size in sorted({int(key.partition(".")[0]) for key in found}):
        stem = f"{prefix}plan_tp{size}."
        keys = [key for key in state_dict if key.startswith(stem)]
        tensors = {key.removeprefix(stem): state_dict.pop(key).cpu() for key in keys}
        layer.plans[size] = SitePlan.of(tensors) if layer.is_row else Codec.of(tensors)
        if not layer.is_row:
            layer.set_gather(layer.plans[size])
        elif size == world_size(layer.tp_group) and layer.low_bit is not None:
            before = layer.low_bit.reducer
            mode = before.mode if before is not None and before.low_bit else None
            options = (None,) if before is None else (before.guard.threshold, before.costs)
            layer.low_bit.reducer = HybridReducer(layer.plans[size], layer.tp_group, mode, *options)
            layer.low_bit.reducer.set_site("" if before is None else before.guard.site)


def empty_codec(senders: int, features: int) -> Codec:
    """Return a codec to load into; until then, of four bits."""
    ones, zeros = torch.ones(senders, features), torch.zeros(senders, features)
    return Codec(ones, zeros, torch.full((features,), 4, dtype=torch.uint8))


def empty_weight(out_features: int, in_features: int, bits: int, scales: int) -> QuantizedWeight:
    """Return a weight of zeros to load into; scales: of a row."""
    packed = torch.zeros(out_features, packed_bytes(in_features, bits), dtype=torch.uint8)
    scale, zero_point = (torch.zeros(out_features, scales) for _ in range(2))
    return QuantizedWeight(packed, scale, zero_point, bits, in_features)


def empty_linear(shape: Shape, out_features: int, scales: int, rank: int | None, ranks: int) -> Any:
    """Return a QuantLinear of zeros for one rank to load into.

    out_features, scales: this rank's rows, and scales per row; rank: of the low-rank branch, None without one; ranks:
    those that share the inputs (1 for a column-parallel linear). Raises LowBitError for a size that splits a shard
    group.
    """
    if shape.act_groups % ranks or shape.width % ranks:
        raise LowBitError(
            f"{shape.act_groups} shard groups of {shape.width} inputs do not divide among tp={ranks}; use another tp"
        )
    inputs = shape.width // ranks
    weight = empty_weight(out_features, inputs, shape.weight_bits, scales)
    branch = None
    if rank is not None:
        branch = LowRank(*(torch.zeros(size, dtype=torch.bfloat16) for size in ((rank, inputs), (out_features, rank))))
    return QuantLinear(weight, None, shape.act_bits, shape.act_groups // ranks, None, branch)


def _stored_name(name: str) -> str:
    return name.removeprefix("low_bit.").removeprefix("shards.0.")
