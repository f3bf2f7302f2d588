"""The plain weights that an artifact's codes stand for: a model that any program computes, without this package.

A quantized linear computes y = Q(x H S) (W^ + B A)^T, where H is the online rotation of its input (R4), S the
reassembly of its channels, W^ the dequantized weight and B A the branch of a correction. Without the rounding Q of
activations that is one linear of the weight

    W = (W^ + B A) S^T H^T        H is symmetric, so H^T is H

Q and K are rotated together (R3), which leaves their products as they are: nothing is to be merged there. Embeddings,
norms, biases and the output projection are stored as the model computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters import readers
from megatron_lowbit.adapters.huggingface.apply import find_linears
from megatron_lowbit.adapters.huggingface.experts import find_experts, projections
from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.metrics import progress


@torch.no_grad()
def merge(model: Any, checkpoint: LowBitCheckpoint, dtype: torch.dtype) -> None:
    """Give a model that was built from a checkpoint alone the weights that the codes stand for, in `dtype`."""
    linears = {name: linear for name, (_, linear) in find_linears(model).items() if name in checkpoint.linears}
    plans = plans_of_linears(model, checkpoint, linears)
    for name, linear in progress(linears.items(), len(linears), "merging weights"):
        _set(linear, "weight", merged_weight(checkpoint, name, plans.get(name)).to(dtype))
    if checkpoint.experts is not None:
        for name, module in find_experts(model).items():
            for leaf in projections(module):
                weight = checkpoint.experts.weights[f"{name}.{leaf}"].dequantize()
                stacked = weight.view(len(getattr(module, leaf)), -1, weight.shape[-1])
                _set(module, leaf, (stacked.mT.contiguous() if module.is_transposed else stacked).to(dtype))
    if checkpoint.head is not None:
        projection = nn.Parameter(checkpoint.head.weight.dequantize().to(dtype), requires_grad=False)
        for fqn in filter(None, (checkpoint.head.name, checkpoint.head.embedding)):
            model.get_submodule(fqn).weight = projection


def plans_of_linears(
    model: Any, checkpoint: LowBitCheckpoint, linears: Mapping[str, nn.Module]
) -> dict[str, ReassemblyPlan]:
    """Return {linear: the reassembly of its input}, whether the linear carries it out or the norm before it."""
    plans = {name: plan for name, plan in checkpoint.reassembly.items() if name in checkpoint.linears}
    norms = checkpoint.reassembly.keys() - plans.keys()
    if norms:
        reads = readers.reads_of_model(model, linears, next(model.parameters()).device)
        plans |= {name: checkpoint.reassembly[norm] for norm in norms for name in reads.linears_of(norm)}
    return plans


def merged_weight(checkpoint: LowBitCheckpoint, name: str, plan: ReassemblyPlan | None) -> Tensor:
    """Return the weight of one linear: float32 [out, in]. plan: of its input."""
    weight = checkpoint.linears[name].dequantize()
    if (branch := checkpoint.low_rank.get(name)) is not None:
        weight = weight + branch.lora_b.float() @ branch.lora_a.float()
    if plan is not None:
        spread = weight[:, plan.dst_idx] * plan.coefficient
        weight = weight.new_zeros(len(weight), plan.in_features).index_add_(1, plan.src_idx, spread)
    if checkpoint.rotation is not None and name in checkpoint.rotation.inputs:
        weight = hadamard(weight, activation_groups(weight.shape[1], checkpoint.shard_groups))
    return weight


def _set(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
