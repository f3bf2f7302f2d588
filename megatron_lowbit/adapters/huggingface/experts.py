"""The experts of Hugging Face mixtures of experts: which modules they are, their weights, and what replaces them.

transformers keeps the experts of a block in one module of one convention: tensors `gate_up_proj` (or `up_proj`) and
`down_proj` of three dimensions, the first of them the experts, and a forward of (tokens, chosen experts, their
weights). The router is another module and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.rotated import shallow_copy
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.fingerprint import Fingerprint, bit_sum
from megatron_lowbit.layers.experts import QuantExperts
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.experts import QuantizedExperts, round_expert, stack_experts


def find_experts(model: nn.Module) -> dict[str, Any]:
    """Return {fqn: module} of the modules that hold experts, in order; those of other conventions are not among
    them."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def _is_experts(module: Any) -> bool:
    known = all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"))
    if not known or module.has_post_expert_norm:
        return False
    weights = [getattr(module, leaf, None) for leaf in projections(module)]
    return all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights)


def projections(module: Any) -> tuple[str, str]:
    """Return the names of an experts module's two tensors: what reads the hidden states, and what writes them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def expert_weight(module: Any, leaf: str, number: int) -> Tensor:
    """Return one expert's weight [out, in], a view."""
    weight = getattr(module, leaf)[number].detach()
    return weight.T if module.is_transposed else weight


def replaced_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {fqn: tensor} of all experts' weights."""
    experts = find_experts(model).items()
    return {f"{name}.{leaf}": getattr(module, leaf) for name, module in experts for leaf in projections(module)}


def require_experts(model: nn.Module, config: WeightsConfig) -> None:
    """Raise LowBitError where weights.experts is set and the model has no experts that are known."""
    if config.experts != "none" and not find_experts(model):
        raise LowBitError(
            f"weights.experts={config.experts} has no effect on {type(model).__name__}, which has no experts that "
            "megatron_lowbit knows; leave it out"
        )


def attach_experts(model: nn.Module, checkpoint: LowBitCheckpoint, config: WeightsConfig) -> LowBitCheckpoint:
    """Return the checkpoint of a whole, unpatched model with its experts rounded as well, without calibration text."""
    experts = _round_experts(model, config)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in experts.weights}
    fingerprint = with_experts(checkpoint.fingerprint, model, experts)
    return replace(checkpoint, experts=experts, tensors=tensors, fingerprint=fingerprint)


@torch.no_grad()
def _round_experts(model: nn.Module, config: WeightsConfig) -> QuantizedExperts:
    weights = {}
    for name, module in find_experts(model).items():
        for leaf in projections(module):
            fqn, count = f"{name}.{leaf}", len(getattr(module, leaf))
            rounded = [
                round_expert(expert_weight(module, leaf, e).float(), config, f"{fqn}[{e}]") for e in range(count)
            ]
            weights[fqn] = stack_experts(rounded)
    return QuantizedExperts(config.experts, weights)


def without_weights(module: Any) -> nn.Module:
    """Return a copy of an experts module that shares all but its weights, which it has not."""
    host = shallow_copy(module)
    for leaf in projections(module):
        del host._parameters[leaf]
    return host


def expert_modules(model: nn.Module, experts: QuantizedExperts | None) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the modules whose experts the checkpoint has quantized.

    Every rank of a sharded model gets all experts. Raises LowBitError for a model without them, and for one whose
    experts are spread over ranks.
    """
    if experts is None:
        return {}
    found = find_experts(model)
    replacements: dict[str, nn.Module] = {}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in experts.weights)
    for name in owners:
        module = found.get(name)
        if module is None or any(f"{name}.{leaf}" not in experts.weights for leaf in projections(module)):
            raise LowBitError(
                f"the model has no experts {name}, which the artifact has quantized; quantize this model again"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise LowBitError(
                f"{name} holds a share of the experts (expert parallelism), the artifact's codes are those of all; "
                "load the model without expert parallelism"
            )
        up, down = (experts.weights[f"{name}.{leaf}"] for leaf in projections(module))
        for leaf, weight in zip(projections(module), (up, down), strict=True):
            tensor = getattr(module, leaf)
            count, rows, width = tensor.shape if not module.is_transposed else tensor.mT.shape
            if (len(weight.packed_weight), weight.in_features) != (count * rows, width):
                raise LowBitError(
                    f"{name}.{leaf} is {count} x [{rows}, {width}] in the model and [{len(weight.packed_weight)}, "
                    f"{weight.in_features}] in the artifact, which belongs to another model; quantize this one"
                )
        replacements[name] = QuantExperts(without_weights(module), len(module.down_proj), up, down, experts.act_bits)
    return replacements


def with_experts(here: Fingerprint, model: nn.Module, experts: QuantizedExperts | None) -> Fingerprint:
    """Return a model's fingerprint with its experts, where the checkpoint has some of its own to compare."""
    if experts is None or next(iter(experts.weights)) in here["weights"]:
        return here
    sums = {name: expert_bit_sum(tensor) for name, tensor in replaced_tensors(model).items()}
    return {**here, "weights": {**here["weights"], **sums}}


@contextmanager
def looped_experts(model: nn.Module) -> Iterator[None]:
    """Have experts compute one after the other within the context: torch's grouped product refuses float64."""
    configs = {id(module.config): module.config for module in find_experts(model).values()}.values()
    before = [config._experts_implementation for config in configs]
    for config in configs:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def expert_bit_sum(tensor: Tensor) -> int:
    """Return the bit_sum of all experts' weights, of one expert at a time."""
    return int(sum(bit_sum(expert.detach()) for expert in tensor))
