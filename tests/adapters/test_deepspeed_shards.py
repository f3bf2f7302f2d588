"""Every way into DeepSpeed's AutoTP, and every type of layer it makes, against Hugging Face models on virtual ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import deepspeed_shard_cases as cases
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_deepspeed
from rank_pool import RankPool

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.head import quantize_head
from megatron_lowbit.quant.head import first_tokens

pytestmark = needs_deepspeed


def spec(pattern: str, kind: str, shape: Any = None, dim: int = 0) -> dict[str, Any]:
    shaped = {} if shape is None else {"shape": shape, "partition_dim": dim}
    return {"patterns": [rf".*\.{pattern}\.weight$"], "partition_type": kind, **shaped}


def config(*specs: dict[str, Any]) -> dict[str, Any]:
    return {"partition_config": {"use_default_specs": False, "layer_specs": list(specs)}}


ATTENTION = (spec("[qkv]_proj", "column"), spec("o_proj", "row"))
GATE_UP = (spec("gate_up_proj", "column", [2, -1]), spec("down_proj", "row"))
HALVES = [48, 48]  # of an MLP of 96
# {name: (family, config, entry, settings, {type of layer: how many})}. 96 inputs of down_proj: 8 shard groups of 12.
WAYS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, int]]] = {
    "init_inference, gate_up": ("glm4", {}, "init_inference", {}, {"GateUpPack_LinearLayer": 2, "LinearAllreduce": 4}),
    "init_inference, qkv by head": ("gpt_neox", {}, "init_inference", {}, {"fused_LinearLayer": 2}),
    "init_inference, q k v": ("mpt", {}, "init_inference", {}, {"fused_LinearLayer": 2}),
    "init_inference, qkv in blocks": (
        "codegen",
        {"num_attention_heads": 8, "rotary_dim": 4},
        "init_inference",
        {},
        {"fused_LinearLayer": 2},
    ),
    "init_inference, shared Q and K": (
        "yuan",
        {},
        "init_inference",
        {},
        {"Yuan_LinearLayer": 2, "Yuan_LinearAllreduce": 2, "LinearAllreduce": 2},
    ),
    "initialize, tp_plan": ("llama", {}, "initialize", {}, {"LinearLayer": 11, "LinearAllreduce": 4}),
    "initialize, tp_plan, tied": (
        "gemma3_text",
        {},
        "initialize",
        {},
        {"LinearLayer": 10, "VocabParallelLinear": 1, "VocabParallelEmbedding": 1},
    ),
    "initialize, preset": ("qwen2", {}, "initialize", {"preset_model": "qwen2"}, {"LinearLayer": 10}),
    "initialize, heuristic": ("opt", {}, "initialize", {}, {"LinearLayer": 8, "LinearAllreduce": 4}),
    "initialize, gate_up": (
        "glm4",
        {},
        "initialize",
        config(*ATTENTION, *GATE_UP),
        {"SubParamLinearLayer": 2, "LinearLayer": 6, "LinearAllreduce": 4},
    ),
    "initialize, whole attention": (
        "phi3",
        {},
        "initialize",
        config(*GATE_UP),
        {"SubParamLinearLayer": 2, "LinearAllreduce": 2},
    ),
    "initialize, inputs in parts": (
        "llama",
        {},
        "initialize",
        config(
            *ATTENTION, spec("(gate|up)_proj", "column", [HALVES, -1]), spec("down_proj", "row", [-1, HALVES], dim=1)
        ),
        {"SubParamLinearLayer": 4, "SubParamLinearAllreduce": 2},
    ),
    "tp_model_init": ("llama", {}, "tp_model_init", {}, {"LinearLayer": 11, "LinearAllreduce": 4}),
    "ZeRO-3": ("llama", {"attention_bias": True, "mlp_bias": True}, "initialize", {"stage": 3}, {"LinearLayer": 11}),
}
NO_PLAN = ("init_inference, shared Q and K", "initialize, inputs in parts", "initialize, whole attention")


@pytest.fixture(scope="module")
def two():
    """A pool of its own: AutoTP of deepspeed.initialize leaves a process changed."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four():
    pool = RankPool(4)
    yield pool
    pool.close()


def saved(folder: Path, model: Any, scheme: str, tp_sizes: tuple[int, ...]) -> Path:
    return tiny_models.save_artifact(tiny_models.make_artifact(model, scheme, tp_sizes), folder)


def compare(pool: RankPool, pool_size: int, way: str, folder: Path) -> None:
    family, changes, entry, settings, host = WAYS[way]
    model = cases.build(family, **changes)
    if way in NO_PLAN:
        given = {"W4A8": (saved(folder / "weights", model, "W4A8", ()), "native"), "native": (None, "native")}
    else:
        both, plans = saved(folder / "both", model, "W4A8", (2,)), saved(folder / "plans", model, "none", (2,))
        name = "both" if settings.get("stage") == 3 else "both, in the module"
        given = {name: (both, None), "plans": (plans, None), "native": (None, "native")}
    expected = {"host": tiny_models.logits(model)}
    for name, (artifact, mode) in given.items():
        lowbit.apply_to_huggingface(model, artifact or lowbit.Artifact(), 2, mode or cases.EVERY_SITE)
        expected[name] = tiny_models.logits(model)
    first = next(iter(given))
    checkpoint = lowbit.Artifact.load(given[first][0]).checkpoint
    assert checkpoint is not None
    ranks = pool.run(cases.artifacts, family, changes, entry, settings, given)
    scale = expected["host"].abs().max().item()
    for results in ranks:
        assert results["host kinds"].items() >= host.items(), results["host kinds"]
        for name in ("host", "native"):  # sums of float32 in another order
            torch.testing.assert_close(results[name], expected[name], rtol=0, atol=1e-5 * scale)
        for name in given:
            assert_equal_but_for_flips(results[name], expected[name])
            assert torch.equal(results[name], ranks[0][name]), "the ranks disagree"
        kinds = results[f"{first} kinds"]
        assert kinds["QuantLinear"] == len(checkpoint.linears)  # each row-parallel linear holds one
        assert not kinds.keys() & {kind for kind in host if "Vocab" not in kind} - {"LinearLayer"}
        assert kinds.get("LinearLayer", 0) <= 1  # the output projection
        if way not in NO_PLAN:
            sent = [call for call in results["plans calls"] if call[2] == "uint8"]
            assert len(sent) == results["plans kinds"]["QuantRowParallelLinear"] == 4
        assert results["removed"] and results["warnings"] == []
        assert (results["host"] - results[first]).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][2] == "init_inference"])
def test_init_inference(two_ranks, tmp_path, way):
    compare(two_ranks, 2, way, tmp_path)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][2] != "init_inference"])
def test_initialize(two, tmp_path, way):
    compare(two, 2, way, tmp_path)


def test_zero3_over_two_pairs(four, tmp_path):
    """Two tensor-parallel ranks, each of whose weights two data-parallel ranks share out."""
    model = tiny_models.build("llama")
    folder = saved(tmp_path, model, "W4A8", (2,))
    expected = tiny_models.logits(lowbit.apply_to_huggingface(model, folder, 2, cases.EVERY_SITE))
    for results in four.run(cases.two_pairs, folder):
        assert results["empty"], "the weights are whole on every rank"
        assert_equal_but_for_flips(results["logits"], expected)
        assert results["removed"]


@pytest.mark.parametrize("stage", [0, 1])
def test_training_through_low_bit_sums(two, tmp_path, stage):
    plans = saved(tmp_path, tiny_models.build("llama"), "none", (2,))
    for results in two.run(cases.trained, plans, stage):
        assert results["low-bit kinds"]["QuantRowParallelLinear"] == 4
        host, ours = results["host"], results["low-bit"]
        assert host != ours and ours[-1] < ours[0] - 1 and abs(ours[0] - host[0]) < 0.2 * host[0]


def test_refusals_of_initialize(two, tmp_path):
    llama = tiny_models.build("llama")
    weights, plans = saved(tmp_path / "weights", llama, "W4A8", ()), saved(tmp_path / "plans", llama, "none", (2,))
    compiled = {"compile": {"deepcompile": True, "passes": ["autotp"]}}
    trained = {"stage": 1, "learning_rate": 1e-2}
    across = config(*ATTENTION, spec("(gate|up)_proj", "column", [-1, [32, 32]], dim=1), spec("down_proj", "row"))
    parts = WAYS["initialize, inputs in parts"][3]
    family = cases.build("llama")
    for_parts = saved(tmp_path / "parts", family, "W4A8", (2,))
    equal_heads = {"num_key_value_heads": 4}  # as the preset assumes
    phi3 = saved(tmp_path / "phi3", cases.build("phi3", **equal_heads), "none", (2,))
    refused = [
        ("tiny llama", compiled, [(plans, None, "engine")], "compiler pass 'autotp'"),
        ("tiny llama", trained, [(weights, None, "engine"), (weights, None, "module")], "optimizer holds the weights"),
        ("tiny llama", {"stage": 3, "learning_rate": 1e-2}, [(plans, None, "engine")], "ZeRO stage 3 spreads"),
        ("tiny llama", {"stage": 3}, [(plans, None, "module")], "ZeRO stage 3 spreads"),
        ("llama", parts, [(for_parts, None, "engine")], "no ranges for their sums"),
        ("llama", across, [(for_parts, None, "engine")], "give the other partition_dim"),
        ("phi3", {"preset_model": "phi3"}, [(phi3, None, "engine")], "Phi3ForCausalLM does not run as DeepSpeed"),
    ]
    for name, settings, given, words in refused:
        changes = equal_heads if name == "phi3" else {}
        for said in two.run(cases.refusal, name, changes, "initialize", settings, given):
            assert all(words in line and len(line.splitlines()) == 1 for line in said), (name, said)


def test_what_init_inference_cannot_shard(two_ranks, tmp_path):
    """With one KV head the second rank would have none; what else it cannot shard is in docs/engines.md."""
    given = [(saved(tmp_path, cases.build("gpt_bigcode"), "W4A16", ()), None, "engine")]
    for (said,) in two_ranks.run(cases.refusal, "gpt_bigcode", {}, "init_inference", {}, given):
        assert "num_key_value_heads=1" in said and len(said.splitlines()) == 1


def test_a_head_of_each_ranks_own_vocabulary(two, tmp_path):
    model, ids = cases.build("starcoder2"), tiny_models.token_ids(2, 20)
    artifact = tiny_models.make_artifact(model, "W4A8")
    checkpoint = quantize_head(model, artifact.checkpoint, 8, first_tokens(ids, ids > 0))
    folder = tiny_models.save_artifact(dataclasses.replace(artifact, checkpoint=checkpoint), tmp_path)
    for (said,) in two.run(cases.refusal, "starcoder2", {}, "initialize", {}, [(folder, None, "engine")]):
        assert "vocab_parallel_lm_head=false" in said and len(said.splitlines()) == 1


def test_the_compiler_pass_after_the_patch(two, tmp_path):
    plans = saved(tmp_path, tiny_models.build("llama"), "none", (2,))
    for said in two.run(cases.compiled_after, plans):
        assert "compiler pass 'autotp'" in said and len(said.splitlines()) == 1


def test_gradients_are_the_whole_model_s(two_ranks, tmp_path):
    """Each rank's column-parallel outputs give a part of the gradient of what they read: the ranks sum it."""
    model = tiny_models.build("llama")
    folder = tiny_models.save_artifact(tiny_models.make_artifact(model, "W4A16"), tmp_path)
    lowbit.apply_to_huggingface(model, folder)
    ids = tiny_models.token_ids(length=12)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lm_head" not in name}
    for found in two_ranks.run(cases.gradients, folder):
        assert expected.keys() <= found.keys() and len(expected) == 1 + 2 * 2 + 1, "embedding, norms"
        for name, grad in expected.items():
            # float32 sums of a few hundred products, in another order
            atol = 1e-5 * float(grad.abs().max())
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
