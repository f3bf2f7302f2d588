"""Copies, pickles and saved folders of a patched model: each is right by itself, and so is what remains."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from commands import run_here
from reassembled_models import reassembled
from tiny_models import build, embedded_folder, logits, make_artifact
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model


def full_artifact(model: nn.Module) -> Artifact:
    """W4A4 linears, quantized attention, reassembled norms and a plan for two ranks."""
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    weights = WeightsConfig(scheme="W4A4", attention=True)
    checkpoint = quantize_model(model, linears, weights, huggingface.fingerprint(model))
    return reassembled(model, Artifact(checkpoint, make_artifact(model, tp_sizes=(2,)).plans))


def deep_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [deep_copy, pickled, torch_saved]


@pytest.mark.parametrize("first", ["the copy", "the original"])
@pytest.mark.parametrize("copied", COPIES)
def test_remove_from_one_leaves_the_other(copied, first):
    model = build("llama")
    plain, names = logits(model), [name for name, _ in model.named_modules()]
    lowbit.apply_to_huggingface(model, full_artifact(model), 2)
    patched = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), patched) and (patched - plain).abs().max() > 0.01
    one, other = (twin, model) if first == "the copy" else (model, twin)
    lowbit.remove(one)
    assert torch.equal(logits(one), plain) and [name for name, _ in one.named_modules()] == names
    assert torch.equal(logits(other), patched), "the other model lost its patch, or its attention"
    assert (one.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "lowbit_sdpa")
    lowbit.remove(other)
    assert torch.equal(logits(other), plain) and other.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for m in (one, other) for module in m.modules())


def test_a_pickle_is_read_by_a_process_that_patched_nothing(monkeypatch):
    """transformers does not know the quantizing attention there yet."""
    model = build("llama")
    lowbit.apply_to_huggingface(model, full_artifact(model), 2)
    patched, data = logits(model), pickle.dumps(model)
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "lowbit_sdpa")
    assert torch.equal(logits(pickle.loads(data)), patched)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_saves_what_it_is(copied, tmp_path):
    model = build("llama")
    lowbit.apply_to_huggingface(model, full_artifact(model), 2)
    patched, twin = logits(model), copied(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(1.5)
    lowbit.remove(model)
    twin.save_pretrained(tmp_path)
    embedding = Artifact.load(tmp_path).checkpoint.tensors["model.embed_tokens.weight"]
    assert torch.equal(embedding, 1.5 * model.model.embed_tokens.weight)
    assert not torch.equal(logits(twin), patched)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_another_attention_function_is_quantized_too(before):
    """set_attn_implementation, or the config's own field, while the model is patched."""
    other = {"sdpa": "eager", "eager": "sdpa"}[before]
    model = build("llama")
    model.set_attn_implementation(before)
    artifact = full_artifact(model)
    lowbit.apply_to_huggingface(model, artifact)
    expected = logits(model)
    unquantized = Artifact(without_quantized_attention(artifact), {})
    for choose in (model.set_attn_implementation, lambda name: setattr(model.config, "_attn_implementation", name)):
        choose(other)
        # Other sums in another order: a flipped 4-bit code at most, far from what 4-bit Q, K and V change.
        difference = (logits(model) - expected).norm() / expected.norm()
        assert model.config._attn_implementation == f"lowbit_{other}"
        assert difference < 0.05
        choose(before)
        assert torch.equal(logits(model), expected)
    model.set_attn_implementation(other)
    lowbit.remove(model)
    assert model.config._attn_implementation == other, "the choice made while patched is kept"
    without = logits(lowbit.apply_to_huggingface(model, unquantized))
    assert (without - expected).norm() / expected.norm() > 0.1, "attention in 4 bits would not show"


def without_quantized_attention(artifact: Artifact) -> LowBitCheckpoint:
    return dataclasses.replace(artifact.checkpoint, attention_bits=16)


# save_pretrained


@pytest.mark.parametrize("virtual_tp", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "llama with biases", "gemma2", "phi3"])
def test_a_saved_model_is_an_artifact(architecture, virtual_tp, tmp_path):
    model = build(architecture)
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A8", (2,)), virtual_tp)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True, max_shard_size="1MB")
    assert not list(tmp_path.glob("saved/model*.safetensors"))
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and "lowbit_" not in json.dumps(config)
    again = lowbit.apply_to_huggingface(build(architecture), tmp_path / "saved", virtual_tp)
    assert torch.equal(logits(again), expected)
    lowbit.remove(model)
    model.save_pretrained(tmp_path / "plain")  # transformers' own again
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model))


def test_commands_take_a_saved_model(tmp_path, capsys):
    """Without the full-precision model: config, generation config and tokenizer lie in the folder."""
    source = tmp_path / "model"
    shutil.copytree(embedded_folder(), source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    model.generation_config.repetition_penalty = 1.7
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A8"))
    model.save_pretrained(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompt = tokenizer("def read(", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    out = f"output_dir={tmp_path / 'out'}"
    assert run_here("generate", f"artifact={tmp_path / 'saved'}", "prompt=def read(", "max_new_tokens=12", out) == 0
    assert json.loads((tmp_path / "out/generate.json").read_text())["rows"][0]["tokens"] == expected.tolist()


def test_low_bit_communication_alone_saves_the_model_itself(tmp_path):
    model = build("llama")
    lowbit.apply_to_huggingface(model, make_artifact(model, tp_sizes=(2,)), 2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected) and patching.row_parallel_modules(model), "the patch is in place again"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(build("llama")))
    assert torch.equal(logits(lowbit.apply_to_huggingface(loaded, tmp_path, 2)), expected)


def test_plans_of_other_weights_are_not_saved(tmp_path, caplog):
    model = build("llama")
    lowbit.apply_to_huggingface(model, make_artifact(model, tp_sizes=(2,)), 2)
    with torch.no_grad():
        patching.row_parallel_modules(model)["model.layers.0.mlp.down_proj"].shards[0].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("comm_plan*")) and "no communication plan is saved" in caplog.text
    weight = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, 2 * build("llama").model.layers[0].mlp.down_proj.weight)


def test_what_an_artifact_does_not_have_is_refused(tmp_path):
    model = build("llama")
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A16"))
    for options in ({"push_to_hub": True}, {"variant": "fp16"}):
        with pytest.raises(LowBitError, match=rf"^save_pretrained: {next(iter(options))}=.*; leave it out$"):
            model.save_pretrained(tmp_path / "x", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(LowBitError, match=r"^cannot write to .*file"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "y", is_main_process=False)
    assert not Path(tmp_path / "y").exists()
