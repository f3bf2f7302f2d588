"""HybridModels, in which a block of a GPTModel is two layers: what ranks run for test_megatron_hybrid.py.

Before megatron-core 0.18 the class is MambaModel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits, module_ids
from megatron_checkpoint_cases import compare, writers
from megatron_groups import parallel
from megatron_model_cases import said, stage_logits

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact


def classes() -> tuple[Any, Any, Any, ModuleType]:
    """(model, stack, its submodules, the module that they are in) of the installed version."""
    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel, block.HybridStack, block.HybridStackSubmodules, block
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.ssm import mamba_block

        return MambaModel, mamba_block.MambaStack, mamba_block.MambaStackSubmodules, mamba_block


@contextlib.contextmanager
def own_norm(block: ModuleType) -> Iterator[None]:
    """The final norm is Transformer Engine's whatever the spec says; here it is ours."""
    from megatron_lowbit.adapters.megatron.norms import RMSNorm

    before, block.TENorm = block.TENorm, RMSNorm
    try:
        yield
    finally:
        block.TENorm = before


def hybrid_model(hf: Any, sequence_parallel: bool = False, pattern: str = "*-", rewrite: Any = None) -> Any:
    """A HybridModel with the weights of a Hugging Face model. rewrite: what becomes of the spec of its stack."""
    from megatron.core import parallel_state
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_lowbit.adapters.megatron import cpu_shims, model, spec

    kind, stack, submodules, block = classes()
    config = model.transformer_config(hf.config, hf.dtype, sequence_parallel)
    config = dataclasses.replace(config, num_layers=len(pattern) * hf.config.num_hidden_layers)
    layer = spec.llama_spec(hf.config.model_type == "qwen3")
    without_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    mlp_alone = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    layers = submodules(
        attention_layer=ModuleSpec(layer.module, submodules=dataclasses.replace(layer.submodules, **without_mlp)),
        mlp_layer=ModuleSpec(MLPLayer, submodules=dataclasses.replace(layer.submodules, **mlp_alone)),
    )
    names = inspect.signature(kind).parameters
    patterns = {"hybrid_layer_pattern", "hybrid_override_pattern"} & names.keys()
    built = ModuleSpec(module=stack, submodules=layers)
    with cpu_shims.cuda_is_cpu(), own_norm(block):
        made = kind(
            config,
            built if rewrite is None else rewrite(built),
            hf.config.vocab_size,
            hf.config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            rotary_base=int(hf.config.rope_parameters["rope_theta"]),
            share_embeddings_and_output_weights=bool(hf.config.tie_word_embeddings),
            **{sorted(patterns)[0]: pattern * hf.config.num_hidden_layers},
        )
    return model.load_weights(made.eval(), hf.state_dict(), hf.config)


def compared(
    rank: int,
    size: int,
    architecture: str,
    sequence_parallel: bool,
    artifacts: dict[str, Artifact | Path],
) -> dict[str, Any]:
    """{name: (logits of the HybridModel, of the GPTModel)}, what replaced what, and what is left after remove."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        hybrid, gpt = hybrid_model(hf, sequence_parallel), gpt_model(hf, sequence_parallel)
        before = module_ids(hybrid)
        results: dict[str, Any] = {"unpatched": (logits(hybrid), logits(gpt)), "kinds": {}}
        for name, artifact in artifacts.items():
            for model in (hybrid, gpt):
                lowbit.apply_to_megatron(model, artifact)
            results[name], results["kinds"][name] = (logits(hybrid), logits(gpt)), (kinds(hybrid), kinds(gpt))
        lowbit.remove(hybrid)
        results["removed"] = torch.equal(logits(hybrid), results["unpatched"][0]) and module_ids(hybrid) == before
        exported = megatron_model.to_huggingface(hybrid, hf.config)
        results["exported"] = rank > 0 or all(
            torch.equal(tensor, hf.state_dict()[name]) for name, tensor in exported.state_dict().items()
        )
        return results


def other_pattern(rank: int, size: int, artifact: Artifact) -> str:
    """What is said of a HybridModel whose blocks are attention, attention, MLP, MLP."""
    with parallel(size):
        model = hybrid_model(tiny_models.build("llama"))
        model.decoder.layer_type_list = [*"**--"]
        return said(lambda: lowbit.apply_to_megatron(model, artifact))


def generated(rank: int, size: int, artifact: Artifact) -> list[dict[str, list[list[int]]]]:
    """[{engine: new tokens} of the HybridModel, of the GPTModel]."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        hf, outcomes = tiny_models.build("llama"), []
        requests = [Request([5, 6, 7], 6), Request([9, 8, 7, 6, 5], 6)]
        for model in (hybrid_model(hf), gpt_model(hf)):
            lowbit.apply_to_megatron(model, artifact)
            outcomes.append({how: generate(model, requests, batching=how) for how in ("static", "dynamic")})
        return outcomes


def stages(rank: int, size: int, artifact: Artifact) -> dict[str, bool]:
    """On `size` pipeline stages: whether a HybridModel gives the logits of a GPTModel, and its weights back."""
    with parallel(1, pp=size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build("llama")
        hybrid, gpt = hybrid_model(hf), gpt_model(hf)
        before = stage_logits(hybrid, tiny_models.VOCAB)
        results = {"unpatched": torch.equal(before, stage_logits(gpt, tiny_models.VOCAB))}
        for model in (hybrid, gpt):
            lowbit.apply_to_megatron(model, artifact)
        patched = stage_logits(hybrid, tiny_models.VOCAB)
        results["patched"] = torch.equal(patched, stage_logits(gpt, tiny_models.VOCAB))
        results["changed"] = bool((patched - before).abs().max() > 1e-3)
        exported = megatron_model.to_huggingface(lowbit.remove(hybrid), hf.config)
        state = {} if exported is None else exported.state_dict()
        results["exported"] = all(torch.equal(tensor, hf.state_dict()[name]) for name, tensor in state.items())
        return results


def saved(rank: int, size: int, tp: int, pp: int, artifacts: dict[str, Artifact | None], folder: Path) -> None:
    """A checkpoint of a HybridModel with each of the artifacts, in folders of their names."""
    from megatron_lowbit.adapters.megatron import checkpoint

    with parallel(tp, pp), writers():
        for name, artifact in artifacts.items():
            checkpoint.save_checkpoint(_with(hybrid_model(tiny_models.build("llama")), artifact), folder / name)


def loaded(
    rank: int, size: int, tp: int, pp: int, artifacts: dict[str, Artifact | None], folder: Path
) -> dict[str, dict[str, Any]]:
    """{name: a HybridModel with the checkpoint loaded, against one that the artifact was put into}."""
    from megatron_lowbit.adapters.megatron import checkpoint

    results = {}
    with parallel(tp, pp):
        for name, artifact in artifacts.items():
            model, expected = (hybrid_model(tiny_models.build("llama")) for _ in range(2))
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))  # whatever is not loaded shows
            checkpoint.load_checkpoint(model, folder / name)
            results[name] = compare(model, _with(expected, artifact), tiny_models.VOCAB)
    return results


def exchanged(rank: int, size: int, artifact: Artifact, folder: Path) -> list[tuple[str, bool]]:
    """[(what is said when a checkpoint of the other kind of model is loaded, whether the model is as before)]."""
    from megatron_lowbit.adapters.megatron import checkpoint

    outcomes = []
    with parallel(size), writers():
        hf = tiny_models.build("llama")
        builders = {"hybrid": hybrid_model, "gpt": gpt_model}
        for name, build in builders.items():
            checkpoint.save_checkpoint(_with(build(hf), artifact), folder / name)
        for name, build in builders.items():
            (other,) = builders.keys() - {name}
            model = build(hf)
            before = module_ids(model)
            line = said(checkpoint.load_checkpoint, model, folder / other)
            outcomes.append((line, module_ids(model) == before))
    return outcomes


def _with(model: Any, artifact: Artifact | None) -> Any:
    return model if artifact is None else lowbit.apply_to_megatron(model, artifact)
