"""Hugging Face models as GPTModels and back, at every tensor- and pipeline-parallel size, against transformers itself.

Where mbridge is installed, its own conversion is a second, independent oracle for every rank's tensors.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from types import SimpleNamespace

import megatron_model_cases as cases
import oracles
import pytest
import tiny_models
import torch
from commands import needs_megatron
from safetensors.torch import load_file, save_file
from tiny_models import build, make_artifact, save_artifact
from transformers import AutoModelForCausalLM

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

pytestmark = needs_megatron

# {name: (architecture, changed config fields)}. 105 words do not divide among 2 or 4 ranks.
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama with biases", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "padded": ("qwen2", {"vocab_size": 105}),
    "tied and padded": ("llama", {"tie_word_embeddings": True, "vocab_size": 105}),
    "fewer groups than ranks": ("llama", {"num_key_value_heads": 2}),
    "biases of the attention alone": ("llama", {"attention_bias": True}),
    "experts": ("mixtral", {}),
    "experts of one block": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "a shared expert in one block": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "experts whose shares sum to 1": ("qwen3_moe", {"norm_topk_prob": True}),
}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # (tp, pp)
# Logits of both sides are float32 with sums in another order. The longest sum has 172 terms: its order moves it by at
# most 172 roundings of its largest partial sum. (Typical is the square root of that: 7e-7 was measured.)
TOLERANCE = 172 * oracles.EPS32


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


class Runs:
    """Every model is loaded once per layout; the tests look at different parts of what came back."""

    def __init__(self, pools, folder):
        self.pools, self.folder = pools, folder

    @functools.cache  # noqa: B019 (lives as long as the module's tests)
    def saved(self, name: str):
        folder = self.folder / name.replace(" ", "-")
        build(MODELS[name][0], **MODELS[name][1]).save_pretrained(folder)
        return folder

    @functools.cache  # noqa: B019
    def loaded(self, name: str, layout: tuple[int, int]) -> list[dict]:
        tp, pp = layout
        return self.pools[tp * pp].run(cases.loaded, tp, pp, self.saved(name), MODELS[name])


@pytest.fixture(scope="module")
def runs(pools, tmp_path_factory):
    return Runs(pools, tmp_path_factory.mktemp("models"))


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_an_lm_head_of_its_own_is_used(two_ranks, tmp_path):
    """Where the file holds one that is not the embedding, transformers ties nothing, whatever the config says."""
    hf = build("llama", tie_word_embeddings=True)
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    expected = tiny_models.logits(AutoModelForCausalLM.from_pretrained(tmp_path), cases.token_ids(tiny_models.VOCAB))
    for results in two_ranks.run(cases.own_head, tmp_path):
        assert_close(results["logits"], expected)
        assert results["refused"].startswith("tie_word_embeddings=true, but lm_head.weight is not the embedding;")
        assert len(results["refused"].splitlines()) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(runs, name, layout):
    architecture, changes = MODELS[name]
    hf = build(architecture, **changes)
    vocab = hf.config.vocab_size
    expected = tiny_models.logits(hf, cases.token_ids(vocab))
    for results in runs.loaded(name, layout):
        assert_close(results["logits"][..., :vocab], expected)
        padding = results["logits"][..., vocab:]
        assert padding.shape[-1] == -vocab % layout[0] and torch.all(padding == float("-inf"))
        assert results["folder"] == [], "safetensors and the state dict give other tensors"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_is_bit_for_bit(runs, name, layout):
    """On the first rank of a model alone. Two ranks of tp x pp=1 data-parallel peers would each have a first."""
    first, *others = (results["back"] for results in runs.loaded(name, layout))
    assert first == [] and others == [None] * len(others)


@pytest.mark.parametrize("name", ["llama", "tied", "phi3"])
def test_the_model_that_comes_back_works(runs, name):
    """All it needs is there (buffers, the tie), not only the names."""
    (results, _) = runs.loaded(name, (2, 1))
    hf = build(MODELS[name][0], **MODELS[name][1])
    assert torch.equal(results["back_logits"], tiny_models.logits(hf, cases.token_ids(hf.config.vocab_size)))
    assert results["back_is_tied"] == (name == "tied")


def test_ranks_hold_shares(runs):
    """No rank has the whole of a linear or of the vocabulary, and no stage another's layers."""
    for results in runs.loaded("llama", (4, 1)):
        shares = results["shares"]
        assert shares["decoder.layers.0.self_attention.linear_qkv.weight"] == ((64 + 32 + 32) // 4, 64)
        assert shares["decoder.layers.1.mlp.linear_fc1.weight"] == (2 * 172 // 4, 64)
        assert shares["decoder.layers.0.mlp.linear_fc2.weight"] == (64, 172 // 4)
        assert shares["embedding.word_embeddings.weight"] == shares["output_layer.weight"] == (128 // 4, 64)
    first, last = (set(results["shares"]) for results in runs.loaded("llama", (1, 2)))
    assert "embedding.word_embeddings.weight" in first - last
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= last - first
    assert not any(name.startswith("decoder.layers.1") for name in first | last), "each stage has one layer"


def test_the_tolerance_would_show_two_swapped_rows(one_rank):
    """The smallest mistake of a loader moves the logits a hundred times as much as TOLERANCE allows."""
    hf = build("llama")
    expected = tiny_models.logits(hf, cases.token_ids(128))
    weight = hf.model.layers[1].mlp.up_proj.weight.data
    weight[[5, 6]] = weight[[6, 5]]
    moved = (tiny_models.logits(hf, cases.token_ids(128)) - expected).abs().max() / expected.abs().max()
    assert moved > 100 * TOLERANCE


# Rotary embeddings and contexts

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
        # Two of the four frequencies of a head of 8 have wavelengths beyond 8192 tokens, which llama3 scales.
        ("llama", {"rope_parameters": {**ROPE, **LLAMA3, "rope_theta": 5e8, "rope_type": "llama3"}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 0.1}}),
        ("llama", {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("mistral", {"sliding_window": 8}),
    ],
    ids=["base", "linear", "llama3", "yarn", "yarn, factor", "yarn, mscale", "partial", "window"],
)
def test_rotary_embeddings(one_rank, architecture, changes):
    hf = build(architecture, **changes)
    expected = tiny_models.logits(hf, cases.token_ids(128))
    (results,) = one_rank.run(cases.one_rank_logits, (architecture, changes))
    assert_close(results["logits"], expected)
    if "sliding_window" in changes:
        assert results["context"] == 8, "beyond its window the model would need windowed attention"
    else:  # otherwise the setting would be without effect in this test
        plain = tiny_models.logits(build(architecture), cases.token_ids(128))
        assert (plain - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()


def test_contexts(one_rank):
    """A sliding window bounds the context, unless the model does not use it."""
    configs = [
        build("llama").config,
        build("mistral", sliding_window=16).config,
        build("mistral", sliding_window=None).config,
        build("mistral", sliding_window=4096).config,
        build("qwen2", sliding_window=16, use_sliding_window=True).config,
        build("qwen2", sliding_window=16, use_sliding_window=False).config,
        SimpleNamespace(max_position_embeddings=None),
    ]
    assert one_rank.run(cases.contexts, configs) == [[64, 16, 64, 64, 16, 64, 2048]]


# {what is wrong: (tp, pp, architecture, changed config fields, what the line has to say)}
REFUSED = {
    "model_type": (
        2,
        1,
        "gemma2",
        {},
        ["'gemma2'", "llama, mistral, qwen2, qwen3, phi3, mixtral, qwen2_moe, qwen3_moe", "engine=huggingface"],
    ),
    "activation": (2, 1, "llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
    "rope": (2, 1, "llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, ["rope_type 'dynamic'"]),
    "a part of a head": (
        *(2, 1, "llama"),
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        ["rope_type 'yarn' with partial_rotary_factor=0.5"],
    ),
    "llama3's frequencies": (
        *(2, 1, "llama"),
        {"rope_parameters": {**ROPE, **LLAMA3, "rope_type": "llama3", "low_freq_factor": 2.0}},
        ["low_freq_factor=2.0", "1.0"],
    ),
    "layers": (1, 2, "llama", {"num_hidden_layers": 3}, ["pp=2", "num_hidden_layers=3"]),
    "KV heads": (
        *(2, 1, "llama"),
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
        ["tp=2", "num_key_value_heads=3"],
    ),
    "heads": (
        *(2, 1, "llama"),
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7},
        ["tp=2", "num_attention_heads=7"],
    ),
    "MLP": (2, 1, "llama", {"intermediate_size": 171}, ["tp=2", "intermediate_size=171"]),
    "experts": (
        *(2, 1, "qwen3_moe", {"moe_intermediate_size": 27}),
        ["tp=2 does not divide the model's moe_intermediate_size=27; choose one of [1, 3, 9, 27]"],
    ),
    "shared expert": (
        *(2, 1, "qwen2_moe", {"shared_expert_intermediate_size": 27}),
        ["tp=2 does not divide the model's shared_expert_intermediate_size=27; choose one of [1, 3, 9, 27]"],
    ),
    "biases beside experts": (
        2,
        1,
        "qwen3_moe",
        {"attention_bias": True},
        ["attention_bias=true", "engine=huggingface"],
    ),
    "one expert": (2, 1, "mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok=1", "engine=huggingface"]),
    "no block of experts": (2, 1, "qwen3_moe", {"mlp_only_layers": [0, 1]}, ["no block of this qwen3_moe has experts"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_megatron_would_compute_otherwise(two_ranks, what):
    tp, pp, architecture, changes, said = REFUSED[what]
    config = build(architecture, **changes).config
    for messages in two_ranks.run(cases.refused_builds, tp, pp, {what: config}):
        line = messages[what]
        assert all(part in line for part in said) and "\n" not in line, line


# Weights that are not as they should be


def lacking(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
    ],
)
def test_tensors_that_lack_or_have_another_shape(one_rank, tmp_path, name):
    state = build("llama with biases").state_dict()
    cut = {**state, name: state[name][:-2].contiguous()}
    sources = {"lacks": lacking(state, name), "cut": cut}
    for key in tuple(sources):
        sources[f"folder {key}"] = tmp_path / key
        (tmp_path / key).mkdir()
        save_file(sources[key], tmp_path / key / "model.safetensors")
    (messages,) = one_rank.run(cases.refused_weights, "llama with biases", sources)
    for key, line in messages.items():
        assert name in line and "\n" not in line and len(line) < 300, (key, line)
        if key.endswith("cut"):
            assert str(list(state[name].shape)) in line and str(list(cut[name].shape)) in line, line
        else:
            assert "lack" in line


def test_tensors_that_no_rank_has_a_place_for_do_no_harm(one_rank):
    """Old Llama checkpoints hold rotary frequencies; the config decides what is read."""
    state = build("llama").state_dict()
    sources = {"more": {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}}
    assert one_rank.run(cases.refused_weights, "llama", sources) == [{"more": "accepted"}]


# Artifacts without full-precision weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama with biases", "phi3"])
def test_a_checkpoint_needs_no_full_precision_weights(pools, tmp_path, architecture, layout):
    """load_checkpoint equals load_weights and apply_to_megatron, to the last bit."""
    tp, pp = layout
    hf = build(architecture)
    sizes = (tp,) if tp > 1 else ()
    artifacts = {
        "W4A4": save_artifact(make_artifact(hf, "W4A4", sizes), tmp_path / "W4A4"),
        "W8A8": make_artifact(hf, "W8A8"),
    }
    for results in pools[tp * pp].run(cases.from_checkpoint, tp, pp, architecture, artifacts):
        for name, outcome in results.items():
            assert outcome["differing"] == [] and outcome["logits_equal"], name
            assert outcome["changed"] > 1e-3, "nothing was quantized"


def test_checkpoints_that_do_not_fit(one_rank):
    checkpoint = make_artifact(build("llama"), "W4A8").checkpoint
    gone = "model.layers.1.input_layernorm.weight"
    artifacts = {
        "plan": make_artifact(build("llama"), tp_sizes=(2,)),
        "shape": make_artifact(build("llama", intermediate_size=96), "W4A8"),
        "layers": make_artifact(build("llama", num_hidden_layers=1), "W4A8"),
        "norm": Artifact(replaced(checkpoint, tensors=lacking(checkpoint.tensors, gone))),
    }
    (messages,) = one_rank.run(cases.checkpoint_refusals, artifacts)
    assert "plans only" in messages["plan"]
    assert "model.layers.0.mlp.gate_proj is [96, 64] in the artifact and [172, 64]" in messages["shape"]
    assert "1 layers" in messages["layers"] and gone in messages["norm"]
    assert not any("\n" in line for line in messages.values())


def replaced(checkpoint: LowBitCheckpoint, **changes: object) -> LowBitCheckpoint:
    import dataclasses

    return dataclasses.replace(checkpoint, **changes)


# mbridge


@pytest.mark.skipif(find_spec("mbridge") is None, reason="needs mbridge")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "tied qwen3"])
def test_mbridge_gives_every_rank_the_same_tensors(pools, tmp_path, name, ranks):
    """It knows nothing of megatron_lowbit; only its names of two norms (Transformer Engine's) are given to it."""
    architecture = name.removeprefix("tied ")
    build(architecture, tie_word_embeddings=architecture != name).save_pretrained(tmp_path)
    for results in pools[ranks].run(cases.by_mbridge, tmp_path):
        assert results["differing"] == []
        assert len(results["names"]) >= 14 and ("output_layer.weight" in results["names"]) == (name == architecture)


def test_a_process_that_has_initialized_megatron(two_ranks):
    """Its groups are used, so that a script may call evaluate twice; other sizes are refused with both numbers."""
    for found in two_ranks.run(cases.initialized_again):
        assert found["kept"]
        assert "initialized Megatron with tp=2, not 1 and pp=1, not 2" in found["refused"]
        assert "destroy_model_parallel" in found["refused"]


def test_bars_of_rank_0(two_ranks):
    first, second = two_ranks.run(cases.bars)
    assert "loading weights" in first and "gathering weights" in first and not second
