"""apply_to_megatron on real ranks against the Hugging Face model on virtual ranks, with the same artifacts."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import megatron_cases
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import CALIBRATION_TEXT, needs_megatron, run_here
from megatron_artifacts import gather_artifact
from slow_cases import slow
from tiny_models import build, make_artifact
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron

ARCHITECTURES = ["llama", "llama with biases", "mistral", "qwen2", "qwen3", "phi3"]
LAYOUTS = [(1, False), slow(2, False), (2, True), (4, False), slow(4, True)]
WEIGHTS = {
    "W4A16": WeightsConfig(scheme="W4A16"),
    "W4A4": WeightsConfig(scheme="W4A4", zero_point="real"),
    "W8A8": WeightsConfig(scheme="W8A8"),
    "W4A8 in groups": WeightsConfig(scheme="W4A8", group_size=8, symmetric=True),
}
QLLM = [
    *("model=embedded", "weights.scheme=W4A4", "weights.shard_groups=4", f"calibration.data={CALIBRATION_TEXT}"),
    *("calibration.samples=2", "calibration.sequence_length=64", "comm.tp_sizes=[2, 4]", "correction.epochs=1"),
    *("correction.mode=branch", "reassembly.mode=fixed", "reassembly.expansion=0.05", "reassembly.o_proj=true"),
]


# Each in both layouts of a size; TP=1 has none to choose. Without a plan the partial sums travel in float32.
NAMES = {
    1: ["W4A16", "W4A4", "W8A8", "W4A8 in groups"],
    2: ["W4A16", "W4A4", "plan", "W8A8 + plan", "W4A8 in groups + plan"],
    4: ["W4A4", "plan", "W8A8 + plan", "W4A8 in groups + plan"],
}


def names_at(architecture: str, size: int) -> list[str]:
    """Groups of 8 do not divide llama's 172 inputs of down_proj."""
    return [name for name in NAMES[size] if architecture != "llama" or "groups" not in name]


@functools.cache
def plans(architecture: str) -> Artifact:
    return make_artifact(build(architecture), tp_sizes=(2, 4))


@functools.cache
def checkpoint(architecture: str, name: str) -> LowBitCheckpoint:
    model = build(architecture)
    linears = {fqn: linear for fqn, (_, linear) in huggingface.find_linears(model).items()}
    return quantize_model(model, linears, WEIGHTS[name], huggingface.fingerprint(model))


def artifact(architecture: str, name: str) -> Artifact:
    weights, _, plan = name.rpartition("plan")[0].rpartition(" + ") if "plan" in name else (name, "", None)
    return Artifact(
        checkpoint(architecture, weights) if weights else None, plans(architecture).plans if plan is not None else {}
    )


@functools.cache
def reference(architecture: str, name: str, size: int) -> Tensor:
    model = lowbit.apply_to_huggingface(build(architecture), artifact(architecture, name), size)
    return tiny_models.logits(model, megatron_cases.token_ids())


_runs: dict[tuple[str, int, bool], list[dict]] = {}


def runs(pool_of: Any, architecture: str, size: int, sequence_parallel: bool) -> list[dict]:
    """Every architecture runs once in every layout; the tests look at different parts of what came back."""
    key = (architecture, size, sequence_parallel)
    if key not in _runs:
        artifacts = {name: (artifact(architecture, name), None) for name in names_at(architecture, size)}
        _runs[key] = pool_of(size).run(megatron_cases.applied, architecture, sequence_parallel, artifacts)
    return _runs[key]


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_hugging_face(pool_of, architecture, size, sequence_parallel):
    """In every scheme, on every number of ranks. Two of eight windows may hold a flipped code: W4A4 has wide steps."""
    ranks = runs(pool_of, architecture, size, sequence_parallel)
    layers = len(build(architecture).model.layers)
    for name in names_at(architecture, size):
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), f"{name}: the ranks disagree"
        assert_equal_but_for_flips(ranks[0][name], reference(architecture, name, size), windows=1 / 4, flip=0.5)
        columns = {} if name == "plan" else {"LowBitColumnParallelLinear": 2 * layers}
        assert ranks[0]["kinds"][name] == {**columns, "LowBitRowParallelLinear": 2 * layers}


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_artifacts_differ(pool_of, architecture, size):
    """The comparison above would also pass if nothing were patched on either side."""
    (results, *_) = runs(pool_of, architecture, size, False)
    names = ["unpatched", *names_at(architecture, size)]
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert (results[first] - results[second]).abs().max() > 1e-3 * results[first].abs().max(), (first, second)


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_remove_restores_the_very_modules(pool_of, architecture, size, sequence_parallel):
    expected = tiny_models.logits(build(architecture), megatron_cases.token_ids())
    for results in runs(pool_of, architecture, size, sequence_parallel):
        # float32 sums of up to 172 products and of `size` ranks, in another order than Hugging Face's
        torch.testing.assert_close(results["unpatched"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(results["removed"], results["unpatched"]) and results["same_modules"]


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequence_parallelism_changes_no_bit(pool_of, architecture, size):
    """The low-bit reduce-scatter is a slice of the low-bit all-reduce, and all else is row by row."""
    (plain, *_), (scattered, *_) = (runs(pool_of, architecture, size, sp) for sp in (False, True))
    for name in names_at(architecture, size):
        if "plan" in name:
            assert torch.equal(plain[name], scattered[name]), name


def test_bf16_communication_of_four_ranks(four_ranks):
    """gloo's ring and VirtualReducer round three running sums each, in another order: 6 roundings of 2^-9 / sqrt(3) on
    average, 0.3 % of a site's output, at 4 sites 0.6 %. A quarter of it may have cancelled in the sum, and the model
    turns a relative error into one of its logits of about the same size; 5 % is allowed. (W4A16 itself moves them by
    50 %.)"""
    given = artifact("llama", "W4A16")
    hf = lowbit.apply_to_huggingface(build("llama"), given, 4, "bf16")
    expected = tiny_models.logits(hf, megatron_cases.token_ids())
    for results in four_ranks.run(megatron_cases.applied, "llama", True, {"bf16": (given, "bf16")}):
        assert (results["bf16"] - expected).norm() < 0.05 * expected.norm()
        assert (results["bf16"] - results["unpatched"]).norm() > 0.2 * expected.norm()


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_modes_of_communication(two_ranks, sequence_parallel):
    """An all-reduce of bf16 or of the model's own values although there is a plan; and, as in every adapter, an
    artifact that holds nothing, which leaves Megatron's sums as they are."""
    both, weights = artifact("llama", "W4A16 + plan"), artifact("llama", "W4A16")
    given = {
        "plan": (both, "one_shot"),
        "bf16": (both, "bf16"),
        "native": (both, "native"),
        "no plan": (weights, None),
        "nothing": (Artifact(), None),
    }
    for results in two_ranks.run(megatron_cases.applied, "llama", sequence_parallel, given):
        for name, (artifact_, mode) in given.items():
            hf = lowbit.apply_to_huggingface(build("llama"), artifact_, 2, mode)
            assert_equal_but_for_flips(results[name], tiny_models.logits(hf, megatron_cases.token_ids()))
        assert torch.equal(results["native"], results["no plan"])
        assert torch.equal(results["nothing"], results["unpatched"])
        for first, second in (("plan", "bf16"), ("bf16", "native"), ("native", "plan")):
            assert (results[first] - results[second]).abs().max() > 1e-3, (first, second)


@pytest.mark.parametrize("sequence_parallel", (False, True))
def test_bf16_models(two_ranks, sequence_parallel):
    """The dtype of real models. Norms, rotary embeddings and attention round to bf16 at other places than Hugging
    Face's, which flips codes: compared as a whole, at a quarter of what W4A8 and its plan do themselves. (An eighth
    was measured.)"""
    given = {"W4A8": (make_artifact(build("qwen3"), "W4A8", (2,)), None)}
    arguments = ("qwen3", sequence_parallel, given, None, torch.bfloat16)
    ranks = two_ranks.run(megatron_cases.applied, *arguments)
    hf = build("qwen3").bfloat16()
    plain = tiny_models.logits(hf, megatron_cases.token_ids()).float()
    lowbit.apply_to_huggingface(hf, given["W4A8"][0], 2)
    expected = tiny_models.logits(hf, megatron_cases.token_ids()).float()
    for results in ranks:
        assert results["W4A8"].dtype == torch.bfloat16 and torch.equal(results["W4A8"], ranks[0]["W4A8"])
        assert (results["W4A8"].float() - expected).norm() < 0.25 * (expected - plain).norm()
        assert (results["unpatched"].float() - plain).norm() < 0.05 * plain.norm()
        assert torch.equal(results["removed"], results["unpatched"]) and results["same_modules"]


def test_fewer_query_groups_than_ranks(four_ranks):
    """Two groups over four ranks: Megatron gives each rank half a group's rows, and so does the artifact."""
    model = build("llama", num_key_value_heads=2)
    given = make_artifact(model, "W8A8", (4,))
    ranks = four_ranks.run(megatron_cases.applied, "llama", False, {"W8A8": (given, None)}, {"num_key_value_heads": 2})
    expected = tiny_models.logits(model, megatron_cases.token_ids())
    patched = tiny_models.logits(lowbit.apply_to_huggingface(model, given, 4), megatron_cases.token_ids())
    for results in ranks:
        torch.testing.assert_close(results["unpatched"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert_equal_but_for_flips(results["W8A8"], patched)


@pytest.fixture(scope="module")
def qllm(tmp_path_factory):
    """Reassembled norms and inputs of o_proj and down_proj, low-rank branches, quantized attention, plans."""
    folder = tmp_path_factory.mktemp("qllm")
    assert run_here("quantize", *QLLM, f"output_dir={folder}") == 0
    loaded = Artifact.load(folder).checkpoint
    assert loaded is not None and loaded.low_rank and loaded.attention_bits == 4
    owners = {name.rpartition(".")[2] for name in loaded.reassembly}
    assert owners == {"input_layernorm", "post_attention_layernorm", "o_proj", "down_proj"}
    return folder


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_everything_that_qllm_makes(pool_of, qllm, size, sequence_parallel):
    """O's input lies on V's own 4-bit grid, full of ties that float32 noise decides: three of eight windows may move.
    An error in any part moves all of them."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_models.embedded_folder(), dtype=torch.float32).eval()
    ids = megatron_cases.token_ids(hf.config.vocab_size)
    unpatched = tiny_models.logits(hf, ids)
    expected = tiny_models.logits(lowbit.apply_to_huggingface(hf, qllm, size), ids)
    ranks = pool_of(size).run(megatron_cases.embedded, qllm, sequence_parallel)
    for results in ranks:
        assert torch.equal(results["patched"], ranks[0]["patched"])
        assert torch.equal(results["removed"], results["unpatched"])
        torch.testing.assert_close(results["unpatched"], unpatched, rtol=0, atol=1e-5 * unpatched.abs().max().item())
        assert_equal_but_for_flips(results["patched"], expected, windows=3 / 8, flip=0.5)
    assert (expected - unpatched).norm() > 0.1 * unpatched.norm()


@pytest.mark.parametrize("size", (2, slow(4)))
def test_low_bit_all_gather(pool_of, size):
    """The input of every column-parallel linear is rounded on its way, and travels in uint8."""
    given = gather_artifact((size,))
    for results in pool_of(size).run(megatron_cases.gathers, given):
        assert_equal_but_for_flips(results["patched"], results["reference"])
        low_bit = [call for call in results["calls"] if call[2] == "uint8"]
        # 64 features of which 4 travel in bf16; per layer two gathers of this rank's tokens and two scatters of all.
        row = 2 * 4 + 60 // 2
        tokens = 8 * megatron_cases.LENGTH
        # A share of the tokens for every rank in a scatter, a copy of the own ones for every rank in a gather.
        assert low_bit == [("all_to_all_single", row * tokens, "uint8")] * 8
        without = replace(given.plans[size], gathers={})
    (results, *_) = pool_of(size).run(
        megatron_cases.applied, "llama", True, {"no gather": (replace(given, plans={size: without}), None)}
    )
    assert (results["no gather"] - ranks_first(pool_of, given, size)).abs().max() > 1e-3


def ranks_first(pool_of: Any, given: Artifact, size: int) -> Tensor:
    return pool_of(size).run(megatron_cases.gathers, given)[0]["patched"]


def test_applying_again_and_what_is_accepted(two_ranks):
    """Twice is once; a wrapper and a list of chunks are as good as the model itself."""
    for results in two_ranks.run(megatron_cases.applied_again, artifact("llama", "W4A4 + plan")):
        for name in ("twice", "wrapped"):
            assert torch.equal(results[name], results["once"]), name
        assert all(torch.equal(chunk, results["once"]) for chunk in results["chunks"])
        assert results["removed"] and results["unwrapped"] and results["unlisted"]


def test_a_pipeline_stage_takes_its_own_layer(two_ranks):
    """Layers are counted over the stages, from 1."""
    first, second = two_ranks.run(megatron_cases.pipeline_stages, checkpoint("llama", "W4A16"))
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert first == {names[0]: True, names[1]: False} and second == {names[0]: False, names[1]: True}
