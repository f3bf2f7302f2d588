"""Families whose attention is code of their own: Q, K and V stay in full precision, and everybody says so."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from commands import run_here
from tiny_models import add_tokenizer, build, logits, make_artifact
from torch import nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

_SIZES = {"vocab_size": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OWN = {
    "bloom": transformers.BloomConfig(hidden_size=64, **_SIZES),
    "gptj": transformers.GPTJConfig(n_embd=64, rotary_dim=8, n_positions=64, **_SIZES),
    "codegen": transformers.CodeGenConfig(n_embd=64, rotary_dim=8, n_positions=64, **_SIZES),
}


def own(family: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(OWN[family]).eval()


@pytest.mark.parametrize("family", [*OWN, "llama", "gemma2", "phi3"])
def test_one_warning_names_a_family_that_keeps_q_k_and_v(family, caplog, monkeypatch):
    """The oracle: whether anything was quantized when the model attends."""
    model = own(family) if family in OWN else build(family)
    checkpoint = make_artifact(model, "W4A4").checkpoint
    artifact = Artifact(replace(checkpoint, attention_bits=4))  # as an artifact of an earlier version says
    seen = []
    quantize = attention.fake_quantize
    monkeypatch.setattr(attention, "fake_quantize", lambda x, **how: seen.append(how) or quantize(x, **how))
    with caplog.at_level(logging.WARNING, "megatron_lowbit"):
        logits(lowbit.apply_to_huggingface(model, artifact))
    told = [record.getMessage() for record in caplog.records]
    if family in OWN:
        assert not seen and len(told) == 1
        assert told[0].startswith(f"{family}: in 2 of 2 blocks") and "Q, K and V stay in full precision" in told[0]
    else:
        assert seen and not told


def test_an_artifact_does_not_promise_them(tmp_path, capsys, caplog):
    model = tmp_path / "model"
    sizes = {**_SIZES, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.GPTJConfig(n_embd=64, rotary_dim=8, n_positions=64, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    add_tokenizer(model)
    settings = ["weights.scheme=W4A4", "weights.attention=true", f"output_dir={tmp_path / 'out'}"]
    assert run_here("quantize", f"model={model}", *settings) == 0
    assert LowBitCheckpoint.load(tmp_path / "out").attention_bits == 16
    assert "linears in W4A4, " in capsys.readouterr().out and "gptj: in 2 of 2 blocks" in caplog.text
