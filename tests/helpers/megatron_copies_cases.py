"""Copies of patched GPTModels: what workers of a RankPool run for test_megatron_copies.py."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import pickle
from collections.abc import Iterator
from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, kinds, logits, module_ids
from megatron_groups import parallel
from torch import distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.artifact import Artifact


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Inside, copies share their process groups. Every module of Megatron holds one, and none can be copied."""
    before = copyreg.dispatch_table.copy()
    copyreg.pickle(dist.ProcessGroup, _by_name)  # type: ignore[arg-type]
    try:
        yield
    finally:
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(before)


def _by_name(group: Any) -> Any:
    return dist.distributed_c10d._resolve_process_group, (group.group_name,)


def copied(rank: int, size: int, sequence_parallel: bool, artifact: Artifact, first: str) -> dict[str, Any]:
    """Logits of a patched model and of its copy, before and after `remove` from one and then from the other."""
    with parallel(size), shared_groups():
        model = gpt_model(tiny_models.build("llama"), sequence_parallel)
        names, plain = list(module_ids(model)), logits(model)
        lowbit.apply_to_megatron(model, artifact)
        results: dict[str, Any] = {"plain": plain, "patched": logits(model), "kinds": kinds(model)}
        twin = copy.deepcopy(model)
        one, other = (twin, model) if first == "the copy" else (model, twin)
        results["twin"] = logits(twin)
        results["apart"] = not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
        lowbit.remove(one)
        results["removed"], results["left"] = logits(one), logits(other)
        results["kinds left"], results["kinds removed"] = kinds(other), kinds(one)
        with torch.no_grad():  # what one of them holds is its own
            for parameter in one.parameters():
                parameter.zero_()
        results["left by zeros"] = logits(other)
        lowbit.remove(other)
        results["both removed"] = logits(other)
        results["names"] = list(module_ids(one)) == names == list(module_ids(other))
        results["traces"] = [
            name
            for m in (one, other)
            for name, module in m.named_modules()
            if {"flash_decode_and_prefill", "_adjust_key_value_for_inference"} & vars(module).keys()
            or (name.endswith("core_attention") and module._forward_pre_hooks)
        ]
        return results


def generated_by_copies(rank: int, size: int, artifact: Artifact, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy tokens of a patched model, of its copy, and of the copy when the model has been removed and spoilt."""
    with parallel(size), shared_groups():
        from megatron_lowbit.adapters.megatron.inference import Request, generate

        model = gpt_model(tiny_models.build("llama"))

        def tokens(of: Any) -> list[list[int]]:
            return generate(of, [Request(prompt, 8) for prompt in prompts])

        plain = tokens(model)
        lowbit.apply_to_megatron(model, artifact)
        twin = copy.deepcopy(model)
        results = {"plain": plain, "patched": tokens(model), "twin": tokens(twin)}
        lowbit.remove(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        results["left"] = tokens(twin)
        results["removed"] = tokens(lowbit.remove(twin))
        return results


def rounded_and_copied(rank: int, size: int) -> dict[str, Any]:
    """A model whose spec has rounded it on load, and its copy, which can be loaded again."""
    with parallel(size), shared_groups():
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build("llama")
        spec = lowbit_spec(block_spec(megatron_model.transformer_config(hf.config)), "W4A8")
        state = gpt_model(hf).state_dict()
        before = megatron_model.build(hf.config, spec=spec)
        late = copy.deepcopy(before)
        before.load_state_dict(state)
        results = {"rounded": logits(before), "kept": late.decoder.layers[0].mlp.linear_fc1.weight is not None}
        results["twin"] = logits(copy.deepcopy(before))
        late.load_state_dict(state)
        results["late"] = logits(late)
        return results


def pickled(rank: int, size: int, artifact: Artifact) -> dict[str, Any]:
    """What pickling a GPTModel says, before and after the patch; and that the model is as it was."""

    def said(model: Any) -> str:
        try:
            pickle.dumps(model)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    with parallel(size):
        model = gpt_model(tiny_models.build("llama"))
        results: dict[str, Any] = {"plain": said(model)}
        lowbit.apply_to_megatron(model, artifact)
        before = logits(model)
        results["patched"] = said(model)
        state = pickle.loads(pickle.dumps(model.state_dict()))
        other = lowbit.apply_to_megatron(gpt_model(tiny_models.build("llama")), artifact)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                if tensor is not None:
                    tensor.zero_()
        results["spoilt"] = torch.equal(logits(other), before)
        other.load_state_dict(state)
        results["state dict"] = torch.equal(logits(other), before)
        results["kept"] = torch.equal(logits(model), before) and bool(patching.original_modules(model))
        return results
