"""A full-precision checkpoint into a GPTModel of a low-bit spec: rounded on the way in, each rank its own share.

The codes are those of rounding.quantize_model on the whole Hugging Face model, put in Megatron's order by loops.
"""

from __future__ import annotations

from typing import Any

import megatron_spec_cases
import oracles
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from megatron_cases import token_ids
from tiny_models import build, make_artifact
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.kernels import unpack_bits
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron

# 172 inputs of llama's linear_fc2 are 43 per rank of four: the ranks' codes begin inside a byte of the whole row.
CASES = {
    "W4A8": ("llama", WeightsConfig(scheme="W4A8")),
    "groups": ("mistral", WeightsConfig(scheme="W4A4", group_size=8, zero_point="real")),
    "symmetric groups": ("qwen2", WeightsConfig(scheme="W4A16", group_size=8, symmetric=True)),
    "symmetric, fused": ("phi3", WeightsConfig(scheme="W8A8", symmetric=True, shard_groups=4)),
    "W6A6": ("llama with biases", WeightsConfig(scheme="W6A6", zero_point="real")),
}
SEPARATE = {
    "linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "linear_proj": ["self_attn.o_proj"],
    "linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "linear_fc2": ["mlp.down_proj"],
}
FUSED = SEPARATE | {"linear_qkv": ["self_attn.qkv_proj"], "linear_fc1": ["mlp.gate_up_proj"]}


def rounded(architecture: str, weights: WeightsConfig) -> LowBitCheckpoint:
    model = build(architecture)
    found = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    return quantize_model(model, found, weights, huggingface.fingerprint(model))


def expected_share(
    architecture: str, checkpoint: LowBitCheckpoint, layer: int, role: str, rank: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero_point) of one rank's share of a fused linear."""
    names = (FUSED if architecture == "phi3" else SEPARATE)[role]
    linears = [checkpoint.linears[f"model.layers.{layer}.{name}"] for name in names]
    tensors = [torch.cat(parts) for parts in zip(*((w.codes(), w.scale, w.zero_point) for w in linears), strict=True)]
    config = build(architecture).config
    if role in ("linear_proj", "linear_fc2"):
        groups = tensors[1].shape[1]
        codes, scale, zero = (
            t.chunk(size, 1)[rank] if number == 0 or groups > 1 else t for number, t in enumerate(tensors)
        )
        return codes, scale, zero
    if role == "linear_qkv":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        order = oracles.fused_qkv_rows(config.num_attention_heads, config.num_key_value_heads, head_dim)
    else:
        order = oracles.fused_gate_up_rows(config.intermediate_size, size)
    share = len(order) // size
    codes, scale, zero = (t[order[rank * share : (rank + 1) * share]] for t in tensors)
    return codes, scale, zero


def assert_shares(architecture: str, weights: WeightsConfig, ranks: list[dict[str, Any]]) -> None:
    checkpoint, size = rounded(architecture, weights), len(ranks)
    for rank, results in enumerate(ranks):
        assert len(results["linears"]) == 8
        for (layer, role), found in results["linears"].items():
            codes, scale, zero = expected_share(architecture, checkpoint, layer, role, rank, size)
            row, inputs = role in ("linear_proj", "linear_fc2"), codes.shape[1]
            scheme = checkpoint.scheme
            per_rank = checkpoint.shard_groups // size if row else 1
            if architecture == "llama" and role == "linear_fc2":
                per_rank = 4 // size  # 8 slices do not divide 172 inputs, 4 do
            assert found["settings"] == (scheme.weight_bits, scheme.act_bits, per_rank, inputs), role
            assert torch.equal(unpack_bits(found["packed_weight"], scheme.weight_bits, inputs), codes), role
            assert torch.equal(found["scale"], scale) and torch.equal(found["zero_point"], zero), role


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_whole_model(pool_of, case, size):
    architecture, weights = CASES[case]
    ranks = pool_of(size).run(megatron_spec_cases.loaded, architecture, weights, "load_state_dict")
    assert_shares(architecture, weights, ranks)
    if size < 4:  # at four, a stock all-reduce of bf16 adds in its own order
        hf = lowbit.apply_to_huggingface(build(architecture), Artifact(rounded(architecture, weights)), size)
        expected = tiny_models.logits(hf, token_ids())
        assert_equal_but_for_flips(ranks[0]["logits"], expected, windows=1 / 4, flip=0.5)


@pytest.mark.parametrize("case", ["W4A8", "symmetric, fused"])
def test_hugging_face_weights_are_rounded_too(two_ranks, case):
    """load_weights copies tensors itself: whichever way they come, a layer with a scheme rounds them."""
    architecture, weights = CASES[case]
    assert_shares(
        architecture, weights, two_ranks.run(megatron_spec_cases.loaded, architecture, weights, "load_weights")
    )


def test_sequence_parallelism_rounds_alike(two_ranks):
    architecture, weights = CASES["W4A8"]
    ranks = two_ranks.run(megatron_spec_cases.loaded, architecture, weights, "load_state_dict", True)
    assert_shares(architecture, weights, ranks)


def test_a_state_dict_in_pieces(one_rank):
    """Rounding waits for the weight: before it there is only what memory held."""
    (results,) = one_rank.run(megatron_spec_cases.partial_load)
    assert results["after one"] == {0: True, 1: False} and results["equal"]


def test_plans_over_a_rounded_model(two_ranks):
    """What remains of it for an artifact: its communication. Refused where the weights were others before rounding."""
    model = build("llama")
    both, plan = make_artifact(model, "W4A8", (2,)), make_artifact(model, "none", (2,))
    tuned = build("llama")
    tuned.model.layers[1].mlp.gate_proj.weight.data[0, 0] += 1.0
    lowbit.apply_to_huggingface(model, both, 2)
    expected = tiny_models.logits(model, token_ids())
    for given in (plan, both):
        other = make_artifact(tuned, "none", (2,))
        for results in two_ranks.run(megatron_spec_cases.artifact_over_rounded, "W4A8", given, other):
            assert_equal_but_for_flips(results["applied"], expected, windows=1 / 4, flip=0.5)
            assert not torch.equal(results["applied"], results["rounded"])
            assert torch.equal(results["removed"], results["rounded"])
            assert "belongs to another model" in results["refused"] and "layers.1.mlp.gate_proj" in results["refused"]
            assert torch.equal(results["after"], results["rounded"])


# Recipes of Megatron (RecipeConfig), read by finish_init


def recipe(configs: dict[str, dict[str, Any]], **patterns: str) -> dict[str, Any]:
    """patterns: {name of a config: which layers}, the first that matches counts."""
    matchers = {
        name: {"config": name, "type": "glob", "pattern": pattern, "enabled": True}
        for name, pattern in patterns.items()
    }
    return {"configs": configs, "matchers": matchers}


def test_a_recipe_chooses_for_each_layer(two_ranks):
    """(weight bits, activation bits, slices, inputs) of the rank; None keeps Megatron's weight."""
    configs = {"four": {"scheme": "W4A4"}, "off": {"scheme": "none"}, "rest": {"scheme": "W8A8", "shard_groups": 4}}
    given = recipe(configs, four="*linear_fc1", off="*linear_proj", rest="*")
    for settings in two_ranks.run(megatron_spec_cases.by_recipe, given, None):
        for layer in range(2):
            assert {role: settings[layer, role] for role in SEPARATE} == {
                "linear_qkv": (8, 8, 1, 64),
                "linear_proj": None,
                "linear_fc1": (4, 4, 1, 64),
                "linear_fc2": (8, 8, 2, 48),
            }


def test_a_recipe_wins_over_the_specs_scheme(one_rank):
    """Layers that no matcher names keep the spec's."""
    given = recipe({"two": {"scheme": "W4A16"}, "off": {"scheme": "none"}}, two="*layers.0.mlp*", off="*layers.1.mlp*")
    (settings,) = one_rank.run(megatron_spec_cases.by_recipe, given, "W8A8")
    bits = {key: None if value is None else value[:2] for key, value in settings.items()}
    for role in SEPARATE:
        mlp = role in ("linear_fc1", "linear_fc2")
        assert bits[0, role] == ((4, 16) if mlp else (8, 8)) and bits[1, role] == (None if mlp else (8, 8))


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"scheme": "W4A8", "grup_size": 8}, "grup_size=8"),
        ({"group_size": 8}, "has no scheme; give scheme: "),
        ({"scheme": "W4A7"}, "scheme='W4A7'"),
        ({"scheme": "W4A8", "group_size": "many"}, "group_size='many'"),
        ({"scheme": "W4A8", "group_size": 5}, "group_size=5 does not divide"),
    ],
)
def test_bad_recipes(one_rank, config, fragment):
    """One line with the entry's name, the layer it is for, and the value."""
    (message,) = one_rank.run(megatron_spec_cases.by_recipe, recipe({"mine": config}, mine="*linear_fc2"), None)
    assert isinstance(message, str) and len(message.splitlines()) == 1 and fragment in message
    if config.get("group_size") != 5:  # known only when the weight is
        assert "recipe entry 'mine' (for decoder.layers.0.mlp.linear_fc2)" in message


def test_shard_groups_that_the_ranks_split(two_ranks):
    """3 slices, which 2 ranks cannot share: said when the checkpoint comes, by all ranks."""
    given = recipe({"mine": {"scheme": "W4A8", "shard_groups": 1}}, mine="*linear_fc2")
    for message in two_ranks.run(megatron_spec_cases.by_recipe, given, None):
        assert "1 activation shard groups of 96 inputs do not divide among tp=2" in message
        assert len(message.splitlines()) == 1
