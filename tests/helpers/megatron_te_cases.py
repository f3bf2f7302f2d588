"""Transformer Engine's linears as a GPTModel sees them, in plain torch: their names, attributes and outputs.

The package needs a GPU. What stands here is what megatron.core.extensions.transformer_engine says of its classes: the
group is `_tp_group`, skip_bias_add is `te_return_bias` (false where there is no bias), no bias is a tensor without
elements, and LayerNormLinear holds the norm's gain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits, module_ids
from megatron_groups import parallel
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact


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


class InferenceColumnParallelLinear(TEColumnParallelLinear):
    """A layer of transformer_impl="inference_optimized": no biases; torch.distributed's collectives, no gradient."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        assert not self.bias.numel(), "inference_optimized has no biases"
        self.tp_group, self.tp_size = self._tp_group, self._tp_group.size()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.tp_size > 1:
            shard = x.contiguous()
            x = shard.new_empty(shard.shape[0] * self.tp_size, *shard.shape[1:])
            dist.all_gather_into_tensor(x, shard, group=self.tp_group)
        return x @ self.weight.t(), None


class InferenceLayerNormColumnParallelLinear(TELayerNormColumnParallelLinear):
    def __init__(self, *args: Any):
        super().__init__(*args)
        assert not self.bias.numel(), "inference_optimized has no biases"
        self.tp_group, self.tp_size = self._tp_group, self._tp_group.size()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return InferenceColumnParallelLinear.forward(self, normed)  # type: ignore[arg-type]


class InferenceRowParallelLinear(TERowParallelLinear):
    def __init__(self, *args: Any):
        super().__init__(*args)
        assert not self.bias.numel(), "inference_optimized has no biases"
        self.tp_group, self.tp_size = self._tp_group, self._tp_group.size()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = x @ self.weight.t()
        if self.tp_size == 1:
            return y, None
        shard = y.new_empty(y.shape[0] // self.tp_size, *y.shape[1:])
        dist.reduce_scatter_tensor(shard, y, group=self.tp_group)
        return shard, None


def with_transformer_engine(model: Any, fused: bool, prefix: str = "TE") -> Any:
    """The same GPTModel as a Transformer Engine spec builds it; fused: the norms are inside the linears. prefix: TE, or
    Inference."""
    column, fused_column, row = (
        globals()[f"{prefix}{name}"]
        for name in ("ColumnParallelLinear", "LayerNormColumnParallelLinear", "RowParallelLinear")
    )
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in model.decoder.layers:
        columns = [
            ("input_layernorm", layer.self_attention, "linear_qkv"),
            ("pre_mlp_layernorm", layer.mlp, "linear_fc1"),
        ]
        for norm, owner, name in columns:
            if fused:
                setattr(owner, name, fused_column(getattr(owner, name), getattr(layer, norm)))
                setattr(layer, norm, IdentityOp())
            else:
                setattr(owner, name, column(getattr(owner, name)))
        for owner, name in ((layer.self_attention, "linear_proj"), (layer.mlp, "linear_fc2")):
            setattr(owner, name, row(getattr(owner, name)))
    return model


# A GPTModel that is built from a rewritten spec of Transformer Engine's: it holds the norms inside its linears


def low_bit_spec(config: Any, scheme: str, prefix: str = "TE") -> Any:
    """lowbit_spec of a block of Transformer Engine's linears, as if the package were installed. prefix: TE, or
    Inference."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.tensor_parallel import inference_layers
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_lowbit.adapters.megatron import spec as megatron_spec

    library = te if prefix == "TE" else inference_layers
    names = {
        id(ColumnParallelLinear): getattr(library, f"{prefix}LayerNormColumnParallelLinear"),
        id(RowParallelLinear): getattr(library, f"{prefix}RowParallelLinear"),
    }
    with transformer_engine_installed():
        layer, count = megatron_spec._rewrite(megatron_spec.llama_spec(), names)
        assert count == 4
        inside = dataclasses.replace(layer.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
        return megatron_spec.block_spec(
            config, megatron_spec.lowbit_spec(dataclasses.replace(layer, submodules=inside), scheme)
        )


@contextlib.contextmanager
def transformer_engine_installed() -> Iterator[None]:
    """As far as specs can tell: without the package its classes' names are there, and nothing in them works."""
    from megatron.core.extensions import transformer_engine as te

    # 0.19's hybrid specs lead to this module, which imports the package itself where it is said to be there.
    importlib.import_module("megatron.core.post_training.modelopt.layers")
    installed, te.HAVE_TE = te.HAVE_TE, True
    try:
        yield
    finally:
        te.HAVE_TE = installed


def inner_name(name: str) -> str:
    """What a model with the norms inside calls a tensor of one with the norms outside."""
    for norm, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1")):
        name = name.replace(f".{norm}.", f".{linear}.layer_norm_")
    return name


def by_inner_names(state: dict[str, Any]) -> dict[str, Any]:
    return {inner_name(name): tensor for name, tensor in state.items()}


def loaded_into_specs(rank: int, size: int, scheme: str, sequence_parallel: bool, prefix: str = "TE") -> dict[str, Any]:
    """Return, of models that are packed on load with the norms inside and outside: logits, kinds, and the keys that
    Megatron's checkpoints have before and after the load."""
    from megatron_checkpoint_cases import keys_of

    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build("llama")
        config = megatron_model.transformer_config(hf.config, sequence_parallel=sequence_parallel)
        specs = {"inside": low_bit_spec(config, scheme, prefix), "outside": lowbit_spec(block_spec(config), scheme)}
        state = gpt_model(hf, sequence_parallel).state_dict()
        results: dict[str, Any] = {"plain": logits(gpt_model(hf, sequence_parallel))}
        for where, spec in specs.items():
            for how in ("load_state_dict", "load_weights"):
                model = megatron_model.build(hf.config, sequence_parallel=sequence_parallel, spec=spec)
                before = keys_of(model)
                if how == "load_weights":
                    megatron_model.load_weights(model, hf.state_dict(), hf.config)
                else:
                    model.load_state_dict(by_inner_names(state) if where == "inside" else state, strict=True)
                results[where, how] = logits(model)
            results[where, "kinds"], results[where, "keys"] = kinds(model), (before, keys_of(model))
        return results


def first_gradients(rank: int, size: int, scheme: str, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    """{norms inside or outside: {parameter: gradient}} of models that are trained straight through the rounding."""
    from megatron_training_cases import gradients

    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build("llama")
        config = megatron_model.transformer_config(hf.config, sequence_parallel=sequence_parallel)
        specs = {"inside": low_bit_spec(config, scheme), "outside": lowbit_spec(block_spec(config), scheme)}
        results: dict[str, dict[str, Tensor]] = {}
        for where, spec in specs.items():
            model = megatron_model.build(hf.config, sequence_parallel=sequence_parallel, spec=spec).train()
            megatron_model.load_weights(model, hf.state_dict(), hf.config)
            found = gradients(model)
            results[where] = found if where == "inside" else by_inner_names(found)
        return results


def embedded_model(sequence_parallel: bool) -> Any:
    from transformers import AutoConfig

    from megatron_lowbit.adapters.megatron import model as megatron_model

    config = AutoConfig.from_pretrained(tiny_models.embedded_folder())
    model = megatron_model.build(config, sequence_parallel=sequence_parallel)
    return megatron_model.load_weights(model, tiny_models.embedded_folder(), config)


def compared(
    rank: int,
    size: int,
    architecture: str,
    sequence_parallel: bool,
    fused: bool,
    artifacts: dict[str, Artifact | Path],
    prefix: str = "TE",
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
        engine, local = with_transformer_engine(models[0], fused, prefix), models[1]
        before = module_ids(engine)
        results: dict[str, Any] = {"unpatched": (logits(engine, vocab), logits(local, vocab)), "kinds": {}}
        for name, artifact in artifacts.items():
            lowbit.apply_to_megatron(models, artifact)
            results[name], results["kinds"][name] = (logits(engine, vocab), logits(local, vocab)), kinds(engine)
        lowbit.remove(engine)
        results["removed"], results["same_modules"] = logits(engine, vocab), module_ids(engine) == before
        return results
