"""Artifacts of scheme auto on every engine: linears of 2 to 8 bits in one model, fused ones and shards among them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import megatron_cases
import megatron_checkpoint_cases
import megatron_spec_cases
import pytest
import rank_cases
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_deepspeed, needs_megatron
from slow_cases import slow
from tiny_models import build, logits, make_artifact, mixed_bits, save_artifact

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.megatron_recipe import write_recipe
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

# 96 inputs of down_proj: whole bytes for each of four ranks in every number of bits.
CHANGES = {"intermediate_size": 96}
SCHEMES = ["autoA16", "autoA8", "autoA4"]


def artifact(scheme: str = "autoA8", tp_sizes: tuple[int, ...] = ()) -> Artifact:
    hf = build("llama", **CHANGES)
    return Artifact(mixed_bits(hf, scheme), make_artifact(hf, tp_sizes=tp_sizes).plans)


def on_hugging_face(given: Artifact | Path, virtual_tp: int = 1, ids: torch.Tensor | None = None) -> torch.Tensor:
    return logits(lowbit.apply_to_huggingface(build("llama", **CHANGES), given, virtual_tp), ids)


def rounded_by_hand(checkpoint: LowBitCheckpoint) -> torch.Tensor:
    """Logits of the plain model with the weights that the codes stand for."""
    model = build("llama", **CHANGES)
    for name, weight in checkpoint.linears.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    return logits(model)


def test_every_linear_has_its_own_bits():
    """And the weights that they stand for are what it multiplies with: 1e-5 of float32 sums in another order."""
    checkpoint = mixed_bits(build("llama", **CHANGES), "autoA16")
    assert set(checkpoint.allocation.bits.values()) == set(range(2, 9))
    model = lowbit.apply_to_huggingface(build("llama", **CHANGES), Artifact(checkpoint))
    found = {m.weight_bits for m in model.modules() if isinstance(m, QuantLinear)}
    assert found == set(range(2, 9)) and "W3A16" in repr(model)
    expected = rounded_by_hand(checkpoint)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_virtual_ranks_answer_alike(scheme):
    given = artifact(scheme)
    one = on_hugging_face(given)
    for size in (2, 4):
        assert_equal_but_for_flips(on_hugging_face(given, size), one, windows=1 / 4, flip=0.5)


def test_saved_and_loaded(tmp_path):
    """By the artifact, and by save_pretrained of a patched model."""
    given = artifact()
    folder = save_artifact(given, tmp_path / "artifact")
    again = LowBitCheckpoint.load(folder)
    assert again.allocation == given.checkpoint.allocation and again.scheme_name == "autoA8"
    assert again.linear_bytes() == given.checkpoint.linear_bytes() and again.ideal_bytes() <= again.linear_bytes()
    model = lowbit.apply_to_huggingface(build("llama", **CHANGES), folder)
    model.save_pretrained(tmp_path / "saved")
    saved = LowBitCheckpoint.load(tmp_path / "saved")
    assert saved.allocation == again.allocation
    assert torch.equal(on_hugging_face(tmp_path / "saved"), on_hugging_face(given))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@needs_deepspeed
@pytest.mark.parametrize("scheme", SCHEMES)
def test_deepspeed(two_ranks, tmp_path, scheme):
    hf = build("llama")
    given = Artifact(mixed_bits(hf, scheme), make_artifact(hf, tp_sizes=(2,)).plans)
    folder = save_artifact(given, tmp_path / "artifact")
    expected = logits(lowbit.apply_to_huggingface(hf, folder, 2))
    for results in two_ranks.run(rank_cases.deepspeed_logits, "llama", {"auto": (folder, None)}):
        assert_equal_but_for_flips(results["auto"], expected, windows=1 / 4, flip=0.5)
        assert (results["auto"] - results["unpatched"]).abs().max() > 1e-3


@needs_megatron
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), slow(2, False), (2, True), slow(4, True)])
def test_megatron(pool_of, size, sequence_parallel):
    given = {scheme: (artifact(scheme, () if size == 1 else (size,)), None) for scheme in SCHEMES}
    for results in pool_of(size).run(megatron_cases.applied, "llama", sequence_parallel, given, CHANGES):
        for scheme, (made, _) in given.items():
            expected = on_hugging_face(made, size, megatron_cases.token_ids())
            assert_equal_but_for_flips(results[scheme], expected, windows=1 / 4, flip=0.5)
        assert torch.equal(results["removed"], results["unpatched"])


@needs_megatron
@pytest.mark.parametrize("size", (1, slow(2), slow(4)))
def test_megatron_checkpoints(pool_of, tmp_path, size):
    """Layers differ in their rows' bytes, so they are stored one by one; read at another size."""
    build("llama", **CHANGES).save_pretrained(tmp_path / "model")
    job = tmp_path / "model", save_artifact(artifact("autoA8"), tmp_path / "artifact"), tmp_path / "checkpoint"
    pool_of(2).run(megatron_checkpoint_cases.save, 2, 1, [job])
    for results in pool_of(size).run(megatron_checkpoint_cases.load, size, 1, {"auto": job}):
        outcome = results["auto"]
        assert outcome["differing"] == [] and outcome["traits"] == [] and outcome["logits_equal"], outcome


@needs_megatron
@pytest.mark.parametrize("size", (1, 2))
def test_the_recipe_rounds_to_the_artifact(pool_of, tmp_path, size):
    """Read by Megatron's own loader, into a model of our spec: the same codes and scales in every layer."""
    given = artifact("autoA8")
    write_recipe(given.checkpoint, WeightsConfig(scheme="autoA8", budget=5), tmp_path)
    path = str(tmp_path / "quantization_recipe.yaml")
    for results in pool_of(size).run(megatron_spec_cases.from_recipe_file, path, given):
        assert len(results["rounded"]) == len(results["applied"]) == 8
        for key, expected in results["applied"].items():
            found = results["rounded"][key]
            assert found["settings"] == expected["settings"], key
            for leaf in ("packed_weight", "scale", "zero_point"):
                assert torch.equal(found[leaf], expected[leaf]), (key, leaf)


@needs_megatron
def test_parts_of_other_bits_do_not_fuse(one_rank):
    """An artifact that was put together otherwise: q in other bits than k and v."""
    checkpoint, other = mixed_bits(build("llama", **CHANGES)), build("llama", **CHANGES)
    name = "model.layers.0.self_attn.q_proj"
    weight = type(checkpoint.linears[name]).from_float(other.get_submodule(name).weight, 7)
    bits = {**checkpoint.allocation.bits, name: 7}
    broken = replace(
        checkpoint,
        linears={**checkpoint.linears, name: weight},
        allocation=replace(checkpoint.allocation, bits=bits),
    )
    (messages,) = one_rank.run(megatron_cases.refused, "llama", {"broken": Artifact(broken)}, CHANGES)
    assert "have other widths, groups or bits" in messages["broken"]


def test_families_without_megatrons_names_get_no_recipe(tmp_path):
    """A recipe that named none of the model's linears would leave it in full precision."""
    checkpoint = mixed_bits(build("llama", **CHANGES))
    names = {name: name.replace("self_attn", "attention") for name in checkpoint.linears}
    linears = {names[name]: weight for name, weight in checkpoint.linears.items()}
    write_recipe(replace(checkpoint, linears=linears), WeightsConfig(scheme="autoA8", budget=5), tmp_path)
    assert not list(tmp_path.iterdir())
    write_recipe(mixed_bits(tiny_models.build("qwen2_moe")), WeightsConfig(scheme="autoA8", budget=5), tmp_path)
    written = (tmp_path / "quantization_recipe.yaml").read_text()
    assert "decoder.layers.1.mlp.shared_experts.linear_fc2" in written
    groups = tiny_models.build("phi3")
    write_recipe(mixed_bits(groups), WeightsConfig(scheme="autoA8", budget=5), tmp_path)
    assert "linear_qkv" in (tmp_path / "quantization_recipe.yaml").read_text(), "fused in Hugging Face too"
