"""Mixtures of experts in Megatron-Core against the Hugging Face model on virtual ranks, with the same artifacts."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import megatron_cases
import megatron_experts_cases as cases
import oracles
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from tiny_models import build, make_artifact
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.experts import attach_experts
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import CommPlan
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

pytestmark = needs_megatron

# {name: (scheme of the linears, of the experts, plan)}. The plan sends the attention's sums in low bits.
ARTIFACTS = {
    "linears": ("W4A8", "none", False),
    "experts of W4A16": ("W4A16", "W4A16", False),
    "experts of W8A8 and a plan": ("W8A8", "W8A8", True),
}
SPECS = {"mixtral": "mixtral", "qwen3_moe": "qwen3_moe", "qwen2_moe": "mixtral"}
LAYOUTS = [(1, False), (2, False), (2, True)]


@functools.cache
def artifact(architecture: str, name: str) -> Artifact:
    scheme, experts, plan = ARTIFACTS[name]
    model = build(architecture)
    made = make_artifact(model, scheme, (2,) if plan else ())
    if experts == "none":
        return made
    assert made.checkpoint is not None
    return replace(
        made, checkpoint=attach_experts(model, made.checkpoint, WeightsConfig(scheme=scheme, experts=experts))
    )


@functools.cache
def reference(architecture: str, name: str, size: int) -> Tensor:
    model = lowbit.apply_to_huggingface(build(architecture), artifact(architecture, name), size)
    return tiny_models.logits(model, megatron_cases.token_ids())


@functools.cache
def names_at(size: int) -> list[str]:
    return [name for name, (_, _, plan) in ARTIFACTS.items() if size == 2 or not plan]


_runs: dict[tuple[str, int, bool], list[dict]] = {}


def runs(pool_of: Any, architecture: str, size: int, sequence_parallel: bool) -> list[dict]:
    """Every model runs once in every layout; the tests look at different parts of what came back."""
    key = (architecture, size, sequence_parallel)
    if key not in _runs:
        artifacts = {name: (artifact(architecture, name), None) for name in names_at(size)}
        _runs[key] = pool_of(size).run(megatron_cases.applied, architecture, sequence_parallel, artifacts)
    return _runs[key]


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", tiny_models.MIXTURES)
def test_logits_are_those_of_hugging_face(pool_of, architecture, size, sequence_parallel):
    """Experts shared by two ranks round their inner activations as one rank does. A window may hold a flipped code."""
    ranks = runs(pool_of, architecture, size, sequence_parallel)
    for name in names_at(size):
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), f"{name}: the ranks disagree"
        assert_equal_but_for_flips(ranks[0][name], reference(architecture, name, size))


@pytest.mark.parametrize("architecture", tiny_models.MIXTURES)
def test_artifacts_differ_and_are_removed(pool_of, architecture):
    """The comparison above would also pass if nothing were patched on either side."""
    for results in runs(pool_of, architecture, 2, False):
        names = ["unpatched", *ARTIFACTS]
        for number, first in enumerate(names):
            for second in names[number + 1 :]:
                assert (results[first] - results[second]).abs().max() > 1e-2 * results[first].abs().max()
        assert torch.equal(results["removed"], results["unpatched"]) and results["same_modules"]


@pytest.mark.parametrize("architecture", tiny_models.MIXTURES)
def test_experts_on_ranks_of_their_own(two_ranks, architecture):
    """Expert parallelism is the host's: a rank takes the codes of the experts that it has."""
    name = "experts of W8A8 and a plan"
    given = artifact(architecture, name)
    for results in two_ranks.run(cases.expert_parallel, architecture, given):
        assert results["experts"] == {"mixtral": 2, "qwen3_moe": 3, "qwen2_moe": 2}[architecture] and results["back"]
        assert_equal_but_for_flips(results["applied"], reference(architecture, name, 1))
        empty, bias = results["nothing to do"]
        assert empty.shape == (0, 64) and bias is None
        assert torch.equal(results["removed"], results["unpatched"])


@pytest.mark.parametrize("name", ["linears", "experts of W8A8 and a plan"])
def test_an_artifact_needs_no_full_precision_weights(two_ranks, name):
    """And with a plan one rank tells what it does not cover."""
    first, second = two_ranks.run(cases.alone, "mixtral", artifact("mixtral", name))
    for results in (first, second):
        assert torch.equal(results["alone"], results["applied"])
    assert len(first["told"]) == ARTIFACTS[name][2] and second["told"] == []
    assert all("token dispatcher" in line for line in first["told"])


@pytest.mark.parametrize("architecture", tiny_models.MIXTURES)
def test_a_ready_spec_takes_the_artifact_in(two_ranks, tmp_path, architecture):
    name = "experts of W8A8 and a plan"
    hf = build(architecture)
    hf.save_pretrained(tmp_path / "model")
    folder = tiny_models.save_artifact(artifact(architecture, name), tmp_path / "artifact")
    hf.config.save_pretrained(folder)
    count = "num_local_experts" if architecture == "mixtral" else "num_experts"
    build(architecture, **{count: 5}).config.save_pretrained(tmp_path / "five")
    for results in two_ranks.run(
        cases.by_spec, f"{SPECS[architecture]}_lowbit_spec", tmp_path / "model", tmp_path / "five", folder
    ):
        assert_equal_but_for_flips(results["logits"], reference(architecture, name, 2))
        assert results["refused"].startswith(f"--num-experts is 5 here and {getattr(hf.config, count)} in the artifact")


def without(checkpoint: LowBitCheckpoint, **weights: Any) -> Artifact:
    """The checkpoint with these experts in place of its own; None leaves a tensor out."""
    assert checkpoint.experts is not None
    kept = {name: weight for name, weight in (checkpoint.experts.weights | weights).items() if weight is not None}
    return Artifact(replace(checkpoint, experts=replace(checkpoint.experts, weights=kept)))


def test_what_does_not_fit_leaves_the_model_as_it_is(two_ranks):
    fitting, other = artifact("mixtral", "experts of W4A16"), build("mixtral")
    other.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] += 0.5
    config, plain = WeightsConfig(scheme="W4A8", experts="W4A16"), make_artifact(other, "W4A8").checkpoint
    whole, up = fitting.checkpoint, "model.layers.1.mlp.experts.gate_up_proj"
    artifacts = {
        "fewer": without(whole, **{name: weight.shard_out(0, 2) for name, weight in whole.experts.weights.items()}),
        "one of two": without(whole, **{up: None}),
        "values": Artifact(attach_experts(other, plain, config)),
        "dense": make_artifact(build("mistral", head_dim=8), "W4A8"),
    }
    expected = {
        "fewer": "mlp.experts.gate_up_proj is 4 x [192, 64] in the GPTModel and [384, 64] in the artifact",
        "one of two": f"the artifact has no quantized experts {up}",
        "values": "other values in 1 of",
        "dense": "belongs to another model",
        "export": "the model's linears are quantized; remove(model)",
        "config": "computed with moe_apply_probs_on_input=False, and the GPTModel has moe_apply_probs_on_input=True",
        "trained": "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight is being trained",
        "grouped": "decoder.layers.1.mlp.experts is a GroupedMLP, whose weights are not known here; build the model",
    }
    for said in two_ranks.run(cases.refused, "mixtral", fitting, artifacts):
        assert all(expected[what] in line and "\n" not in line for what, line in said.items()), said
        assert said.keys() == expected.keys()


def test_shared_experts_that_are_computed_otherwise(two_ranks):
    expected = {
        "overlap": "moe_shared_expert_overlap=True sends the sums of the shared expert apart from its linears",
        "linear": "quantized only in part.* decoder.layers.1.mlp.shared_experts.linear_fc1 .TheirColumnParallelLinear.",
        "fused": "decoder.layers.1.mlp.shared_experts is a FusedSharedExpertMLP, which does not call its linears",
        "overlap by the spec": "moe_shared_expert_overlap=True sends the sums of the shared expert apart",
    }
    for said in two_ranks.run(cases.refused_shared, artifact("qwen2_moe", "linears")):
        assert said.keys() == expected.keys()
        assert all(re.search(expected[what], line) and "\n" not in line for what, line in said.items()), said


def test_the_shared_expert_of_a_spec_is_rounded_on_load(two_ranks):
    for found in two_ranks.run(cases.rounded_on_load, "qwen2_moe"):
        assert_equal_but_for_flips(found, reference("qwen2_moe", "linears", 2))


def under_other_names(given: Any) -> Any:
    """An artifact, or a part of it, whose shared experts are called as DeepSeek and dots.llm1 call them."""
    if isinstance(given, str):
        return given.replace("mlp.shared_expert.", "mlp.shared_experts.")
    if isinstance(given, dict):
        return {under_other_names(key): under_other_names(value) for key, value in given.items()}
    parts = {
        Artifact: ("checkpoint", "plans"),
        LowBitCheckpoint: ("linears", "fingerprint"),
        CommPlan: ("sites", "fingerprint"),
    }.get(type(given), ())
    return replace(given, **{part: under_other_names(getattr(given, part)) for part in parts}) if parts else given


def test_shared_experts_under_other_names(two_ranks):
    """A GPTModel has one name for them: that of the artifact makes no difference."""
    given = artifact("qwen2_moe", "experts of W8A8 and a plan")
    artifacts = {"Qwen's": (given, None), "DeepSeek's": (under_other_names(given), None)}
    assert any("shared_experts" in name for name in artifacts["DeepSeek's"][0].plan(2).sites)
    for results in two_ranks.run(megatron_cases.applied, "qwen2_moe", False, artifacts):
        assert torch.equal(results["DeepSeek's"], results["Qwen's"])
        assert results["kinds"]["DeepSeek's"] == results["kinds"]["Qwen's"]


def test_the_shared_expert_is_in_codes(two_ranks):
    """Its linears are replaced, and its gate is not."""
    (name, *_) = ARTIFACTS
    for results in runs(lambda size: two_ranks, "qwen2_moe", 2, False):
        assert results["kinds"][name] == {"LowBitColumnParallelLinear": 4, "LowBitRowParallelLinear": 4}


def test_grouped_experts(two_ranks):
    """Transformer Engine's, by stand-ins: the same weights in other places."""
    first, second = two_ranks.run(cases.grouped, "mixtral", artifact("mixtral", "experts of W8A8 and a plan"))
    assert first == {"same": True, "back": True} and second == {"same": True, "back": None}


def test_the_gradient_is_that_of_the_weights_of_the_codes(two_ranks):
    for results in two_ranks.run(cases.gradients, "mixtral", artifact("mixtral", "experts of W4A16")):
        for found, expected in zip(results["codes"], results["weights"], strict=True):
            # float32 sums of 64, 48 and 96 terms in another order: as many roundings of the largest, at most.
            atol = (64 + 48 + 96) * oracles.EPS32 * expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)
