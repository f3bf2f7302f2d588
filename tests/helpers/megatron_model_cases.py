"""What workers of a RankPool run for test_megatron_model.py: `case(rank, size, *args)`.

Megatron is imported inside the cases, so that pools for other tests never wait for it.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_models
import torch
from megatron_cases import inputs
from megatron_groups import parallel
from rich.console import Console
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime import metrics


def token_ids(vocab: int) -> Tensor:
    return tiny_models.token_ids(8, 8, vocab=vocab)


@torch.no_grad()
def stage_logits(model: Any, vocab: int) -> Tensor:
    """[windows, tokens, padded vocabulary] on every rank; pipeline stages pass the hidden states on by hand."""
    ids, positions, future = inputs(token_ids(vocab))
    stages = model.pg_collection.pp
    stage, last = dist.get_rank(stages), dist.get_world_size(stages) - 1
    ranks = dist.get_process_group_ranks(stages)
    if stage > 0:
        hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
        dist.recv(hidden, ranks[stage - 1], group=stages)
        model.set_input_tensor(hidden)
    output = model(ids, positions, future, runtime_gather_output=True)
    if stage < last:
        dist.send(output.contiguous(), ranks[stage + 1], group=stages)
        output = torch.empty(*ids.shape, model.vocab_size)
    output = output.contiguous().clone()
    if last:
        dist.broadcast(output, ranks[last], group=stages)
    return output


def differing(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of tensors that are not the same bits, or only in one of two state dicts."""
    names = [
        name
        for name, tensor in expected.items()
        if isinstance(tensor, Tensor) and (name not in state or not torch.equal(state[name], tensor))
    ]
    return names + sorted(set(state) - set(expected))


def said(action: Any, *args: Any) -> str:
    """The LowBitError that a call raises, or "accepted"."""
    try:
        action(*args)
    except LowBitError as error:
        return str(error)
    return "accepted"


def own_head(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """A folder whose config ties the lm_head to the embedding and whose file holds another one."""
    from transformers import AutoConfig

    from megatron_lowbit.adapters.megatron import model as megatron_model

    config = AutoConfig.from_pretrained(folder)
    with parallel(size):
        refused = said(megatron_model.load_weights, megatron_model.build(config), folder, config)
        assert megatron_model.untie_(config, folder) is config
        model = megatron_model.load_weights(megatron_model.build(config), folder, config)
        return {"refused": refused, "logits": stage_logits(model, config.vocab_size)}


def loaded(rank: int, size: int, tp: int, pp: int, folder: Path, build: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The GPTModel of a tiny model's state dict and of its folder, and the way back."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(tp, pp):
        hf = tiny_models.build(build[0], **build[1])
        model = megatron_model.build(hf.config)
        assert megatron_model.load_weights(model, hf.state_dict(), hf.config) is model
        other = megatron_model.load_weights(megatron_model.build(hf.config), folder, hf.config)
        back = megatron_model.to_huggingface(model, hf.config)
        return {
            "logits": stage_logits(model, hf.config.vocab_size),
            "folder": differing(other.state_dict(), model.state_dict()),
            "shares": {name: tuple(tensor.shape) for name, tensor in model.named_parameters()},
            "back": None if back is None else differing(back.state_dict(), hf.state_dict()),
            "back_is_tied": back is not None and back.lm_head.weight is back.get_input_embeddings().weight,
            "back_logits": None if back is None else tiny_models.logits(back, token_ids(hf.config.vocab_size)),
        }


def one_rank_logits(rank: int, size: int, build: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        hf = tiny_models.build(build[0], **build[1])
        model = megatron_model.load_weights(megatron_model.build(hf.config), hf.state_dict(), hf.config)
        return {"logits": stage_logits(model, hf.config.vocab_size), "context": model.max_sequence_length}


def refused_builds(rank: int, size: int, tp: int, pp: int, configs: dict[str, Any]) -> dict[str, str]:
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(tp, pp):
        return {name: said(megatron_model.build, config) for name, config in configs.items()}


def contexts(rank: int, size: int, configs: list[Any]) -> list[int]:
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        return [megatron_model.context_length(config) for config in configs]


def refused_weights(rank: int, size: int, architecture: str, sources: dict[str, Any]) -> dict[str, str]:
    """What load_weights says to state dicts and folders."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        config = tiny_models.build(architecture).config
        model = megatron_model.build(config)
        return {name: said(megatron_model.load_weights, model, source, config) for name, source in sources.items()}


def from_checkpoint(
    rank: int, size: int, tp: int, pp: int, architecture: str, artifacts: dict[str, Any]
) -> dict[str, Any]:
    """A model without weights that loads an artifact, and one that had the full-precision weights first."""
    import megatron_lowbit as lowbit
    from megatron_lowbit.adapters.megatron import model as megatron_model

    results: dict[str, Any] = {}
    with parallel(tp, pp):
        hf = tiny_models.build(architecture)
        patched = megatron_model.load_weights(megatron_model.build(hf.config), hf.state_dict(), hf.config)
        before = stage_logits(patched, hf.config.vocab_size)
        for name, artifact in artifacts.items():
            lowbit.apply_to_megatron(patched, artifact)
            empty = megatron_model.build(hf.config)
            for parameter in empty.parameters():
                parameter.data.fill_(float("nan"))  # whatever is not loaded shows
            assert megatron_model.load_checkpoint(empty, artifact, hf.config) is empty
            logits = stage_logits(empty, hf.config.vocab_size)
            results[name] = {
                "differing": differing(empty.state_dict(), patched.state_dict()),
                "logits_equal": torch.equal(logits, stage_logits(patched, hf.config.vocab_size)),
                "changed": (logits - before)[..., : hf.config.vocab_size].abs().max().item(),
            }
        return results


def checkpoint_refusals(rank: int, size: int, artifacts: dict[str, Artifact]) -> dict[str, str]:
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        config = tiny_models.build("llama").config
        model = megatron_model.build(config)
        return {name: said(megatron_model.load_checkpoint, model, a, config) for name, a in artifacts.items()}


def by_mbridge(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """{name: tensors of this rank, loaded by mbridge} against ours, from one Hugging Face folder."""
    import mbridge
    from transformers import AutoConfig

    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        config = AutoConfig.from_pretrained(folder)
        bridge = mbridge.AutoBridge.from_config(config, dtype=torch.float32)
        layer = "model.layers.{layer_number}."
        # Its own names are those of Transformer Engine's layers, which hold the norms.
        norms = {"input_layernorm.weight": [layer + "input_layernorm.weight"]}
        mlp = {"pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"]}
        bridge._OTHER_MAPPING = bridge._OTHER_MAPPING | norms
        bridge._MLP_MAPPING = bridge._MLP_MAPPING | mlp
        theirs, ours = megatron_model.build(config), megatron_model.build(config)
        for parameter in theirs.parameters():
            parameter.data.fill_(float("nan"))
        with torch.no_grad():
            bridge.load_weights([theirs], str(folder))
        megatron_model.load_weights(ours, folder, config)
        return {
            "differing": differing(dict(ours.named_parameters()), dict(theirs.named_parameters())),
            "names": sorted(name for name, _ in ours.named_parameters()),
        }


def artifact_logits(rank: int, size: int, tp: int, architecture: str, artifact: Artifact) -> Tensor:
    """Logits of a tiny model that an artifact was put into."""
    import megatron_lowbit as lowbit
    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(tp):
        hf = tiny_models.build(architecture)
        model = megatron_model.load_weights(megatron_model.build(hf.config), hf.state_dict(), hf.config)
        lowbit.apply_to_megatron(model, artifact)
        return stage_logits(model, hf.config.vocab_size)


def initialized_again(rank: int, size: int) -> dict[str, Any]:
    """What the engine's initialize does in a process where Megatron is initialized already."""
    from megatron.core import parallel_state

    from megatron_lowbit.adapters.megatron import model as megatron_model

    with parallel(size):
        before = parallel_state.get_tensor_model_parallel_group()
        megatron_model.initialize(size, 1, 0)
        kept = parallel_state.get_tensor_model_parallel_group() is before
        return {"kept": kept, "refused": said(megatron_model.initialize, 1, size, 0)}


def bars(rank: int, size: int) -> str:
    """What a terminal gets while weights are loaded and taken back."""
    from megatron_lowbit.adapters.megatron import model as megatron_model

    text = io.StringIO()
    console = partial(Console, file=text, force_terminal=True, width=80)
    with parallel(size), mock.patch.object(metrics, "Console", lambda stderr: console()):
        hf = tiny_models.build("llama")
        model = megatron_model.load_weights(megatron_model.build(hf.config), hf.state_dict(), hf.config)
        megatron_model.to_huggingface(model, hf.config)
    return text.getvalue()
