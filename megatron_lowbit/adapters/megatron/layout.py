"""Where the tensors of a Hugging Face decoder lie in a Megatron-Core GPTModel: names, and the order of fused rows.

    decoder.layers.<i>.             model.layers.<i>.
    self_attention.linear_qkv       self_attn.{q,k,v}_proj (or qkv_proj)      per query group [q ... | k | v]
    self_attention.linear_proj      self_attn.o_proj
    mlp.linear_fc1                  mlp.{gate,up}_proj (or gate_up_proj)      per rank [gate_r | up_r]
    mlp.linear_fc2                  mlp.down_proj
    mlp.shared_experts.linear_fc1   mlp.shared_expert.{gate,up}_proj          per rank [gate_r | up_r]
    mlp.shared_experts.linear_fc2   mlp.shared_expert.down_proj
    input_layernorm                 input_layernorm
    pre_mlp_layernorm               post_attention_layernorm
    self_attention.{q,k}_layernorm  self_attn.{q,k}_norm

A HybridModel (MambaModel, before 0.18) of the pattern "*-*-" writes a block as two layers: 2i has the attention and
its norm, 2i + 1 the MLP and its norm.

A fused linear is the rows of its parts, one below the other, in another order: W_megatron = cat(parts)[order]. The same
index serves weights, biases, packed rows, scales and zero points; rank r of N holds the r-th of N equal pieces of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.adapters.megatron_names import PARTS, PATHS, SHARED, SHARED_ELSEWHERE, Role
from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime.distributed import world_size

COLUMN: tuple[Role, ...] = ("linear_qkv", "linear_fc1", "shared_fc1")
GATED: tuple[Role, ...] = ("linear_fc1", "shared_fc1")  # [gate_r | up_r] where the MLP is gated
# {norm of Megatron's layer: (its name in Hugging Face, the linear that reads it and may hold it)}
NORMS: dict[str, tuple[str, Role | None]] = {
    "input_layernorm": ("input_layernorm", "linear_qkv"),
    "pre_mlp_layernorm": ("post_attention_layernorm", "linear_fc1"),
    "self_attention.q_layernorm": ("self_attn.q_norm", None),
    "self_attention.k_layernorm": ("self_attn.k_norm", None),
}
DEFAULT_PREFIX = "model.layers"
_HOSTS = {
    "ColumnParallelLinear",
    "RowParallelLinear",
    "TEColumnParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
}


@dataclass(frozen=True)
class Layout:
    """Shape of one decoder layer and the number of tensor-parallel ranks that share it.

    shared_size: width of the shared expert; 0: there is none.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    ffn_size: int
    hidden_size: int
    tp_size: int
    shared_size: int = 0

    def part_rows(self, role: Role) -> tuple[int, ...]:
        """Return the rows of each separate part of a fused linear, or the one linear's own."""
        groups = self.num_groups * self.head_dim
        sizes: dict[Role, tuple[int, ...]] = {
            "linear_qkv": (self.num_heads * self.head_dim, groups, groups),
            "linear_fc1": (self.ffn_size, self.ffn_size),
            "linear_proj": (self.hidden_size,),
            "linear_fc2": (self.hidden_size,),
            "shared_fc1": (self.shared_size, self.shared_size),
            "shared_fc2": (self.hidden_size,),
        }
        return sizes[role]

    def in_features(self, role: Role) -> int:
        """Return the number of inputs of the whole (unsharded) linear."""
        heads = self.num_heads * self.head_dim
        wide = {"linear_proj": heads, "linear_fc2": self.ffn_size, "shared_fc2": self.shared_size}
        return wide.get(role, self.hidden_size)

    def order(self, role: Role) -> Tensor:
        """Return int64 [rows]: row i of Megatron's linear, over all ranks in turn, is row order[i] of cat(parts)."""
        rows = torch.arange(sum(self.part_rows(role)))
        if role == "linear_qkv":
            q, k, v = (part.view(self.num_groups, -1) for part in rows.split(self.part_rows(role)))
            return torch.cat([q, k, v], dim=1).flatten()
        if role in GATED:
            gate, up = (part.view(self.tp_size, -1) for part in rows.split(self.part_rows(role)))
            return torch.cat([gate, up], dim=1).flatten()
        return rows

    def rank_rows(self, role: Role, rank: int) -> Tensor:
        """Return the part of `order` that tensor-parallel rank `rank` of a column-parallel linear holds."""
        return self.order(role).chunk(self.tp_size)[rank]

    def share(self, whole: Tensor, role: Role, rank: int) -> Tensor:
        """Return a rank's rows of the weight cat(parts) of a column-parallel linear, in Megatron's order, or its
        columns of a row-parallel one."""
        if role in COLUMN:
            return whole[self.rank_rows(role, rank)]
        return whole.chunk(self.tp_size, dim=1)[rank]

    def whole(self, shares: Tensor, role: Role) -> Tensor:
        """Return cat(parts) again from the shares [ranks, rows, columns] of all ranks."""
        if role not in COLUMN:
            return torch.cat(list(shares), dim=1)
        fused = shares.flatten(0, 1)
        whole = torch.empty_like(fused)
        whole[self.order(role)] = fused
        return whole


def parts(prefix: str, layer: int, role: Role, known: Collection[str]) -> tuple[str, ...]:
    """Hugging Face names of the linears that make up a role; `known` tells whether they are fused there, and what a
    shared expert is called."""
    here = f"{prefix}.{layer}."
    shared = SHARED_ELSEWHERE if f"{here}{SHARED_ELSEWHERE}down_proj" in known else SHARED
    separate, fused = (
        tuple(here + leaf.replace(SHARED, shared) for leaf in leaves) for leaves in (PARTS[role][0], (PARTS[role][1],))
    )
    return fused if fused[0] in known else separate


def norm_name(prefix: str, layer: int, norm: str) -> str:
    """Hugging Face name of a norm of Megatron's layer."""
    return f"{prefix}.{layer}.{NORMS[norm][0]}"


def norm_before(role: Role) -> str:
    """Name of the norm of Megatron's layer that a column-parallel role reads."""
    return "input_layernorm" if role == "linear_qkv" else "pre_mlp_layernorm"


def find_prefix(names: Iterable[str]) -> str:
    """Return what comes before the number of a block in Hugging Face names: model.layers,
    model.language_model.layers."""
    for name in names:
        match = re.match(r"(.+?)\.\d+\.(self_attn|mlp|input_layernorm)\.", name)
        if match:
            return match.group(1)
    return DEFAULT_PREFIX


def model_chunks(model: Any) -> list[Any]:
    """Return the GPTModels inside a model, a wrapper (Float16Module, DistributedDataParallel), or a list of them."""
    if isinstance(model, (list, tuple)):
        return [chunk for item in model for chunk in model_chunks(item)]
    while not hasattr(model, "decoder") and hasattr(model, "module"):
        model = model.module
    if not hasattr(model, "decoder"):
        raise LowBitError(f"{type(model).__name__} is no GPTModel of Megatron-Core: it has no decoder")
    return [model]


def is_hybrid(model: Any) -> bool:
    """Tell whether a model is a HybridModel (MambaModel), whose layers hold attention or an MLP, not both."""
    return hasattr(model.decoder, "layer_type_list")


def numbered_layers(model: Any) -> list[tuple[int, int, Any]]:
    """Return (index here, block in the whole Hugging Face model, from 0; layer) of the layers of a pipeline stage.

    Raises LowBitError for a HybridModel of other layers than attention and MLP in turn.
    """
    layers = list(model.decoder.layers)
    if not is_hybrid(model):
        return [(index, layer.layer_number - 1, layer) for index, layer in enumerate(layers)]
    pattern = "".join(str(kind) for kind in model.decoder.layer_type_list)
    numbers = [layer.layer_number - 1 for layer in layers]
    if pattern != "".join("*-"[number % 2] for number in numbers):
        raise LowBitError(f'the HybridModel has layers "{pattern}"; only attention and MLP in turn, "*-*-", are known')
    return [(index, number // 2, layer) for index, (number, layer) in enumerate(zip(numbers, layers, strict=True))]


def num_blocks(model: Any) -> int:
    """Return the number of blocks of the whole Hugging Face model, over all pipeline stages."""
    return model.config.num_layers // (2 if is_hybrid(model) else 1)


def final_norm(model: Any) -> str:
    """Return the name of the norm after the last layer, which the last pipeline stage has."""
    return "decoder.final_norm" if is_hybrid(model) else "decoder.final_layernorm"


def layout_of(model: Any) -> Layout:
    """Return the shapes of a GPTModel's layers."""
    config = model.config
    return Layout(
        config.num_attention_heads,
        config.num_query_groups or config.num_attention_heads,
        config.kv_channels,
        config.ffn_hidden_size,
        config.hidden_size,
        world_size(model.pg_collection.tp),
        config.moe_shared_expert_intermediate_size or 0,
    )


def find_linears(model: Any) -> dict[tuple[int, Role], tuple[str, Any]]:
    """Return {(block in the whole model, from 0; role): (path, module)} of a GPTModel's tensor-parallel linears."""
    found: dict[tuple[int, Role], tuple[str, Any]] = {}
    for index, block, layer in numbered_layers(model):
        for role, path in PATHS.items():
            module: Any = layer
            for name in path.split("."):
                module = getattr(module, name, None)
            kinds = {kind.__name__ for kind in type(module).__mro__}
            if kinds & _HOSTS and not getattr(module, "is_expert", False):
                found[block, role] = (f"decoder.layers.{index}.{path}", module)
    if not found:
        raise LowBitError("the model has no tensor-parallel linears that megatron_lowbit knows")
    return found


def split_rows(weight: Tensor, layout: Layout, role: Role, rank: int) -> list[Tensor]:
    """Split a rank's rows of a fused linear [rows / N, ...] -> those of each part, in the part's own order."""
    if role not in COLUMN:
        return [weight]
    order, pieces, start = layout.rank_rows(role, rank).to(weight.device), [], 0
    for rows in layout.part_rows(role):
        mine = ((order >= start) & (order < start + rows)).nonzero().squeeze(1)
        pieces.append(weight[mine[order[mine].argsort()]])
        start += rows
    return pieces
