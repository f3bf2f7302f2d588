"""Transformer Engine's linears as a GPTModel sees them, in plain torch: their names, attributes and outputs.

The package needs a GPU. What stands here is what megatron.core.extensions.transformer_engine says of its classes: the
group is `_tp_group`, skip_bias_add is `te_return_bias` (false where there is no bias), no bias is a tensor without
elements, and LayerNormLinear holds the norm's gain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits, module_ids
from megatron_groups import parallel
from torch import Tensor, nn
from torch.nn import functional as F

import megatron_lowbit as lowbit
from megatron_lowbit.artifacts import Artifact


class _Linear(nn.Module):
    """Around one of Megatron's own linears, whose parameters it takes over."""

    def __init__(self, local: Any):
        super().__init__()
        self.weight = local.weight
        self.bias = local.bias if local.bias is not None else torch.empty(0)
        self.te_return_bias = local.skip_bias_add and local.bias is not None
        self.config, self._tp_group, self.sequence_parallel = local.config, local.tp_group, local.sequence_parallel
        self.out_features, self.in_features = local.output_size, local.input_size

    def returned(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.te_return_bias:
            return y, self.bias
        return (y + self.bias if self.bias.numel() else y), None


class TEColumnParallelLinear(_Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self._tp_group)
        return self.returned(F.linear(x, self.weight))


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    def __init__(self, local: Any, norm: Any):
        super().__init__(local)
        self.layer_norm_weight, self.layer_norm_bias, self.eps = norm.weight, None, norm.eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class TERowParallelLinear(_Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        from megatron.core.tensor_parallel import mappings

        y = F.linear(x, self.weight)
        reduce = (
            mappings.reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else mappings.reduce_from_tensor_model_parallel_region
        )
        return self.returned(reduce(y, group=self._tp_group))


def with_transformer_engine(model: Any, fused: bool) -> Any:
    """The same GPTModel as a Transformer Engine spec builds it; fused: the norms are inside the linears."""
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in model.decoder.layers:
        columns = [
            ("input_layernorm", layer.self_attention, "linear_qkv"),
            ("pre_mlp_layernorm", layer.mlp, "linear_fc1"),
        ]
        for norm, owner, name in columns:
            if fused:
                setattr(owner, name, TELayerNormColumnParallelLinear(getattr(owner, name), getattr(layer, norm)))
                setattr(layer, norm, IdentityOp())
            else:
                setattr(owner, name, TEColumnParallelLinear(getattr(owner, name)))
        for owner, name in ((layer.self_attention, "linear_proj"), (layer.mlp, "linear_fc2")):
            setattr(owner, name, TERowParallelLinear(getattr(owner, name)))
    return model


def embedded_model(sequence_parallel: bool) -> Any:
    from transformers import AutoConfig

    from megatron_lowbit.adapters import megatron_model

    config = AutoConfig.from_pretrained(tiny_models.embedded_folder())
    model = megatron_model.build(config, sequence_parallel=sequence_parallel)
    return megatron_model.load_weights(model, tiny_models.embedded_folder(), config)


def compared(
    rank: int, size: int, architecture: str, sequence_parallel: bool, fused: bool, artifacts: dict[str, Artifact | Path]
) -> dict[str, Any]:
    """Logits of a model with Transformer Engine's classes and of one with Megatron's own: {name: (the one, the
    other)}."""
    with parallel(size):
        if architecture == "embedded":
            models = [embedded_model(sequence_parallel) for _ in range(2)]
        else:
            hf = tiny_models.build(architecture)
            models = [gpt_model(hf, sequence_parallel) for _ in range(2)]
        vocab = 1024 if architecture == "embedded" else tiny_models.VOCAB
        engine, local = with_transformer_engine(models[0], fused), models[1]
        before = module_ids(engine)
        results: dict[str, Any] = {"unpatched": (logits(engine, vocab), logits(local, vocab)), "kinds": {}}
        for name, artifact in artifacts.items():
            lowbit.apply_to_megatron(models, artifact)
            results[name], results["kinds"][name] = (logits(engine, vocab), logits(local, vocab)), kinds(engine)
        lowbit.remove(engine)
        results["removed"], results["same_modules"] = logits(engine, vocab), module_ids(engine) == before
        return results
