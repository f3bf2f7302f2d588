"""apply_to_megatron with what does not fit: one line that names it, and a model that is as it was before."""

from __future__ import annotations

from dataclasses import replace

import megatron_cases
import pytest
from commands import needs_megatron
from tiny_models import build, make_artifact, save_artifact

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.kernels import pack_bits
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron


def rounded(weights: WeightsConfig, architecture: str = "llama", **changes: int) -> LowBitCheckpoint:
    model = build(architecture, **changes)
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    return quantize_model(model, linears, weights, huggingface.fingerprint(model))


def tuned_artifact(tp_sizes: tuple[int, ...], scheme: str = "none") -> Artifact:
    """Return an artifact of a llama of which one value of one linear is another."""
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1.0
    return make_artifact(model, scheme, tp_sizes)


def assert_refused(messages: dict[str, str], expected: dict[str, list[str]]) -> None:
    assert messages.keys() == expected.keys()
    for name, fragments in expected.items():
        assert len(messages[name].splitlines()) == 1, name
        for fragment in fragments:
            assert fragment in messages[name], f"{name}: {messages[name]}"


def lacking(artifact: Artifact, site: str) -> Artifact:
    """Without the plan's ranges of one site."""
    plans = {
        size: replace(plan, sites={name: value for name, value in plan.sites.items() if name != site})
        for size, plan in artifact.plans.items()
    }
    return replace(artifact, plans=plans)


def narrower(weight: QuantizedWeight) -> QuantizedWeight:
    """Without its last input."""
    codes = weight.codes()[:, :-1].contiguous()
    return replace(weight, packed_weight=pack_bits(codes, weight.num_bits), in_features=weight.in_features - 1)


def test_artifacts_that_do_not_fit_two_ranks(two_ranks):
    """Also as the first of a list of chunks. The first linear that differs is named, with both shapes."""
    both, block = make_artifact(build("llama"), "W4A8", (2, 4)), "model.layers"
    fewer = rounded(WeightsConfig(scheme="W4A8"))
    fewer.linears.pop(f"{block}.1.mlp.gate_proj")
    given = {
        "narrower MLP": Artifact(rounded(WeightsConfig(scheme="W4A8"), intermediate_size=96)),
        "fewer KV heads": Artifact(rounded(WeightsConfig(scheme="W4A8"), num_key_value_heads=2)),
        "wider heads": Artifact(rounded(WeightsConfig(scheme="W4A8"), head_dim=16)),
        "fused": Artifact(rounded(WeightsConfig(scheme="W4A8"), "phi3")),
        "more layers": Artifact(rounded(WeightsConfig(scheme="W4A8"), num_hidden_layers=3)),
        "plan of another width": make_artifact(build("llama", hidden_size=128), tp_sizes=(2,)),
        "no linear": Artifact(fewer),
        "other weights": tuned_artifact((), "W4A16"),
        "plan of other weights": tuned_artifact((2,)),
        "no plan": replace(both, plans={4: both.plans[4]}),
        "no site": lacking(both, f"{block}.1.self_attn.o_proj"),
        "split group": Artifact(rounded(WeightsConfig(scheme="W4A16", group_size=4))),
    }
    expected = {
        "narrower MLP": [f"{block}.0.mlp.gate_proj is [96, 64] in the artifact and [172, 64] in the GPTModel"],
        "fewer KV heads": [f"{block}.0.self_attn.k_proj is [16, 64] in the artifact and [32, 64] in the GPTModel"],
        "wider heads": [f"{block}.0.self_attn.q_proj is [128, 64] in the artifact and [64, 64] in the GPTModel"],
        "fused": [f"{block}.0.mlp.gate_up_proj is [192, 64] in the artifact and [344, 64] in the GPTModel"],
        "more layers": ["the artifact has 3 layers, the GPTModel 2"],
        "plan of another width": ["plan belongs to another model", "hidden_size 128 there, 64 here"],
        "no linear": [f"no quantized weight for {block}.1.mlp.gate_proj"],
        "other weights": ["the checkpoint belongs to another model", "1 of 14 weights", f"{block}.1.mlp.up_proj"],
        "plan of other weights": ["the communication plan belongs to another model", f"{block}.1.mlp.up_proj"],
        "no plan": ["no communication plan for tp_size 2 (there are [4])", "comm.tp_sizes=[2]"],
        "no site": [f"the communication plan has no ranges for {block}.1.self_attn.o_proj"],
        "split group": ["43 weight groups do not divide among 2 ranks", "weights.group_size"],
    }
    for messages in two_ranks.run(megatron_cases.refused, "llama", given):
        assert_refused(messages, expected)


def test_artifacts_that_do_not_fit_four_ranks(four_ranks):
    """Two shard groups over four ranks: each would quantize its tokens by ranges of its own."""
    given = {
        "shard groups": Artifact(rounded(WeightsConfig(scheme="W4A8", shard_groups=2), "qwen2")),
        "no plan": make_artifact(build("qwen2"), tp_sizes=(2,)),
    }
    expected = {
        "shard groups": ["self_attn.o_proj: 2 activation shard groups do not divide among tp=4", "shard_groups"],
        "no plan": ["no communication plan for tp_size 4 (there are [2])"],
    }
    for messages in four_ranks.run(megatron_cases.refused, "qwen2", given):
        assert_refused(messages, expected)


def test_one_bad_chunk_leaves_all_as_they_are(two_ranks):
    """What does not fit is found in the second chunk alone: its weights, its plan, its shard groups."""
    both, site = make_artifact(build("llama"), "W4A8", (2,)), "model.layers.1.mlp.down_proj"
    odd = replace(both.checkpoint, linears={**both.checkpoint.linears, site: narrower(both.checkpoint.linears[site])})
    given = {
        "weights": tuned_artifact((2,)),
        "site": lacking(both, site),
        "shape": replace(both, checkpoint=odd),
        "good": both,
    }
    for results in two_ranks.run(megatron_cases.refused_second_chunk, given):
        expected = {
            "weights": "layers.1.mlp.up_proj",
            "site": f"no ranges for {site}",
            "shape": f"{site} is [64, 171] in the artifact and [64, 172] in the GPTModel",
        }
        for name, fragment in expected.items():
            message, untouched = results[name]
            assert fragment in message and untouched, (name, message)
        assert results["good"] == ("accepted", False), "it would pass if nothing were ever patched"


def test_models_of_other_frameworks(one_rank):
    (messages,) = one_rank.run(megatron_cases.no_gpt_models, make_artifact(build("llama"), "W4A8"))
    assert messages == [
        f"{name} is no GPTModel of Megatron-Core: it has no decoder"
        for name in ("Linear", "LlamaForCausalLM", "Linear")
    ]


def test_folders_that_are_none(one_rank, tmp_path):
    """A folder is loaded first: its error is that of every adapter. A good one at last, so that this can pass."""
    (tmp_path / "empty").mkdir()
    good = save_artifact(make_artifact(build("llama"), "W4A8"), tmp_path / "good")
    given = {"missing": tmp_path / "nowhere", "empty": tmp_path / "empty", "good": good}
    (messages,) = one_rank.run(megatron_cases.refused_folders, given)
    assert "does not exist" in messages["missing"] and "holds no lowbit.json" in messages["empty"]
    assert messages["good"] == "accepted"


@pytest.mark.parametrize("scheme", ("W4A8", "none"))
def test_a_single_rank_needs_no_plan(one_rank, scheme):
    """Plans for other sizes are no reason to refuse: there is nobody to talk to."""
    artifact = make_artifact(build("llama"), scheme, (2,))
    (results,) = one_rank.run(megatron_cases.applied, "llama", False, {"given": (artifact, None)})
    assert results["kinds"]["given"]["LowBitRowParallelLinear"] == 4
