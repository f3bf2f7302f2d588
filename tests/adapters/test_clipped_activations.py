"""Clipped activations of an artifact in the engines, against the quantizer written down again in float64."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import megatron_model_cases
import oracles
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io import files
from megatron_lowbit.kernels import decode_tokens
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import as_clip, attention_sites

TOKENS = 12
FLOAT32_NOISE = 1e-5  # of logits up to 10: 10 of their last places; a flipped 4-bit code moves them by 0.01 or more


def clipped(checkpoint: LowBitCheckpoint) -> LowBitCheckpoint:
    """The checkpoint with other ratios at every site; linears of one input share theirs."""
    rows = ("o_proj", "down_proj")
    inputs = {name: f"{name.rpartition('.')[0]} {name.endswith(rows)}" for name in checkpoint.linears}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.linears if "self_attn" in name)
    heads = [site for owner in owners for site in attention_sites(owner)]
    sites = list(dict.fromkeys([*inputs.values(), *heads]))
    ratios = {site: as_clip(0.95 - 0.02 * number, 0.6 + 0.02 * number) for number, site in enumerate(sites)}
    clipping = {name: ratios[site] for name, site in inputs.items()} | {site: ratios[site] for site in heads}
    return dataclasses.replace(checkpoint, clipping=clipping, attention_bits=checkpoint.scheme.act_bits)


def artifact_of(model: nn.Module, scheme: str = "W4A4") -> Artifact:
    plain = tiny_models.make_artifact(model, scheme)
    assert plain.checkpoint is not None
    return Artifact(clipped(plain.checkpoint), {})


def rounded(x: Tensor, bits: int, clip: tuple[float, float], groups: int = 1) -> Tensor:
    """Per row, and each of `groups` slices of it, by the independent float64 quantizer."""
    rows = x.detach().double().unflatten(-1, (groups, -1)).numpy()
    low, high = rows.min(-1, keepdims=True) * clip[0], rows.max(-1, keepdims=True) * clip[1]
    scale, zero = oracles.qparams(low, high, bits)
    return torch.from_numpy((oracles.quantize(rows, scale, zero, bits) - zero) * scale).flatten(-2)


def keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
    seen[name] = args[0].clone(), y.clone()


@torch.inference_mode()
def test_linears_by_hand():
    """Column- and row-parallel, at one and at two virtual ranks. Their outputs are of size 1: float32's rounding of the
    result and of the qparams moves them by 1e-6, a flipped code by 0.01."""
    artifact = artifact_of(tiny_models.build("mistral"))
    assert artifact.checkpoint is not None
    for size in (1, 2):
        model = lowbit.apply_to_huggingface(tiny_models.build("mistral"), artifact, virtual_tp=size)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                module.register_forward_hook(partial(keep, seen, name))
        model(tiny_models.token_ids(1, TOKENS))
        assert len(seen) == 2 * (5 + 2 * size)
        for name, (x, y) in seen.items():
            stem, _, shard = name.partition(".shards.")
            clip, weight = artifact.checkpoint.clipping[stem], artifact.checkpoint.linears[stem].dequantize()
            groups = model.get_submodule(name).act_groups
            if shard:
                weight = weight.chunk(size, 1)[int(shard)]
            x, y = x[:, 1:], y[:, 1:]  # the first token attends to itself: O's input lies on V's grid, full of ties
            wanted = rounded(x, 4, clip, groups) @ weight.double().T
            torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
            assert (rounded(x, 4, (1.0, 1.0), groups) @ weight.double().T - wanted).abs().max() > 0.01


@torch.inference_mode()
def test_heads_by_hand():
    """Q, K and V, each with its own ratios, and what a packed cache holds."""
    artifact = artifact_of(tiny_models.build("llama"))
    assert artifact.checkpoint is not None
    model = lowbit.apply_to_huggingface(tiny_models.build("llama"), artifact)
    owner = "model.layers.1.self_attn"
    clips = [artifact.checkpoint.clipping[site] for site in attention_sites(owner)]
    module = model.get_submodule(owner)
    q, k, v = (torch.randn(1, heads, TOKENS, 8, generator=torch.Generator().manual_seed(heads)) for heads in (8, 4, 5))
    v = v[:, :4]
    found, _ = attention._attention("sdpa", module, q, k, v, None, scaling=8**-0.5, is_causal=False)
    q8, k8, v8 = (rounded(t, 4, clip) for t, clip in zip((q, k, v), clips, strict=True))
    scores = q8.unflatten(1, (4, 2)) @ k8.unsqueeze(2).transpose(-1, -2) * 8**-0.5
    wanted = (scores.softmax(-1) @ v8.unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    cache = DynamicCache(config=model.config)
    values: list[Tensor] = []
    module.v_proj.register_forward_hook(lambda _, args, y: values.append(y))
    ids = tiny_models.token_ids(1, TOKENS)
    cached = model(ids, past_key_values=cache, use_cache=True).logits
    layer = cache.layers[1]
    decoded = decode_tokens(layer.values, 4, 8, torch.float32)  # type: ignore[arg-type]
    split = values[0].unflatten(-1, (-1, 8)).transpose(1, 2)
    torch.testing.assert_close(decoded.double(), rounded(split, 4, clips[2]), rtol=1e-5, atol=1e-5)
    assert (cached - model(ids, use_cache=False).logits).abs().max() < FLOAT32_NOISE
    lowbit.remove(model)
    again = lowbit.apply_to_huggingface(model, tiny_models.make_artifact(tiny_models.build("llama"), "W4A4"))
    assert not hasattr(again.get_submodule(owner), "_lowbit_clips")


@pytest.mark.parametrize("ranks", (1, 2))
def test_megatron_has_the_logits_of_hugging_face(ranks, request):
    """Fused q, k, v and gate, up; Q, K and V; real ranks."""
    pytest.importorskip("megatron.core")
    hf = tiny_models.build("llama")
    artifact = artifact_of(hf)
    plain = tiny_models.logits(lowbit.apply_to_huggingface(tiny_models.build("llama"), unclipped(artifact)), IDS)
    wanted = tiny_models.logits(lowbit.apply_to_huggingface(hf, artifact), IDS)
    pool = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    for found in pool.run(megatron_model_cases.artifact_logits, ranks, "llama", artifact):
        assert (found[..., : wanted.shape[-1]] - wanted).abs().max() < FLOAT32_NOISE
    assert (plain - wanted).abs().max() > 0.1


IDS = megatron_model_cases.token_ids(tiny_models.VOCAB)


def unclipped(artifact: Artifact) -> Artifact:
    assert artifact.checkpoint is not None
    return Artifact(dataclasses.replace(artifact.checkpoint, clipping={}), {})


def test_files(tmp_path):
    """The ratios come back to the bit; earlier versions, which do not know the format, refuse it; what cannot be is
    refused in one line."""
    artifact = artifact_of(tiny_models.build("llama"))
    assert artifact.checkpoint is not None
    artifact.checkpoint.save(tmp_path)
    assert LowBitCheckpoint.load(tmp_path).clipping == artifact.checkpoint.clipping
    with pytest.raises(LowBitError, match="format"):
        files.read_meta(tmp_path / "lowbit", formats=(files.WITH_HEAD, files.FORMAT))
    meta = json.loads((tmp_path / "lowbit.json").read_text())
    del meta[files.SEAL]
    strange = {
        "nothing is quantized there": {"model.layers.0.mlp:q_proj": [0.5, 0.5]},
        "model.layers.9.mlp.up_proj is clipped": {"model.layers.9.mlp.up_proj": [0.5, 0.5]},
        "less than or equal to 1": {"model.layers.0.mlp.up_proj": [0.5, 1.5]},
        "at least 2 items": {"model.layers.0.mlp.up_proj": [0.5]},
    }
    for said, clipping in strange.items():
        files.write_sealed(tmp_path / "lowbit.json", {**meta, "clipping": clipping})
        with pytest.raises(LowBitError, match=said) as error:
            LowBitCheckpoint.load(tmp_path)
        assert "\n" not in str(error.value)
