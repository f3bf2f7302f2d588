"""Artifacts with reassembled norms for tiny models, and the same arithmetic as a full-precision model.

a linear on a reassembled input:  (x S) Q(R W)^T = x (S Q(R W)^T),  so its effective weight is Q(R W) S^T
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.qllm.reassembly import build_plan
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def make_plan(width: int, seed: int, merge: bool = True) -> ReassemblyPlan:
    """Two channels split in two and, with `merge`, two others merged."""
    max_abs = torch.full((width,), 0.5)
    max_abs[[3, width - 2]] = 1.5
    distance = torch.rand(width, width, generator=torch.Generator().manual_seed(seed))
    plan = build_plan(max_abs, 1.0, distance if merge else None)
    assert plan is not None and not plan.is_identity
    return plan


def reassembled(model: nn.Module, artifact: Artifact, merge: bool = True) -> Artifact:
    """The artifact with every norm before attention and MLP reassembled, and the linears that read it rounded anew."""
    checkpoint = artifact.checkpoint
    assert checkpoint is not None
    plans: dict[str, ReassemblyPlan] = {}
    linears = dict(checkpoint.linears)
    for name, (kind, linear) in huggingface.find_linears(model).items():
        norm = norm_before(name)
        if kind == "column":
            plan = plans.setdefault(norm, make_plan(linear.in_features, len(plans), merge))
            linears[name] = QuantizedWeight.from_float(plan.weights(linear.weight.data), checkpoint.scheme.weight_bits)
    return Artifact(dataclasses.replace(checkpoint, linears=linears, reassembly=plans), artifact.plans)


def norm_before(linear: str) -> str:
    """model.layers.0.mlp.up_proj -> model.layers.0.post_attention_layernorm"""
    prefix, layers, index, owner, *_ = linear.split(".")
    return f"{prefix}.{layers}.{index}.{NORMS[owner]}"


def effective_weight(weight: QuantizedWeight, plan: ReassemblyPlan | None) -> Tensor:
    """float64 [out, in]: what the linear multiplies its plain input with."""
    rounded = weight.dequantize().double()
    if plan is None:
        return rounded
    spread = torch.zeros(plan.width, plan.in_features, dtype=torch.float64)
    spread.index_put_((plan.dst_idx, plan.src_idx), plan.coefficient.double(), accumulate=True)
    return rounded @ spread


def dense_twin(model: Any, artifact: Artifact, linears: list[str]) -> Any:
    """A copy of the model whose named linears hold the effective weights of a W*A16 artifact; all else as it is."""
    twin, checkpoint = copy.deepcopy(model), artifact.checkpoint
    assert checkpoint is not None
    for name in linears:
        plan = (
            checkpoint.reassembly.get(norm_before(name))
            if name.rpartition(".")[2] not in ("o_proj", "down_proj")
            else None
        )
        twin.get_submodule(name).weight.data.copy_(effective_weight(checkpoint.linears[name], plan))
    return twin
