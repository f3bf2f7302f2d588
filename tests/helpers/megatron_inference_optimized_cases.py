"""What test_megatron_inference_optimized.py runs on ranks, and the specs that it looks into."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds
from megatron_groups import parallel
from megatron_model_cases import said
from megatron_te_cases import low_bit_spec, with_transformer_engine
from recorded_collectives import RecordedCollectives

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact

Sent = dict[str, dict[str, dict[str, int]]]  # {in which dtype: {prefill or decode: {scattered or gathered: bytes}}}


def wire_bytes(name: str, nbytes: int, size: int) -> int:
    """Bytes that leave a rank when a collective is handed so many: each keeps its own part."""
    return nbytes * (size - 1) if name.startswith("all_gather") else nbytes * (size - 1) // size


def sent(rank: int, size: int, artifact: Artifact, model: Any = None) -> Sent:
    """What this rank's linears send while the dynamic engine reads a prompt and makes tokens, without and with an
    artifact. model: a model folder; None: a tiny one."""
    from transformers import AutoModelForCausalLM

    hf = tiny_models.build("llama") if model is None else AutoModelForCausalLM.from_pretrained(model)
    results: Sent = {}
    with parallel(size):
        for name in ("bfloat16", "low bits"):
            gpt = with_transformer_engine(gpt_model(hf.to(torch.bfloat16), True), True, "Inference")
            if name == "low bits":
                lowbit.apply_to_megatron(gpt, artifact)
            results[name] = _recorded(gpt, size)
    return results


def _recorded(gpt: Any, size: int) -> dict[str, dict[str, int]]:
    """{step: bytes}, without the 16 that each rank broadcasts when the number of tokens changes, to compare it."""
    from megatron_lowbit.adapters.megatron.inference import Request, generate
    from megatron_lowbit.adapters.megatron.layout import COLUMN, find_linears

    steps: list[dict[str, int]] = []
    with RecordedCollectives() as recorded:

        def begin(*_: Any) -> None:
            recorded.calls.clear()

        def end(kind: str, *_: Any) -> None:
            activations = [call for call in recorded.calls if call[0] != "broadcast"]
            steps[-1][kind] += sum(wire_bytes(name, nbytes, size) for name, nbytes, _ in activations)

        for (_, role), (_, module) in find_linears(gpt).items():
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(functools.partial(end, "gathered" if role in COLUMN else "scattered"))
        generate(
            gpt,
            [Request(list(range(3, 19)), 3)],
            on_step=lambda: steps.append({"scattered": 0, "gathered": 0}),
        )
    return {"prefill": steps[0], "decode": steps[1]}


# Specs


def leaves(node: Any) -> list[Any]:
    """All that a spec names but for experts. (Without Transformer Engine its classes are mocks, not classes.)"""
    if type(node).__name__ == "MoESubmodules":
        return []
    if isinstance(node, functools.partial):
        return leaves([node.func, *node.args, *node.keywords.values()])
    if isinstance(node, dict):
        return leaves(list(node.values()))
    if isinstance(node, (list, tuple)):
        return [leaf for item in node for leaf in leaves(item)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return leaves([getattr(node, field.name, None) for field in dataclasses.fields(node)])
    return [node]


def counted(spec: Any) -> tuple[int, dict[str, int]]:
    """(linears of Megatron's that a spec names, ours by their class)."""
    from megatron_lowbit.adapters.megatron.spec import _replacements

    hosts = {id(host) for host, _ in _replacements()}
    names = [leaf.__name__ for leaf in leaves(spec) if isinstance(leaf, type) and leaf.__name__.startswith("LowBit")]
    return sum(id(leaf) in hosts for leaf in leaves(spec)), {name: names.count(name) for name in set(names)}


def hybrid_spec() -> Any:
    """The stack of a hybrid model that Megatron optimizes for inference."""
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_inference_stack_spec

        return hybrid_inference_stack_spec
    except ImportError:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_inference_stack_spec

        return mamba_inference_stack_spec


class TheirRowParallelLinear:
    """A tensor-parallel linear of somebody's own."""


def with_another(node: Any, role: str | None, kind: type) -> Any:
    """A copy of a layer's spec with another class for one linear, or for all."""
    if isinstance(node, functools.partial):
        return functools.partial(node.func, *node.args, **with_another(dict(node.keywords), role, kind))
    if isinstance(node, dict):
        return {key: with_another(value, role, kind) for key, value in node.items()}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    changed = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name, None)
        if field.name == role or (role is None and field.name.startswith("linear_")):
            changed[field.name] = kind
        elif dataclasses.is_dataclass(value) or isinstance(value, functools.partial):
            changed[field.name] = with_another(value, role, kind)
    return dataclasses.replace(node, **changed)


def fused_refused(rank: int, size: int, how: str, artifact: Artifact | Path) -> tuple[str, bool]:
    """(what is said of a model with the fused kernel, whether nothing of it was replaced)."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        hf = tiny_models.build("llama")
        if how == "in place":
            gpt = with_transformer_engine(gpt_model(hf), True, "Inference")
            gpt.config.inference_fuse_tp_communication = True
            return said(lambda: lowbit.apply_to_megatron(gpt, artifact)), not kinds(gpt)
        config = megatron_model.transformer_config(hf.config)
        original = megatron_model.transformer_config

        def fused(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            made.inference_fuse_tp_communication = True
            return made

        megatron_model.transformer_config = fused
        try:
            return said(lambda: megatron_model.build(hf.config, spec=low_bit_spec(config, "W4A8", "Inference"))), True
        finally:
            megatron_model.transformer_config = original
