"""One artifact in a GPTModel and in a HybridModel, where a block is two layers, one of attention and one of an MLP."""

from __future__ import annotations

import dataclasses

import megatron_hybrid_cases as cases
import pytest
import torch
from commands import needs_megatron
from reassembled_models import reassembled
from slow_cases import slow
from tiny_models import build, make_artifact

pytestmark = needs_megatron

LAYOUTS = [(1, False), (2, False), (2, True)]


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_same_logits(pool_of, architecture, size, sequence_parallel):
    """To the last bit: the same layers run in the same order. Quantized attention looks a block's clips up, and norms
    that put out reassembled channels are a layer's own here."""
    hf = build(architecture)
    given = {"plan": make_artifact(hf, "none", (2,))} if size == 2 else {}
    given["W4A8"] = make_artifact(hf, "W4A8", (size,) if size > 1 else ())
    given["reassembled"] = reassembled(hf, make_artifact(hf, "W4A16"), merge=False)
    four = make_artifact(hf, "W4A4")
    given["attention"] = dataclasses.replace(four, checkpoint=dataclasses.replace(four.checkpoint, attention_bits=4))
    for results in pool_of(size).run(cases.compared, architecture, sequence_parallel, given):
        for name in ["unpatched", *given]:
            hybrid, gpt = results[name]
            assert torch.equal(hybrid, gpt), name
            assert name == "unpatched" or (hybrid - results["unpatched"][0]).abs().max() > 1e-3, name
            assert name == "unpatched" or results["kinds"][name][0] == results["kinds"][name][1]
        assert results["kinds"]["W4A8"][0] == {"LowBitColumnParallelLinear": 4, "LowBitRowParallelLinear": 4}
        assert results["kinds"]["reassembled"][0]["LowBitNorm"] == 4
        assert results["removed"] and results["exported"]


def test_the_same_tokens(two_ranks):
    """Both engines generate with it, as many tokens as with a GPTModel, and the same."""
    hf = build("llama")
    artifact = make_artifact(hf, "W4A8", (2,))
    for hybrid, gpt in two_ranks.run(cases.generated, artifact):
        assert hybrid == gpt and {len(tokens) for made in gpt.values() for tokens in made} == {6}


def test_layers_in_another_order_are_refused(one_rank):
    (line,) = one_rank.run(cases.other_pattern, make_artifact(build("llama"), "W4A8"))
    assert '"**--"' in line and '"*-*-"' in line and "\n" not in line


def test_pipeline_stages(two_ranks):
    """A block on each stage: its layers are numbered from the first one's, on every stage."""
    for results in two_ranks.run(cases.stages, make_artifact(build("llama"), "W4A8")):
        assert all(results.values()), results


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (1, 2)), slow((1, 2), (2, 1))])
def test_checkpoints(two_ranks, tmp_path, saved, loaded):
    """Full precision and packed weights, saved at one layout and loaded at another."""
    artifacts = {"full precision": None, "W4A8": make_artifact(build("llama"), "W4A8", (2,))}
    two_ranks.run(cases.saved, *saved, artifacts, tmp_path)
    options = (tmp_path / "W4A8" / "megatron_arguments.txt").read_text()
    assert "-pattern *-*-\n" in options and "rotary" not in options
    for results in two_ranks.run(cases.loaded, *loaded, artifacts, tmp_path):
        for name, found in results.items():
            assert found["differing"] == [] and found["traits"] == [] and found["logits_equal"], (name, found)


def test_a_checkpoint_of_the_other_kind_of_model(one_rank, tmp_path):
    """Its layers have other numbers: one line, and the model is as before."""
    (outcomes,) = one_rank.run(cases.exchanged, make_artifact(build("llama"), "W4A8"), tmp_path)
    for (line, unchanged), kind in zip(outcomes, ["GPTModel", "HybridModel"], strict=True):
        assert f"holds a {kind}" in line and "\n" not in line and unchanged
