"""DeepSpeed engines on real ranks against Hugging Face models on virtual ranks, with the same artifact folders.

Phi-3 is not here: AutoTP of DeepSpeed 0.19.8 shards its fused qkv_proj wrongly, so that the unpatched forward fails.
"""

from __future__ import annotations

import dataclasses
import functools

import deepspeed_cases
import pytest
import rank_cases
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_deepspeed
from tiny_models import build, logits, make_artifact, make_stats, save_artifact
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.head import quantize_head
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.config import CommConfig
from megatron_lowbit.quant.head import first_tokens

pytestmark = needs_deepspeed

ARCHITECTURES = ["llama", "llama with biases", "mistral", "gemma2", "qwen2", "qwen3"]
SITES = [f"model.layers.{layer}.{site}" for layer in range(2) for site in ("mlp.down_proj", "self_attn.o_proj")]
VALUES = 8 * 6 * 64  # of one site's output in one forward pass of tiny_models.logits


class Runs:
    """Every architecture runs once on the pool; the tests look at different parts of what came back."""

    def __init__(self, folder):
        self.folder = folder

    @functools.cache  # noqa: B019 (lives as long as the module's tests)
    def artifacts(self, architecture: str, size: int) -> dict:
        made = {
            "hybrid": make_artifact(build(architecture), tp_sizes=(size,)),
            "W4A16": make_artifact(build(architecture), "W4A16"),
            "W4A8 + hybrid": make_artifact(build(architecture), "W4A8", (size,), "real"),
        }
        folders = {
            name: save_artifact(artifact, self.folder / f"{architecture}-{size}" / name)
            for name, artifact in made.items()
        }
        return {
            **{name: (folder, "bf16" if name == "W4A16" else None) for name, folder in folders.items()},
            "bf16": (None, "bf16"),
            "hybrid, but bf16 asked for": (folders["hybrid"], "bf16"),
        }

    @functools.cache  # noqa: B019
    def real(self, pool, architecture: str, size: int) -> list[dict]:
        return pool.run(rank_cases.deepspeed_logits, architecture, self.artifacts(architecture, size))

    def virtual(self, architecture: str, size: int, name: str) -> Tensor:
        folder, comm_mode = self.artifacts(architecture, size)[name]
        artifact = lowbit.Artifact() if folder is None else folder
        return logits(lowbit.apply_to_huggingface(build(architecture), artifact, size, comm_mode))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("artifacts"))


NAMES = ["hybrid", "W4A16", "W4A8 + hybrid", "bf16", "hybrid, but bf16 asked for"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_ranks_equal_virtual_ranks(two_ranks, runs, architecture, name):
    ranks = runs.real(two_ranks, architecture, 2)
    assert torch.equal(ranks[0][name], ranks[1][name]), "the ranks disagree"
    assert_equal_but_for_flips(ranks[0][name], runs.virtual(architecture, 2, name))
    assert [rank["rows"][name] for rank in ranks] == [SITES, SITES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_artifacts_differ_from_each_other_and_from_the_engine(two_ranks, runs, architecture):
    """The comparison above would also pass if nothing were patched on either side."""
    (results, _) = runs.real(two_ranks, architecture, 2)
    different = ["unpatched", "hybrid", "W4A16", "W4A8 + hybrid", "bf16"]
    for first in different:
        for second in different[different.index(first) + 1 :]:
            assert (results[first] - results[second]).abs().max() > 1e-3, (first, second)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_without_a_patch_and_after_remove(two_ranks, runs, architecture):
    for results in runs.real(two_ranks, architecture, 2):
        expected = logits(build(architecture))
        torch.testing.assert_close(results["unpatched"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(results["removed"], results["unpatched"]) and results["same_modules"]
        assert results["lm_head"] == {"LmHeadLinearAllreduce"}, "lm_head sums logits and stays as it is"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_on_the_wire(two_ranks, runs, architecture):
    """Four sites, then the logits; with k = 1 of 64 features in bf16, 34 bytes per token."""
    logits_call = ("all_reduce", 8 * 6 * tiny_models.VOCAB * 4, "float32")
    for results in runs.real(two_ranks, architecture, 2):
        for name in ("hybrid", "W4A8 + hybrid"):
            *sites, last = results["calls"][name]
            assert last == logits_call and [call[1:] for call in sites] == [(2 * 8 * 6 * (2 + 32), "uint8")] * 4
            assert {call[0] for call in sites} == {"all_to_all_single"}  # a copy for either rank
        for name in ("W4A16", "bf16", "hybrid, but bf16 asked for"):
            assert results["calls"][name] == [("all_reduce", 2 * VALUES, "bfloat16")] * 4 + [logits_call]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_output_projection(two_ranks, tmp_path, tied):
    """Every rank holds all of it, where AutoTP has given each a share, and computes the logits of one process."""
    model, ids = build("llama", tie_word_embeddings=tied), tiny_models.token_ids(2, 20)
    artifact = make_artifact(model, "W4A8", (2,))
    checkpoint = quantize_head(model, artifact.checkpoint, 8, first_tokens(ids, ids > 0))
    folder = save_artifact(dataclasses.replace(artifact, checkpoint=checkpoint), tmp_path)
    expected = logits(lowbit.apply_to_huggingface(model, folder, 2, deepspeed_cases.EVERY_SITE))
    for result in two_ranks.run(deepspeed_cases.quantized_head, folder, tied):
        assert_equal_but_for_flips(result["logits"], expected)
        assert result["kinds"] == ("LmHeadLinearAllreduce", "QuantHead") and result["removed"]
        assert "the first lm_head" in result["other"]


def test_bf16_engines(two_ranks, runs):
    """The dtype of real models."""
    artifacts = runs.artifacts("llama", 2)
    ranks = two_ranks.run(rank_cases.deepspeed_logits, "llama", artifacts, torch.bfloat16)
    for name, (folder, comm_mode) in artifacts.items():
        assert ranks[0][name].dtype == torch.bfloat16 and torch.equal(ranks[0][name], ranks[1][name])
        artifact = lowbit.Artifact() if folder is None else folder
        model = lowbit.apply_to_huggingface(build("llama").bfloat16(), artifact, 2, comm_mode)
        # DeepSpeed rounds each rank's share of the logits to bf16 before it adds them, and rounds the sum.
        assert_equal_but_for_flips(ranks[0][name].float(), logits(model).float(), rounding=3 * 2.0**-8)


@pytest.mark.parametrize("name", ["W4A8 + hybrid", "bf16"])
def test_four_ranks(four_ranks, runs, name):
    """down_proj has 172 inputs, 43 for each rank: a shard boundary inside a packed byte."""
    ranks = runs.real(four_ranks, "llama", 4)
    assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
    if name == "bf16":  # the order in which four ranks are added is the backend's own: compared as a whole
        reference = runs.virtual("llama", 4, name)
        assert (ranks[0][name] - reference).norm() < 0.02 * reference.norm()
    else:
        assert_equal_but_for_flips(ranks[0][name], runs.virtual("llama", 4, name))
    assert torch.equal(ranks[0]["removed"], ranks[0]["unpatched"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibration_on_real_ranks_equals_virtual_calibration(two_ranks, architecture):
    """Two ranks measure themselves, and each two of four virtual ranks."""
    ranks = two_ranks.run(rank_cases.deepspeed_calibration, architecture, (2, 4))
    expected = make_stats(build(architecture), (2, 4))
    for stats in ranks:
        assert stats.fingerprint == expected.fingerprint
        assert {size: sorted(sites) for size, sites in stats.ranges.items()} == dict.fromkeys((1, 2, 4), SITES)
        for size, sites in stats.ranges.items():
            for name, measured in sites.items():
                reference = expected.ranges[size][name]
                assert measured.min_vals.shape == (size, 64)
                # float32 sums of at most 172 products, in another order
                atol = 1e-5 * max(reference.min_vals.abs().max().item(), reference.max_vals.abs().max().item())
                torch.testing.assert_close(measured.min_vals, reference.min_vals, rtol=0, atol=atol)
                torch.testing.assert_close(measured.max_vals, reference.max_vals, rtol=0, atol=atol)
        for size in (2, 4):
            plan, reference = (
                build_plan(s, size, CommConfig(preset="paper", bf16_fraction=1 / 8)) for s in (stats, expected)
            )
            for name in SITES:
                assert len(plan.sites[name].first.bf16_idx) == 8
                assert torch.equal(plan.sites[name].first.bf16_idx, reference.sites[name].first.bf16_idx)
    for size, sites in ranks[0].ranges.items():
        for name, measured in sites.items():
            other = ranks[1].ranges[size][name]
            assert torch.equal(measured.min_vals, other.min_vals) and torch.equal(measured.max_vals, other.max_vals)


def test_calibration_of_a_size_that_the_ranks_cannot_share(two_ranks):
    for message in two_ranks.run(rank_cases.deepspeed_calibration_error, 3):
        assert message == "comm.tp_sizes: 3 is no multiple of the 2 ranks that calibrate"


@pytest.mark.parametrize("block", [0, 1])
def test_unknown_layers_are_named_and_left_alone(two_ranks, tmp_path, block):
    folder = save_artifact(make_artifact(build("llama"), "W4A16"), tmp_path)
    for results in two_ranks.run(rank_cases.deepspeed_unknown_layer, folder, block):
        assert results["refused"] == ""
        assert results["warnings"], "no warning"
        for kind, name in (("Tuned_LinearLayer", "gate_proj"), ("Tuned_LinearAllreduce", "down_proj")):
            assert f"{kind} (first: model.layers.{block}.mlp.{name})" in results["warnings"][0]
            assert results["types"][name] == kind
        assert results["types"]["up_proj"] == "QuantLinear"
        assert 0 < (results["after"] - results["before"]).norm() < 0.5 * results["before"].norm()


def test_uneven_shares_are_refused(two_ranks, tmp_path):
    """AutoTP's default grain of 64 splits 352 into 192 and 160."""
    model = build("llama", intermediate_size=352)
    folders = [
        save_artifact(make_artifact(model, "W4A16"), tmp_path / "weights"),
        save_artifact(make_artifact(model, tp_sizes=(2,)), tmp_path / "plan"),
        None,
    ]
    for messages in two_ranks.run(rank_cases.deepspeed_uneven, folders):
        for message in messages:
            assert "mlp." in message and "(192, 160)" in message and '"tp_grain_size": 1' in message, message
            assert len(message.splitlines()) == 1


def test_heads_that_the_ranks_cannot_share_are_named(two_ranks):
    """tp_grain_size was 1: it is the KV heads that AutoTP splits by."""
    for message in two_ranks.run(rank_cases.deepspeed_heads):
        assert "num_key_value_heads=1" in message and "grain" not in message, message


def test_artifacts_of_another_model_or_size_are_refused(two_ranks, tmp_path):
    tuned = build("llama")
    tuned.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1.0
    folders = [
        save_artifact(make_artifact(build("mistral"), "W4A8"), tmp_path / "other"),
        save_artifact(make_artifact(tuned, tp_sizes=(2,)), tmp_path / "tuned"),
        save_artifact(make_artifact(build("llama"), tp_sizes=(4,)), tmp_path / "size"),
    ]
    for other, retuned, size in two_ranks.run(rank_cases.deepspeed_refused, folders):
        assert "the checkpoint belongs to another model" in other and "'mistral' there, 'llama' here" in other
        assert "the communication plan belongs to another model (other values in 1 of 14 weights" in retuned
        assert "model.layers.1.mlp.down_proj" in retuned
        assert "no communication plan for tp_size 2 (there are [4])" in size


def test_all_ranks_generate_the_same_tokens(two_ranks, tmp_path):
    folder = save_artifact(make_artifact(build("llama"), "W4A8", (2,)), tmp_path)
    first, second = two_ranks.run(rank_cases.deepspeed_generate, folder, 8)
    model = lowbit.apply_to_huggingface(build("llama"), folder, 2)
    expected = model.generate(input_ids=tiny_models.token_ids(2, 5), max_new_tokens=8, do_sample=False)
    assert torch.equal(first, second) and torch.equal(first, expected)


def test_the_shared_memory_op_is_off(two_ranks):
    """It segfaults under torchrun and skips non-contiguous tensors, so it must not be what sums the logits either."""
    assert two_ranks.run(rank_cases.shared_memory_op) == [(False, None)] * 2
