"""The artifact of a GPTModel with packed weights, out of its ranks' shares: what was given to apply_to_megatron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.adapters.megatron import model as megatron_model
from megatron_lowbit.adapters.megatron.description import artifact_of
from megatron_lowbit.adapters.megatron.experts import PROJECTIONS, expert_layout, find_experts, several
from megatron_lowbit.adapters.megatron.layout import (
    COLUMN,
    NORMS,
    Layout,
    find_linears,
    find_prefix,
    layout_of,
    model_chunks,
    norm_name,
    numbered_layers,
    parts,
)
from megatron_lowbit.adapters.megatron.norms import LowBitNorm
from megatron_lowbit.adapters.megatron.sharded_state import dense_tensors, own_plan, quantized_linear
from megatron_lowbit.adapters.megatron_names import Role
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.quant.checkpoint import PLAN, WEIGHT
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import all_gather_stack, group_rank


@torch.no_grad()
def to_artifact(model: Any, about: Mapping[str, Any], hf_config: Any) -> Artifact | None:
    """Return the artifact that a GPTModel (or its pipeline chunks) holds, on rank 0 of every model-parallel group (None
    elsewhere). A collective call.

    about: its `description`. Raises LowBitError where the model lacks one of its tensors.
    """
    chunks = model_chunks(model)
    state: dict[str, Tensor] = {}
    for chunk in chunks:
        state |= megatron_model.export(chunk, hf_config, True, about["experts"] is not None)
        state |= _linears(chunk, about) | _plans_of_norms(chunk, about) | _experts(chunk, about)
    whole = megatron_model.from_all_stages(chunks, state)
    return None if whole is None else artifact_of(whole, about)


class _Gather:
    """Puts the shares of a linear's tensors together again, on the CPU."""

    def __init__(self, layout: Layout, role: Role, group: Any):
        self.layout, self.role, self.group = layout, role, several(group)
        self.rank = group_rank(group)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of all ranks of a column-parallel linear, in the order of cat(parts); or a row-parallel one's
        columns."""
        return self.layout.whole(all_gather_stack(tensor.contiguous(), self.group), self.role).cpu()

    def weight(self, linear: Any, leaf: str, grouped: bool) -> Tensor:
        """Return a tensor of a packed weight. grouped: whether a row of the whole weight has several scales."""
        tensor = getattr(linear, leaf)
        shared = self.role in COLUMN or leaf == "packed_weight" or grouped
        return self.rows(tensor) if shared else tensor.cpu()


def _linears(model: Any, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return codes, branches and plans of the linears of one chunk, under the names of an artifact."""
    layout, known = layout_of(model), about["linears"]
    prefix = find_prefix(known)
    state: dict[str, Tensor] = {}
    for (layer, role), (_, module) in find_linears(model).items():
        names, gather = parts(prefix, layer, role, known), _Gather(layout, role, model.pg_collection.tp)
        sizes = layout.part_rows(role) if len(names) > 1 else (sum(layout.part_rows(role)),)
        linear: Any = quantized_linear(module)
        for leaf in WEIGHT:
            pieces = gather.weight(linear, leaf, module.grouped).split(sizes)
            state |= {f"{name}.{leaf}": piece.clone() for name, piece in zip(names, pieces, strict=True)}
        if linear.lora_a is not None:
            state |= _branches(linear, gather, names, sizes, about["low_rank"])
        if names[0] in about["reassembly"]:
            own = _whole_plan(linear, gather)
            state |= {f"{name}.{leaf}": getattr(own, leaf) for name in names for leaf in PLAN}
        if role not in COLUMN:
            for size in about["plans"].keys() & module.plans.keys():
                plan = module.plans[size].tensors().items()
                state |= {f"tp{size}.{names[0]}/{leaf}": tensor.cpu() for leaf, tensor in plan}
    return state


def _branches(
    linear: Any, gather: _Gather, names: Sequence[str], sizes: Sequence[int], ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the branches of the parts of a fused linear, without the zeros that filled them up."""
    column = gather.role in COLUMN
    lora_a = linear.lora_a.cpu() if column else gather.rows(linear.lora_a)
    lora_b = gather.rows(linear.lora_b) if column else linear.lora_b.cpu()
    state: dict[str, Tensor] = {}
    width = len(lora_a) // len(names)
    for number, (name, rows) in enumerate(zip(names, lora_b.split(list(sizes)), strict=True)):
        if name in ranks:
            mine = slice(number * width, number * width + ranks[name])
            state |= {f"{name}.lora_a": lora_a[mine].clone(), f"{name}.lora_b": rows[:, mine].clone()}
    return state


def _whole_plan(linear: Any, gather: _Gather) -> ReassemblyPlan:
    """Return the reassembly of a linear's own input, over all ranks."""
    row = gather.role not in COLUMN
    tensors = dense_tensors(own_plan(linear), gather.rank if row else 0).values()
    gathered = [all_gather_stack(tensor.contiguous(), gather.group if row else None) for tensor in tensors]
    src, coefficient, merged = (tensor.flatten().cpu() for tensor in gathered)
    return ReassemblyPlan.from_dense(src, coefficient, merged)


def _plans_of_norms(model: Any, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the reassembly of norms, whether they carry it out or the linear that reads them."""
    prefix, linears = find_prefix(about["linears"]), find_linears(model)
    state: dict[str, Tensor] = {}
    for _, block, layer in numbered_layers(model):
        for norm, (_, role) in NORMS.items():
            name = norm_name(prefix, block, norm)
            if role is None or name not in about["reassembly"] or (block, role) not in linears:
                continue
            module = getattr(layer, norm)
            if isinstance(module, LowBitNorm) and module.reassembled is not None:
                plan = module.plan().to("cpu")
            else:
                linear: Any = quantized_linear(linears[block, role][1])
                plan = own_plan(linear).to("cpu")
            state |= {f"{name}.{leaf}": getattr(plan, leaf) for leaf in PLAN}
    return state


def _experts(model: Any, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the codes of all experts of one chunk."""
    prefix = find_prefix(about["linears"])
    state: dict[str, Tensor] = {}
    if about["experts"] is None:
        return state
    groups = model.pg_collection
    for here in find_experts(model):
        layout, _ = expert_layout(model)
        for role, linears in zip(PROJECTIONS, (here.module.up, here.module.down), strict=True):
            gather = _Gather(layout, role, groups.expt_tp)
            for leaf in WEIGHT:
                mine = torch.stack([gather.weight(linear, leaf, here.module.grouped) for linear in linears])
                whole = all_gather_stack(mine.to(here.layer.router.weight.device), several(groups.ep))
                state[f"{here.name(prefix, role)}.{leaf}"] = whole.flatten(0, 2).cpu()
    return state
