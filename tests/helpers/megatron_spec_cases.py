"""GPTModels that are built from low-bit specs: cases for the ranks of test_megatron_spec.py and _load.py."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits
from megatron_groups import parallel
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, WeightsConfig

Recipe = dict[str, Any]


def built_by_name(rank: int, size: int, name: str, architecture: str) -> dict[str, Any]:
    """GPTModel as Megatron's scripts build it for `--spec megatron_lowbit.adapters.megatron NAME`: the object by its
    names, a layer's spec, then a full-precision state_dict."""
    with parallel(size):
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.spec_utils import import_module

        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        spec = import_module(("megatron_lowbit.adapters.megatron", name))
        model = GPTModel(
            megatron_model.transformer_config(hf.config),
            transformer_layer_spec=spec,
            vocab_size=tiny_models.VOCAB,
            max_sequence_length=64,
            position_embedding_type="rope",
            rotary_base=hf.config.rope_parameters["rope_theta"],
            share_embeddings_and_output_weights=False,
            parallel_output=True,
        ).eval()
        before = {type(module.low_bit) for module in model.modules() if hasattr(module, "low_bit")}
        model.load_state_dict(gpt_model(hf).state_dict(), strict=True)
        linears = [module for module in model.modules() if hasattr(module, "low_bit")]
        return {
            "before": {kind.__name__ for kind in before},
            "schemes": {layer.low_bit.extra_repr().split(", ")[2] for layer in linears if not layer.is_row}
            | {layer.low_bit.shards[0].extra_repr().split(", ")[2] for layer in linears if layer.is_row},
            "kinds": kinds(model),
            "logits": logits(model),
        }


def moe(rank: int, size: int) -> dict[str, str]:
    """{module: its class} of a GPTModel with two experts and a shared one, built from a low-bit spec."""
    with parallel(size):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.transformer_config import TransformerConfig

        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import lowbit_spec

        config = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=24,
            num_moe_experts=2,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=16,
            add_bias_linear=False,
            use_cpu_initialization=True,
        )
        spec = lowbit_spec(get_gpt_layer_local_spec(num_experts=2), "W4A8")
        model = GPTModel(config, spec, vocab_size=32, max_sequence_length=16)
        assert {role for _, role in find_linears(model)} == {"linear_qkv", "linear_proj", "shared_fc1", "shared_fc2"}
        return {name: type(module).__name__ for name, module in model.named_modules()}


def loaded(
    rank: int, size: int, architecture: str, weights: WeightsConfig, how: str, sequence_parallel: bool = False
) -> dict[str, Any]:
    """What a GPTModel that was built to round holds after a full-precision checkpoint has been loaded into it."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import block_spec, llama_spec, lowbit_spec

        hf = tiny_models.build(architecture)
        config = megatron_model.transformer_config(hf.config, sequence_parallel=sequence_parallel)
        spec = block_spec(config, lowbit_spec(llama_spec(config.qk_layernorm), weights))
        model = megatron_model.build(hf.config, sequence_parallel=sequence_parallel, spec=spec)
        if how == "load_weights":
            megatron_model.load_weights(model, hf.state_dict(), hf.config)
        else:
            model.load_state_dict(gpt_model(hf, sequence_parallel).state_dict(), strict=True)
        return {"linears": contents(find_linears(model)), "logits": logits(model)}


def contents(linears: dict[Any, tuple[str, Any]]) -> dict[Any, dict[str, Any]]:
    """{(layer, role): tensors and settings} of low-bit layers; None where a layer keeps its weight."""
    found: dict[Any, Any] = {}
    for key, (_, layer) in linears.items():
        if layer.low_bit is None:
            found[key] = None
            continue
        assert layer.weight is None
        linear = layer.low_bit.shards[0] if layer.is_row else layer.low_bit
        found[key] = {
            "packed_weight": linear.packed_weight,
            "scale": linear.scale,
            "zero_point": linear.zero_point,
            "settings": (linear.weight_bits, linear.act_bits, linear.act_groups, linear.in_features),
        }
    return found


def by_recipe(rank: int, size: int, recipe: Recipe, default: str | None) -> dict[str, Any] | str:
    """{(layer, role): settings, or None in full precision} of a model built with a recipe; or what was refused."""
    with parallel(size):
        from megatron.core.quantization.quant_config import RecipeConfig

        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import llama_spec, lowbit_spec

        hf, original = tiny_models.build("qwen2"), megatron_model.transformer_config

        def with_recipe(*args: Any, **kwargs: Any) -> Any:
            config = original(*args, **kwargs)
            config.quant_recipe = RecipeConfig.from_config_dict(recipe)
            return config

        try:
            megatron_model.transformer_config = with_recipe
            model = megatron_model.build(hf.config, spec=lowbit_spec(llama_spec(), default))
        except LowBitError as error:
            return str(error)
        finally:
            megatron_model.transformer_config = original
        try:
            model.load_state_dict(gpt_model(hf).state_dict(), strict=True)
        except LowBitError as error:
            return str(error)
        found = contents(find_linears(model))
        return {key: None if value is None else value["settings"] for key, value in found.items()}


def unquantized_spec(rank: int, size: int, artifact: Artifact) -> dict[str, Any]:
    """A model of lowbit_spec without a scheme is Megatron's own, weights and gradients and all, until an artifact is
    applied."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron.spec import llama_spec, lowbit_spec

        hf = tiny_models.build("llama")
        plain, model = gpt_model(hf, spec=llama_spec()), gpt_model(hf, spec=lowbit_spec(llama_spec()))
        same_names = list(plain.state_dict()) == list(model.state_dict())
        results: dict[str, Any] = {"same_names": same_names, "plain": logits(plain), "built": logits(model)}
        for name, target in (("applied to built", model), ("applied to plain", plain)):
            lowbit.apply_to_megatron(target, artifact)
            results[name] = logits(target)
        lowbit.remove(model)
        results["removed"] = logits(model)
        return results


def artifact_over_rounded(
    rank: int, size: int, scheme: str, artifact: Artifact, other: Artifact
) -> dict[str, Tensor | str]:
    """Plans, or a whole artifact, over a model that was rounded on load; and an artifact of other weights."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, llama_spec, lowbit_spec

        hf = tiny_models.build("llama")
        config = megatron_model.transformer_config(hf.config)
        model = megatron_model.build(hf.config, spec=block_spec(config, lowbit_spec(llama_spec(), scheme)))
        model.load_state_dict(gpt_model(hf).state_dict())
        results: dict[str, Any] = {"rounded": logits(model)}
        lowbit.apply_to_megatron(model, artifact)
        results["applied"] = logits(model)
        lowbit.remove(model)
        results["removed"] = logits(model)
        try:
            lowbit.apply_to_megatron(model, other)
            results["refused"] = "accepted"
        except LowBitError as error:
            results["refused"] = str(error)
        results["after"] = logits(model)
        return results


def partial_load(rank: int, size: int) -> dict[str, Any]:
    """A state dict in two pieces, as from two files: only a layer whose weight has come is rounded."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import llama_spec, lowbit_spec

        hf = tiny_models.build("llama")
        state = gpt_model(hf, spec=llama_spec()).state_dict()
        pieces: list[dict[str, Tensor]] = [{}, {}]
        for name, tensor in state.items():
            pieces[".layers.1." in name][name] = tensor
        whole, parts = (megatron_model.build(hf.config, spec=lowbit_spec(llama_spec(), "W4A8")) for _ in range(2))
        whole.load_state_dict(state)
        parts.load_state_dict(pieces[0], strict=False)
        rounded = {key[0]: value is not None for key, value in contents(find_linears(parts)).items()}
        parts.load_state_dict(pieces[1], strict=False)
        a, b = (contents(find_linears(model)) for model in (whole, parts))
        equal = all(torch.equal(a[key]["packed_weight"], b[key]["packed_weight"]) for key in a)
        return {"after one": rounded, "equal": equal}


def from_recipe_file(rank: int, size: int, path: str, artifact: Artifact) -> dict[str, Any]:
    """What low-bit layers hold: of a model that was built with a recipe file, which Megatron's own function reads, and
    loaded in full precision; and of one that the artifact was applied to."""
    with parallel(size):
        from megatron.core.quantization.utils import load_quantization_recipe

        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import llama_spec, lowbit_spec

        hf, original = tiny_models.build("llama", intermediate_size=96), megatron_model.transformer_config

        def with_recipe(*args: Any, **kwargs: Any) -> Any:
            config = original(*args, **kwargs)
            config.quant_recipe = load_quantization_recipe(path)
            return config

        try:
            megatron_model.transformer_config = with_recipe
            model = megatron_model.build(hf.config, spec=lowbit_spec(llama_spec()))
        finally:
            megatron_model.transformer_config = original
        model.load_state_dict(gpt_model(hf).state_dict(), strict=True)
        applied = lowbit.apply_to_megatron(gpt_model(hf), artifact)
        return {"rounded": contents(find_linears(model)), "applied": contents(find_linears(applied))}
