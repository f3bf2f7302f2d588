"""The low-bit replacements of a GPTModel's layers, made from an artifact's whole tensors for one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.adapters import patching, rotated
from megatron_lowbit.adapters.megatron.layers import (
    LowBitColumnParallelLinear,
    LowBitLayerNormColumnParallelLinear,
    LowBitRowParallelLinear,
    dense_shard,
    tp_group,
)
from megatron_lowbit.adapters.megatron.layout import (
    COLUMN,
    GATED,
    NORMS,
    Role,
    final_norm,
    find_linears,
    find_prefix,
    layout_of,
    norm_before,
    norm_name,
    numbered_layers,
    parts,
)
from megatron_lowbit.adapters.megatron.lowbit_experts import expert_replacements
from megatron_lowbit.adapters.megatron.norms import LowBitNorm
from megatron_lowbit.adapters.megatron.spec_layer import SpecLayer
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.config import LowBitError
from megatron_lowbit.layers.linear import QuantLinear, QuantRowParallelLinear
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import WHOLE
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import group_rank


class Replacements:
    """model: a GPTModel (one pipeline stage); reducers: how partial sums travel, the artifact's plan for this tp_size.

    Layers of one role get tensors of the same names and shapes, whatever each of them needs, because Megatron stacks
    them in its checkpoints: an identity reassembly, a branch of zeros.
    """

    def __init__(self, model: Any, artifact: Artifact, reducers: patching.Reducers):
        self.model, self.artifact, self.plan, self.reducers = model, artifact, reducers.plan, reducers
        checkpoint = artifact.checkpoint
        self.checkpoint = checkpoint if checkpoint is not None and checkpoint.scheme.weight_bits < 16 else None
        self.known = known_linears(artifact)
        self.prefix = find_prefix(self.known)
        self.layout, self.rank = layout_of(model), group_rank(model.pg_collection.tp)
        self.reassembling = self._reassembling_linears() if self.checkpoint is not None else set()

    def modules(self) -> dict[str, nn.Module]:
        """Return {path: replacement} of the linears, norms and experts that change."""
        modules: dict[str, nn.Module] = {}
        for (layer, role), (path, host) in find_linears(self.model).items():
            if role not in COLUMN:
                modules[path] = self._row(layer, role, host)
            elif self.checkpoint is not None:
                modules[path] = self._column(self.checkpoint, layer, role, host)
            elif (gather := self._gather(self._parts(layer, role)[0], host)) is not None:
                modules[path] = self._dense_column(role, host, gather)
        if self.checkpoint is None:
            return modules
        modules |= self._norms(self.checkpoint) | self._rotated_rest(self.checkpoint)
        return modules | expert_replacements(self.model, self.checkpoint)

    def _column(self, checkpoint: LowBitCheckpoint, layer: int, role: Role, host: Any) -> nn.Module:
        names, rows = self._parts(layer, role), self.layout.rank_rows(role, self.rank)
        weights = [checkpoint.linears[name] for name in names]
        weight = fused_weight(weights, rows)
        branch = fused_branch([checkpoint.low_rank.get(name) for name in names], weights, self._branch_rank(role), rows)
        gather, holds_norm = self._gather(names[0], host), hasattr(host, "layer_norm_weight")
        norm = norm_name(self.prefix, layer, norm_before(role))
        by_linear = role in self.reassembling
        plan = checkpoint.reassembly.get(names[0]) or (checkpoint.reassembly.get(norm) if by_linear else None)
        clip = checkpoint.clipping.get(names[0], WHOLE)
        if any(checkpoint.clipping.get(name, WHOLE) != clip for name in names):
            raise LowBitError(f"{names[0]} and the linears fused with it are clipped unlike; quantize this model again")
        linear = QuantLinear(weight, None, checkpoint.scheme.act_bits, 1, plan, branch, clip=clip)
        kind = LowBitLayerNormColumnParallelLinear if holds_norm else LowBitColumnParallelLinear
        gated, threshold = role in GATED and host.config.gated_linear_unit, self.reducers.drift_threshold
        replacement = kind.from_host(host, linear, gated, gather, threshold)
        replacement.grouped = weight.scale.shape[1] > 1
        replacement.attention_bits = checkpoint.attention_bits if role == "linear_qkv" else 16
        if checkpoint.rotation is not None:
            replacement.rotated = role == "linear_qkv" and checkpoint.rotation.attention
            self._rotate_bias(replacement, names, rows)
        replacement.stores_reassembly = any_layer(checkpoint.reassembly, names[0]) or (
            by_linear and any_layer(checkpoint.reassembly, norm)
        )
        stored = checkpoint.tensors.get(f"{norm}.weight")
        if isinstance(replacement, LowBitLayerNormColumnParallelLinear) and stored is not None:
            replacement.set_gain(stored)
        return replacement

    def _dense_column(self, role: Role, host: Any, gather: Codec) -> nn.Module:
        """Make a column-parallel layer in full precision (or rounded like the host) with a low-bit all-gather of its
        input."""
        kind = LowBitLayerNormColumnParallelLinear if hasattr(host, "layer_norm_weight") else LowBitColumnParallelLinear
        gated, threshold = role in GATED and host.config.gated_linear_unit, self.reducers.drift_threshold
        return kind.from_host(host, dense_shard(host), gated, gather, threshold)

    def _row(self, layer: int, role: Role, host: Any) -> nn.Module:
        (name,), group = self._parts(layer, role), tp_group(host)
        if self.checkpoint is None:
            shard: Any = dense_shard(host)
        else:
            shard = patching.row_shard(self.checkpoint, name, self.rank, self.layout.tp_size, host.weight)
        reducer = None if group is None else self.reducers.real(name, group)
        low_bit = QuantRowParallelLinear([shard], reducer, None, group is not None and host.config.sequence_parallel)
        # A single rank sends nothing, but its checkpoint may be loaded by several.
        stored = self.artifact.plans if self.plan is not None or self.layout.tp_size == 1 else {}
        sites = {size: plan.sites[name] for size, plan in stored.items() if name in plan.sites}
        replacement = LowBitRowParallelLinear.from_host(host, low_bit, sites)
        if self.checkpoint is not None:
            replacement.grouped = self.checkpoint.linears[name].scale.shape[1] > 1
            replacement.stores_reassembly = any_layer(self.checkpoint.reassembly, name)
            if self.checkpoint.rotation is not None:
                replacement.rotated = name in self.checkpoint.rotation.inputs
                self._rotate_bias(replacement, (name,), None)
            rank = self._branch_rank(role)
            if rank is not None:
                given = None if shard.lora_a is None else LowRank(shard.lora_a, shard.lora_b)
                branch = filled_branch(given, rank, shard.in_features, shard.out_features)
                shard.lora_a, shard.lora_b = branch.lora_a, branch.lora_b
        return replacement

    def _rotate_bias(self, layer: Any, names: Sequence[str], rows: Tensor | None) -> None:
        """Give a layer its rows (None: all) of the biases of a rotated checkpoint, where there are any: Megatron has
        biases of zeros where the model has none."""
        assert self.checkpoint is not None
        stored = [self.checkpoint.tensors.get(f"{name}.bias") for name in names]
        found = [tensor for tensor in stored if tensor is not None]
        if layer.bias is None or len(found) < len(names):
            return
        whole = torch.cat(found)
        rotated.put(layer, "bias", whole if rows is None else whole[rows])

    def _rotated_rest(self, checkpoint: LowBitCheckpoint) -> dict[str, nn.Module]:
        """Make the embedding, the final norm and the output projection of a checkpoint whose residual stream is
        rotated: this rank's words."""
        modules: dict[str, nn.Module] = {}
        if checkpoint.rotation is None or not checkpoint.rotation.residual:
            return modules
        base = self.prefix.rpartition(".")[0]
        places = {"embedding.word_embeddings": f"{base}.embed_tokens.weight"} if self.model.pre_process else {}
        if self.model.post_process:
            places |= {final_norm(self.model): f"{base}.norm.weight", "output_layer": "lm_head.weight"}
        for path, name in places.items():
            host, stored = self.model.get_submodule(path), checkpoint.tensors.get(name)
            if stored is None:
                raise LowBitError(f"the checkpoint has no {name}; quantize this model again")
            if stored.ndim == 2:
                rows = host.weight.shape[0]
                whole = F.pad(stored, (0, 0, 0, rows * self.layout.tp_size - len(stored)))
                stored = whole[self.rank * rows : (self.rank + 1) * rows]
            modules[path] = rotated.shallow_copy(host)
            rotated.put(modules[path], "weight", stored)
        return modules

    def _reassembling_linears(self) -> set[Role]:
        """Return the column-parallel roles that reassemble their own input, because the norm before them cannot in some
        layer: the linear holds it, gathers its output in low bits, or may not be the only one that reads it."""
        return {
            role
            for (layer, role), (path, host) in find_linears(self.model).items()
            if role in COLUMN
            and (
                hasattr(host, "layer_norm_weight")
                or self._gather(self._parts(layer, role)[0], host) is not None
                or not reads_alone(self.model, path)
            )
        }

    def _parts(self, layer: int, role: Role) -> tuple[str, ...]:
        return parts(self.prefix, layer, role, self.known)

    def _gather(self, name: str, host: Any) -> Codec | None:
        """Return what the all-gather of a column-parallel layer's input sends; None: nothing, or full precision."""
        if self.plan is None or tp_group(host) is None or not host.config.sequence_parallel:
            return None
        return self.plan.gathers.get(name)

    def _branch_rank(self, role: Role) -> int | None:
        """Return the largest rank of the low-rank branches of a role, where any layer has one.

        All layers get it, filled up with zeros: Megatron stores the tensors of all layers as one.
        """
        assert self.checkpoint is not None
        leaves = {name.rpartition(".")[2] for name in self._parts(0, role)}
        found = [b for name, b in self.checkpoint.low_rank.items() if name.rpartition(".")[2] in leaves]
        return max((len(branch.lora_a) for branch in found), default=None)

    def _norms(self, checkpoint: LowBitCheckpoint) -> dict[str, nn.Module]:
        """Make the norms that the checkpoint reassembles or has trained; where one of a kind is, all are."""
        found: dict[str, nn.Module] = {}
        linears = find_linears(self.model)
        for norm, (leaf, reader) in NORMS.items():
            norms: dict[str, nn.Module] = {}
            changed = any_layer(checkpoint.reassembly, f".{leaf}")
            for index, number, layer in numbered_layers(self.model):
                module: Any = layer
                for name in norm.split("."):
                    module = getattr(module, name, None)
                weight = getattr(module, "weight", None)
                if not isinstance(weight, Tensor) or weight.ndim != 1:  # Transformer Engine's linear holds it
                    continue
                hf_name = norm_name(self.prefix, number, norm)
                stored = checkpoint.tensors.get(f"{hf_name}.weight")
                stored = weight.data if stored is None else stored.to(weight.device, weight.dtype)
                changed = changed or not torch.equal(stored, weight.data)
                plan = checkpoint.reassembly.get(hf_name)
                if reader in self.reassembling or (reader is not None and (number, reader) not in linears):
                    plan = None  # the linear carries it out, or what reads it (experts, another linear) stays as it is
                norms[f"decoder.layers.{index}.{norm}"] = LowBitNorm(
                    module, stored, plan or ReassemblyPlan.identity(len(weight))
                )
            found |= norms if changed else {}
        return found


def reads_alone(model: nn.Module, path: str) -> bool:
    """Tell whether a column-parallel linear is known to be the only one that reads the norm before it.

    path: decoder.layers.0.mlp.linear_fc1. Of Megatron's own layers this is so. Of a class that derives from them, or a
    forward that replaces theirs, nobody can tell: a gate, a router or an adapter may read the norm, too.
    """
    owner_path = path.rpartition(".")[0]
    owner, layer = (model.get_submodule(name) for name in (owner_path, owner_path.rpartition(".")[0]))
    known = type(layer) in (TransformerLayer, MLPLayer, SpecLayer) and type(owner) in (SelfAttention, MLP)
    return known and not any("forward" in vars(module) for module in (owner, layer))


def known_linears(artifact: Artifact) -> list[str]:
    """Return the Hugging Face names of the linears that an artifact knows: all, or those of a plan's sites."""
    if artifact.checkpoint is not None:
        return list(artifact.checkpoint.linears)
    return [name for plan in artifact.plans.values() for name in plan.sites]


def any_layer(owners: Iterable[str], name: str) -> bool:
    """Return whether some layer has an entry of the same name but for the layer's number."""
    leaf = name.rpartition(".")[2]
    return any(owner.rpartition(".")[2] == leaf for owner in owners)


def fused_weight(weights: Sequence[QuantizedWeight], rows: Tensor) -> QuantizedWeight:
    """Return rows `rows` of the quantized weights of several linears, one below the other."""
    first = weights[0]
    shapes = {(w.in_features, w.scale.shape[1], w.num_bits) for w in weights}
    if len(shapes) > 1:
        raise LowBitError("the parts of a fused linear have other widths, groups or bits; quantize this model again")
    packed, scale, zero = (
        torch.cat([getattr(w, leaf) for w in weights])[rows] for leaf in ("packed_weight", "scale", "zero_point")
    )
    return QuantizedWeight(packed, scale, zero, first.num_bits, first.in_features)


def fused_branch(
    branches: Sequence[LowRank | None], weights: Sequence[QuantizedWeight], rank: int | None, rows: Tensor
) -> LowRank | None:
    """Return the low-rank branches of several linears as one of their summed rank: A one below the other, B
    block-diagonal.

    rank: of each, filled up with zeros; None where no layer has any.
    """
    if rank is None:
        return None
    filled = [
        filled_branch(branch, rank, weight.in_features, weight.packed_weight.shape[0])
        for branch, weight in zip(branches, weights, strict=True)
    ]
    lora_a = torch.cat([branch.lora_a for branch in filled])
    lora_b = torch.block_diag(*[branch.lora_b.float() for branch in filled]).to(torch.bfloat16)
    return LowRank(lora_a, lora_b[rows])


def filled_branch(branch: LowRank | None, rank: int, in_features: int, out_features: int) -> LowRank:
    """Return the branch with rows of zeros of A and columns of zeros of B up to `rank`; None: nothing but zeros."""
    lora_a, lora_b = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rank, in_features), (out_features, rank)))
    if branch is not None:
        lora_a[: len(branch.lora_a)] = branch.lora_a
        lora_b[:, : len(branch.lora_a)] = branch.lora_b
    return LowRank(lora_a, lora_b)
