"""Norms that something besides our linears reads: what workers of a RankPool run for test_megatron_readers.py."""

from __future__ import annotations

import dataclasses
import types
import warnings
from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits, module_ids
from megatron_checkpoint_cases import writers
from megatron_groups import parallel
from megatron_model_cases import said
from torch import Tensor, nn
from transformers import PreTrainedModel

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact


def gated(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The forward of an MLP of Megatron's behind a gate that reads the norm, too."""
    from megatron.core.transformer.mlp import MLP

    y, bias = MLP.forward(self, hidden, *args, **kwargs)
    return y * torch.sigmoid(hidden @ torch.linspace(-1, 1, hidden.shape[-1]))[..., None], bias


class OtherLinear(nn.Module):
    """A linear that adapters do not know, around one of Megatron's."""

    def __init__(self, linear: Any):
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.linear(hidden)


def with_other_reader(kind: str, hf: PreTrainedModel, sequence_parallel: bool) -> Any:
    """A GPTModel with the weights of a Hugging Face model; layer 1 has not quite Megatron's own MLP."""
    from megatron.core.transformer.mlp import MLP

    if kind == "experts":
        return with_experts(hf, sequence_parallel)
    model = gpt_model(hf, sequence_parallel)
    mlp = model.decoder.layers[1].mlp
    if kind == "class of its own":
        mlp.__class__ = type("GatedMLP", (MLP,), {"forward": gated})
    elif kind == "forward of its own":
        mlp.forward = types.MethodType(gated, mlp)
    elif kind == "linear of another kind":
        mlp.linear_fc1 = OtherLinear(mlp.linear_fc1)
    elif kind == "linear beside them":
        mlp.gate = nn.Linear(4, 4)
    return model


def with_experts(hf: PreTrainedModel, sequence_parallel: bool) -> Any:
    """Layer 1 is a mixture of two experts with random weights, the same for every call; a router reads the norm."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    original = megatron_model.transformer_config

    def config_of_experts(*args: Any, **kwargs: Any) -> Any:
        changes = {"num_moe_experts": 2, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1]}
        return dataclasses.replace(original(*args, **kwargs), **changes)

    megatron_model.transformer_config = config_of_experts
    try:
        model = megatron_model.build(hf.config, sequence_parallel=sequence_parallel)
    finally:
        megatron_model.transformer_config = original
    state = gpt_model(hf, sequence_parallel).state_dict()
    model.load_state_dict({k: v for k, v in state.items() if ".layers.1.mlp." not in k}, strict=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.decoder.layers[1].mlp.named_parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def applied(
    rank: int, size: int, kind: str, sequence_parallel: bool, artifact: Artifact, effective: dict[str, Tensor]
) -> dict[str, Any]:
    """Logits with an artifact, and of the same model in full precision with its effective weights; the norms that
    reassemble; what was warned of."""
    with parallel(size):
        hf, twin = tiny_models.build("llama"), tiny_models.build("llama")
        twin.load_state_dict(effective)
        model = with_other_reader(kind, hf, sequence_parallel)
        plain = logits(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lowbit.apply_to_megatron(model, artifact)
        results = {
            "plain": plain,
            "applied": logits(model),
            "expected": logits(with_other_reader(kind, twin, sequence_parallel)),
            "reassembling": {
                name for name, module in model.named_modules() if getattr(module, "reassembled", None) is not None
            },
            "said": [str(w.message) for w in caught if "quantized weights" in str(w.message)],
        }
        lowbit.remove(model)
        results["removed"] = logits(model)
        return results


# {kind: what is said of it}
UNKNOWN = {
    "linear of another kind": "decoder.layers.1.mlp.linear_fc1 (OtherLinear)",
    "linear beside them": "decoder.layers.1.mlp.gate (Linear)",
}


def refused(rank: int, size: int, kind: str, artifact: Artifact) -> tuple[str, bool]:
    """What apply_to_megatron says, and whether the model is as before."""
    with parallel(size):
        model = with_other_reader(kind, tiny_models.build("llama"), False)
        before = module_ids(model)
        return said(lambda: lowbit.apply_to_megatron(model, artifact)), module_ids(model) == before


def saved(rank: int, size: int, kind: str, artifact: Artifact, folder: Path) -> tuple[bool, bool]:
    """Whether Megatron's distributed checkpoint of a patched model makes another the same: (logits, our layers)."""
    with parallel(size), writers():
        from megatron_lowbit.adapters.megatron import checkpoint

        model, other = (with_other_reader(kind, tiny_models.build("llama"), False) for _ in range(2))
        lowbit.apply_to_megatron(model, artifact)
        checkpoint.save_checkpoint(model, folder)
        checkpoint.load_checkpoint(other, folder)
        return torch.equal(logits(other), logits(model)), kinds(other) == kinds(model)
