"""Rotations: exact in float64, the same bits on any number of ranks, and left out where a model does not allow them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import deepspeed_cases
import pytest
import tiny_models
import torch
import transformers
from commands import CALIBRATION_TEXT, needs_deepspeed, run_here
from quantize_runs import checksums, quantize
from torch import Tensor

import megatron_lowbit
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import EvaluateConfig, LowBitError, WeightsConfig, load_config
from megatron_lowbit.kernels import hadamard_matrix
from megatron_lowbit.launch.engines.prepare import round_weights
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.qllm import pipeline
from megatron_lowbit.qllm.choose_rotation import Rotator
from megatron_lowbit.qllm.rotate_model import LoadedModel, rotate_model
from megatron_lowbit.qllm.rotation import RestRotation, Rotation
from megatron_lowbit.qllm.search import word
from megatron_lowbit.qllm.turns import ResidualRotation
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.online_rotation import OnlineRotation

SHARDS = 8


def exact_norm(offset: int):
    """An RMSNorm's forward in the dtype of its input; transformers' own rounds to float32 on the way."""

    def forward(self, hidden: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * (offset + self.weight)

    return forward


@pytest.fixture
def exact_norms(monkeypatch):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.granite.modeling_granite import GraniteRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Phi3RMSNorm, GraniteRMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm(0))
    for norm in (GemmaRMSNorm, Gemma2RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm(1))


GEMMA = (transformers.GemmaConfig, {"head_dim": 8})
GRANITE = (
    transformers.GraniteConfig,
    {"embedding_multiplier": 3.0, "residual_multiplier": 0.25, "logits_scaling": 2.0, "attention_multiplier": 0.2},
)
ODD = {"hidden_size": 72, "head_dim": 12, "intermediate_size": 88, "num_attention_heads": 6, "num_key_value_heads": 2}
ALL = {"residual": True, "values": True, "attention": True, "inputs": True}
# {model: (architecture, changed fields of its config, what is rotated)}
MODELS = {
    "llama": ("llama", {}, ALL),
    "one KV head for each": ("llama", {"num_key_value_heads": 8}, ALL),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}, ALL),
    "odd widths": ("llama", ODD, ALL),  # 72 = 8 x 9, heads of 4 x 3, and one group of 11 for each of the MLP's 8
    "biases": ("llama with biases", {}, ALL),
    "wide heads": ("mistral", {}, ALL),
    "biases of Q, K and V": ("qwen2", {}, ALL),
    "norms of Q and K": ("qwen3", {}, ALL),
    "1 + weight": ("gemma", {}, ALL),
    "multipliers": ("granite", {}, ALL),
    "fused": ("phi3", {}, {**ALL, "values": False}),
    "norms after": ("gemma2", {}, {**ALL, "residual": False}),
}


def build(name: str, monkeypatch) -> transformers.PreTrainedModel:
    architecture, changes, _ = MODELS[name]
    for more, how in (("gemma", GEMMA), ("granite", GRANITE)):
        monkeypatch.setitem(tiny_models.CONFIGS, more, how)
    return tiny_models.build(architecture, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_model_computes_the_same(name, monkeypatch, exact_norms, capsys):
    """In float64, online rotations included. Logits of up to 100 are sums of some 10^4 products: 1e-10."""
    model = build(name, monkeypatch).double()
    before, state = tiny_models.logits(model), copy.deepcopy(model.state_dict())
    online = rotate_model(model, seed=3, shard_groups=SHARDS, attention_bits=4)
    attention.enable(model.config)  # R3 runs in transformers' attention interface
    torch.testing.assert_close(tiny_models.logits(model), before, rtol=1e-9, atol=1e-9)

    expected, notices = MODELS[name][2], capsys.readouterr().out
    assert online.residual == expected["residual"] and online.attention == expected["attention"]
    assert online.inputs == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert ("V stays as it is" in notices) == (not expected["values"])
    assert ("residual stream stays" in notices) == (not expected["residual"])
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    rotated = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert rotated <= changed if expected["residual"] else not rotated & changed
    if expected["values"]:
        assert "model.layers.1.self_attn.v_proj.weight" in changed


def orthogonal(width: int, seed: int) -> Tensor:
    """A random one, float64."""
    values = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(values)[0]


@pytest.mark.parametrize("name", ["llama", "tied embeddings", "odd widths", "biases", "biases of Q, K and V"])
def test_other_matrices_keep_the_function(name, monkeypatch, exact_norms):
    """As learned ones: neither symmetric nor made of signs, another for the heads of every block."""
    model = build(name, monkeypatch).double()
    before = tiny_models.logits(model)
    host = LoadedModel(model)
    rotator = Rotator(host, host.ids, seed=3, shard_groups=SHARDS, attention_bits=4)
    head_dim = rotator.rotation.blocks[0].head_dim
    heads = {f"heads.{index}": orthogonal(head_dim, index) for index in range(2)}
    rotator.learned({"residual": orthogonal(model.config.hidden_size, 9), **heads})
    for index, block in enumerate(host.blocks):
        rotator.rotate(index, block)
    attention.enable(model.config)
    torch.testing.assert_close(tiny_models.logits(model), before, rtol=1e-9, atol=1e-9)
    assert rotator.online().kind == "learned"


def test_a_matrix_that_is_not_orthogonal_is_refused(monkeypatch):
    host = LoadedModel(build("llama", monkeypatch))
    rotator = Rotator(host, host.ids, seed=3, shard_groups=SHARDS, attention_bits=4)
    heads = {f"heads.{index}": orthogonal(8, index) for index in range(2)}
    with pytest.raises(LowBitError, match="learned: between its blocks and its logits"):
        rotator.learned({"residual": orthogonal(64, 9) @ torch.diag(torch.linspace(0.5, 2, 64).double()), **heads})


def test_the_online_rotations_take_part(monkeypatch, exact_norms):
    """The test above would pass if they did nothing and the weights stayed: without them it does not."""
    model = build("llama", monkeypatch).double()
    before = tiny_models.logits(model)
    rotate_model(model, seed=3, shard_groups=SHARDS, attention_bits=4)
    for block in model.model.layers:
        block.mlp.down_proj._forward_pre_hooks.clear()
    assert (tiny_models.logits(model) - before).abs().max() > 0.1


def test_equations_by_dense_matrices(monkeypatch):
    """Every kind of weight against the products of the equations, in float64 and rounded once."""
    model = build("biases", monkeypatch)
    original = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rotate_model(model, seed=7, shard_groups=SHARDS, attention_bits=4)
    signs = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    q = torch.diag(signs) @ hadamard_matrix(64, torch.float64)
    heads = [torch.block_diag(*[hadamard_matrix(8, torch.float64)] * count) for count in (4, 8)]
    groups = torch.block_diag(*[hadamard_matrix(12, torch.float64)] * SHARDS)
    layer = "model.layers.1."
    gains = {site: torch.diag(original[f"{layer}{site}_layernorm.weight"]) for site in ("input", "post_attention")}
    final = torch.diag(original["model.norm.weight"])

    def was(name: str) -> Tensor:
        return original[f"{layer}{name}"]

    expected = {
        "model.embed_tokens.weight": original["model.embed_tokens.weight"] @ q,
        "lm_head.weight": original["lm_head.weight"] @ final @ q,
        "model.norm.weight": torch.ones(64),
        f"{layer}input_layernorm.weight": torch.ones(64),
        f"{layer}self_attn.q_proj.weight": was("self_attn.q_proj.weight") @ gains["input"] @ q,
        f"{layer}self_attn.q_proj.bias": was("self_attn.q_proj.bias"),
        f"{layer}self_attn.v_proj.weight": heads[0] @ was("self_attn.v_proj.weight") @ gains["input"] @ q,
        f"{layer}self_attn.v_proj.bias": heads[0] @ was("self_attn.v_proj.bias"),
        f"{layer}self_attn.o_proj.weight": q.T @ was("self_attn.o_proj.weight") @ heads[1],
        f"{layer}self_attn.o_proj.bias": was("self_attn.o_proj.bias") @ q,
        f"{layer}mlp.up_proj.weight": was("mlp.up_proj.weight") @ gains["post_attention"] @ q,
        f"{layer}mlp.down_proj.weight": q.T @ was("mlp.down_proj.weight") @ groups,
        f"{layer}mlp.down_proj.bias": was("mlp.down_proj.bias") @ q,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor.float(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("broken", ["embedding", "logits"])
def test_what_surrounds_the_blocks_is_proved(broken, monkeypatch, capsys):
    """A model whose code multiplies channels by the embeddings, or before the logits: structure does not show it."""
    model = build("llama", monkeypatch)
    factors = torch.linspace(0.9, 1.1, 64)
    if broken == "embedding":
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * factors)
    else:
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * factors,))
    before = tiny_models.logits(model)
    assert not rotate_model(model, seed=0, shard_groups=SHARDS, attention_bits=4).residual
    notices = capsys.readouterr().out
    assert f"between its {'embedding' if broken == 'embedding' else 'blocks'} and" in notices
    assert len(notices.splitlines()) == 1
    attention.enable(model.config)
    torch.testing.assert_close(tiny_models.logits(model), before, rtol=1e-3, atol=1e-3)


def test_a_later_block_that_differs_is_refused(monkeypatch):
    """The first block allows it; what the second adds goes through a factor of each channel."""
    model = build("llama", monkeypatch)
    factors = torch.linspace(0.5, 1.5, 64)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * factors)
    with pytest.raises(LowBitError, match=r"model\.layers\.1 computes something else once it is rotated"):
        rotate_model(model, seed=0, shard_groups=SHARDS, attention_bits=4)


def test_nothing_to_rotate_is_one_line(capsys):
    """A width whose odd factor is too large for every matrix, and attention that stays in full precision."""
    width = 1031  # a prime, above the largest odd factor
    shape = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_models.build("phi3", **shape, head_dim=8)
    with pytest.raises(LowBitError, match="finds nothing in this model to rotate"):
        rotate_model(model, seed=0, shard_groups=1, attention_bits=16)
    notices = capsys.readouterr().out.splitlines()
    assert len(notices) == 3 and sum("1031 products a channel" in line for line in notices) == 2


def test_the_signs_are_the_seeds():
    one, same, other = (ResidualRotation(64, seed).signs for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and set(one.tolist()) == {-1.0, 1.0}


def test_a_large_embedding_is_rotated_in_parts():
    """Rows are turned some thousands at a time; each as by itself."""
    residual, rest = ResidualRotation(4, 0), RestRotation("e", "n", "h", 1)
    rotation = Rotation([], residual, rest, 1)
    rows = torch.randn(2**14 + 3, 4, generator=torch.Generator().manual_seed(0))
    turned = rotation.rest_tensor("e", rows)
    assert turned.dtype == torch.float32
    for row in (0, 2**14 - 1, 2**14, 2**14 + 2):
        assert torch.equal(turned[row], residual.turn(rows[row]).float())
    gain = torch.tensor([0.5, 1.0, -0.25, 0.0])
    assert torch.equal(rotation.rest_tensor("h", rows, gain), residual.turn(rows.double() * (gain + 1.0)).float())
    assert rotation.rest_tensor("n", gain).tolist() == [0.0] * 4
    assert rotation.rest_tensor("other", rows) is rows


# Artifacts


def rounded(model, **weights: object) -> LowBitCheckpoint:
    config = WeightsConfig(**{"scheme": "W4A4", "attention": True, "rotation": "hadamard", **weights})
    return round_weights(model, config, None, seed=5)


def test_weights_in_bfloat16_are_rounded_once(monkeypatch):
    """Rotated weights are codes of what they are in float64, not of what bfloat16 would have left of it."""
    model = build("biases", monkeypatch).bfloat16()
    half, single = rounded(model), rounded(copy.deepcopy(model).float())
    assert half.rotation == single.rotation and half.rotation is not None and half.rotation.residual
    for name, weight in single.linears.items():
        assert torch.equal(half.linears[name].packed_weight, weight.packed_weight), name
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "tied embeddings", "biases", "norms after", "fused"])
def test_rounding_leaves_the_model_and_apply_is_undone(name, monkeypatch, tmp_path):
    """W8A8: nearly the model's own logits, from the model and from the artifact alone; then the very bits again."""
    model = build(name, monkeypatch)
    before, state = tiny_models.logits(model), copy.deepcopy(model.state_dict())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    checkpoint = rounded(model, scheme="W8A8")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    folder = tiny_models.save_artifact(Artifact(checkpoint), tmp_path / "artifact")
    applied = megatron_lowbit.apply_to_huggingface(model, folder)
    low_bit = tiny_models.logits(applied)
    error = ((low_bit - before).norm() / before.norm()).item()
    assert 0 < error < 0.1, error
    for size in (2, 4):
        megatron_lowbit.apply_to_huggingface(model, folder, virtual_tp=size)
        # Partial sums of float32 travel as float64, so only what they are rounded from differs: by an ulp.
        torch.testing.assert_close(tiny_models.logits(model), low_bit, rtol=1e-3, atol=2e-2)
    megatron_lowbit.remove(model)
    assert torch.equal(tiny_models.logits(model), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_an_artifact_says_what_is_rotated(monkeypatch, tmp_path):
    model = build("tied embeddings", monkeypatch)
    checkpoint = rounded(model)
    folder = tiny_models.save_artifact(Artifact(checkpoint), tmp_path / "artifact")
    meta = json.loads((folder / "lowbit.json").read_text())
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert meta["format"] == 6 and meta["rotation"] == {
        **{"kind": "hadamard", "residual": True, "attention": True},
        "inputs": downs,
    }
    loaded = LowBitCheckpoint.load(folder)
    assert loaded.rotation == checkpoint.rotation == OnlineRotation(True, True, frozenset(downs))
    for name, weight in checkpoint.linears.items():
        assert torch.equal(loaded.linears[name].packed_weight, weight.packed_weight), name
    assert loaded.fingerprint == rounded(model, rotation="none").fingerprint
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= loaded.tensors.keys()


def test_an_artifact_without_rotation_is_as_before(monkeypatch, tmp_path):
    folder = tmp_path / "artifact"
    tiny_models.save_artifact(Artifact(rounded(build("llama", monkeypatch), rotation="none")), folder)
    meta = json.loads((folder / "lowbit.json").read_text())
    assert meta["format"] == 4 and "rotation" not in meta


ABOUT = {"kind": "hadamard", "residual": True, "attention": False, "inputs": []}


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({**ABOUT, "inputs": ["model.layers.9.mlp.down_proj"]}, "no quantized linear"),
        ({**ABOUT, "residual": 1}, "rotation.residual"),
        ({"kind": "hadamard", "residual": True, "inputs": []}, "rotation.attention"),
        ({**ABOUT, "kind": "other"}, "rotation.kind"),
        (None, "lacks rotation"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(about, why, monkeypatch, tmp_path):
    from megatron_lowbit.io.files import SEAL, write_sealed

    folder = tmp_path / "artifact"
    tiny_models.save_artifact(Artifact(rounded(build("llama", monkeypatch))), folder)
    meta = json.loads((folder / "lowbit.json").read_text())
    del meta[SEAL], meta["rotation"]
    write_sealed(folder / "lowbit.json", meta if about is None else {**meta, "rotation": about})
    with pytest.raises(LowBitError, match=why):
        LowBitCheckpoint.load(folder)


def test_generation_with_a_packed_cache(monkeypatch):
    """Rotated K lies packed in the cache: a token after the other gives what the whole text at once gives."""
    model = build("llama", monkeypatch)
    megatron_lowbit.apply_to_huggingface(model, Artifact(rounded(model)))
    ids = tiny_models.token_ids(1, 12)
    cache, steps = transformers.DynamicCache(config=model.config), []
    with torch.inference_mode():
        for token in ids.T:
            steps.append(model(input_ids=token[None], past_key_values=cache).logits)
    assert all(type(layer).__name__ == "PackedLayer" for layer in cache.layers)
    whole = tiny_models.logits(model, ids)
    # One activation on the other side of a rounding boundary may move a token: most agree to float32.
    error = (torch.cat(steps, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert error.median() < 1e-4


@needs_deepspeed
@pytest.mark.parametrize("name", ["tied embeddings", "biases", "biases of Q, K and V"])
def test_deepspeed_computes_what_hugging_face_does(name, monkeypatch, tmp_path, two_ranks):
    """Biases of whole heads are shared among the ranks, and so are the columns of the output projection."""
    model = build(name, monkeypatch)
    folder = tiny_models.save_artifact(Artifact(rounded(model)), tmp_path)
    megatron_lowbit.apply_to_huggingface(model, folder, virtual_tp=2)
    here = tiny_models.logits(model)
    architecture, changes, _ = MODELS[name]
    for there in two_ranks.run(deepspeed_cases.rotated, folder, architecture, changes):
        # The ranks' sums of the output projection alone are added in another order.
        torch.testing.assert_close(there["logits"], here, rtol=1e-4, atol=1e-4)
        assert there["removed"] and there["kind"] == "LmHeadLinearAllreduce"


def test_a_patched_model_is_saved_untied(monkeypatch, tmp_path):
    model = build("tied embeddings", monkeypatch)
    megatron_lowbit.apply_to_huggingface(model, Artifact(rounded(model)))
    low_bit = tiny_models.logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    megatron_lowbit.remove(model)
    megatron_lowbit.apply_to_huggingface(model, tmp_path)
    assert torch.equal(tiny_models.logits(model), low_bit)


# The pipeline

SETTINGS = [
    *("weights.scheme=W4A4", "weights.rotation=hadamard", f"calibration.data={CALIBRATION_TEXT}"),
    *("calibration.samples=4", "calibration.sequence_length=64", "correction.mode=none", "reassembly.mode=none"),
    "comm.tp_sizes=[2]",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Hidden size 72, three KV heads of 8: whole heads at one and three ranks; tied."""
    changes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 144}
    folder = tmp_path_factory.mktemp("nine-heads")
    return tiny_models.save_model("llama", folder, **changes, tie_word_embeddings=True)


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_write_the_same_files(tp, tmp_path):
    """The embedded model: hidden size 128, four KV heads, an MLP of 384."""
    one = quantize(tmp_path / "one", "model=embedded", *SETTINGS)
    assert checksums(quantize(tmp_path / "many", "model=embedded", *SETTINGS, f"tp={tp}")) == checksums(one)


def test_quantize_tells_what_became_of_an_input(model_folder, tmp_path):
    """Every input is rotated, O's by R2; a fixed expansion is reassembled with rotation and without."""
    fixed = ["reassembly.mode=fixed", "reassembly.expansion=0.1", "reassembly.o_proj=true"]
    told = {}
    for name, more in (("both", fixed), ("reassemble", [*fixed, "weights.rotation=none"])):
        folder = quantize(
            tmp_path / name, f"model={model_folder}", *SETTINGS, *more, "comm.tp_sizes=[3]", "calibration.samples=2"
        )
        row = json.loads((folder / "quantize.json").read_text())["rows"][0]
        told[name] = {layer: about["chosen"] for group in row["groups"] for layer, about in group["layers"].items()}
    inputs = ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
    layers = [f"model.layers.{index}.{name}" for index in range(2) for name in inputs]
    assert told == {name: dict.fromkeys(layers, name) for name in told}
    assert [word(rotated, added) for rotated in (True, False) for added in (True, False)] == [
        *("both", "rotate", "reassemble", "none")
    ]


def test_both_methods_round_the_same_weights(tmp_path):
    """One rotates block by block as it reads them, the other a whole model in memory."""
    qllm = LowBitCheckpoint.load(quantize(tmp_path / "qllm", "model=embedded", *SETTINGS))
    plain = ["model=embedded", "weights.scheme=W4A4", "weights.attention=true", "weights.method=rtn"]
    rtn = LowBitCheckpoint.load(quantize(tmp_path / "rtn", *plain, "weights.rotation=hadamard"))
    assert rtn.rotation == qllm.rotation and rtn.attention_bits == qllm.attention_bits == 4
    for name, weight in qllm.linears.items():
        assert torch.equal(rtn.linears[name].packed_weight, weight.packed_weight), name
        assert torch.equal(rtn.linears[name].scale, weight.scale), name
    other = LowBitCheckpoint.load(quantize(tmp_path / "plain", *plain))
    assert not any(torch.equal(other.linears[name].packed_weight, w.packed_weight) for name, w in rtn.linears.items())


def test_three_ranks_write_the_same_files(model_folder, tmp_path):
    settings = [f"model={model_folder}", *SETTINGS, "weights.shard_groups=3", "comm.tp_sizes=[3]"]
    one = quantize(tmp_path / "one", *settings)
    assert checksums(quantize(tmp_path / "many", *settings, "tp=3")) == checksums(one)


def test_a_quantized_projection_of_a_tied_model(model_folder, tmp_path):
    """It is rounded once rotated, and is no longer the embedding's codes; the artifact runs alone and in the model."""
    artifact = quantize(tmp_path / "artifact", f"model={model_folder}", *SETTINGS[:-1], "weights.lm_head_bits=8",
                        "weights.scheme=W8A8", "weights.shard_groups=3", "comm.tp_sizes=[]")  # fmt: skip
    checkpoint = LowBitCheckpoint.load(artifact)
    assert checkpoint.head is not None and checkpoint.head.embedding is None and checkpoint.rotation is not None
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((artifact / "lowbit.json").read_text())["format"] == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    before = tiny_models.logits(model)
    weight, gain = model.lm_head.weight.double(), model.model.norm.weight.double()
    turned = ResidualRotation(72, 0).turn(weight.detach() * gain.detach())
    step = (turned.amax(1) - turned.amin(1)).max() / 255
    assert (checkpoint.head.weight.dequantize() - turned).abs().max() <= 0.51 * step  # half a step, and float32
    applied = megatron_lowbit.apply_to_huggingface(model, artifact)
    low_bit = tiny_models.logits(applied)
    assert 0 < (low_bit - before).norm() / before.norm() < 0.1
    alone = start_engine(load_config(EvaluateConfig, None, [f"artifact={artifact}"]))
    alone.apply(Artifact.load(artifact))
    torch.testing.assert_close(tiny_models.logits(alone.module), low_bit, rtol=1e-5, atol=1e-5)


def test_a_killed_run_continues_to_the_same_files(tmp_path, monkeypatch):
    """The rotation is found anew, and is the same."""
    settings = ["model=embedded", *SETTINGS, "correction.blocks_per_group=3"]
    whole = quantize(tmp_path / "whole", *settings)
    load, groups = pipeline.load_group, []

    def killed(*args):
        groups.append(args[1])
        if len(groups) == 2:
            raise LowBitError("killed")
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_group", killed)
        assert run_here("quantize", *settings, f"output_dir={tmp_path / 'killed'}") == 2
    assert checksums(quantize(tmp_path / "killed", *settings)) == checksums(whole)


REFUSED = {
    "needs weights.method=qllm": ["quantize", "weights.method=rtn", "weights.scheme=W4A4", "weights.lm_head_bits=8"],
    "ranges are measured on the model as it is": ["quantize", "weights.method=rtn", "weights.scheme=W4A4"],
    "would have no effect: it needs a weights.scheme": ["evaluate", "evaluation.data=stdlib:validation"],
}


@pytest.mark.parametrize("why", REFUSED)
def test_commands_refuse_in_one_line(why, tmp_path, capsys):
    """A projection that rtn would round as it was, and a rotation of nothing that is rounded."""
    settings = ["model=embedded", "weights.rotation=hadamard", f"calibration.data={CALIBRATION_TEXT}"]
    assert run_here(*REFUSED[why], *settings, f"output_dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert why in message and len(message.strip().splitlines()) == 1
