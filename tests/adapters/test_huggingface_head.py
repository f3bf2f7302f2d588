"""A quantized output projection in Hugging Face models, tied to the embedding or not, against float64 and against
models that hold the rounded weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build, logits, make_artifact, save_artifact, token_ids
from torch import Tensor, nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.head import find_head, quantize_head
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, StageConfig
from megatron_lowbit.launch.loading import load_model, read_config
from megatron_lowbit.layers.head import QuantEmbedding, QuantHead
from megatron_lowbit.quant.head import QuantizedHead, first_tokens

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def texts(windows: int = 3) -> list[tuple[Tensor, Tensor]]:
    ids = token_ids(windows, 24, seed=3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, 9:] = False
    return list(first_tokens(ids, mask))


def with_head(model: nn.Module, scheme: str = "W4A16", bits: int = 8) -> Artifact:
    artifact = make_artifact(model, scheme)
    assert artifact.checkpoint is not None
    return replace(artifact, checkpoint=quantize_head(model, artifact.checkpoint, bits, texts()))


def head_of(artifact: Artifact) -> QuantizedHead:
    assert artifact.checkpoint is not None and artifact.checkpoint.head is not None
    return artifact.checkpoint.head


def dequantized(head: QuantizedHead) -> Tensor:
    """float64, of 8-bit codes, which are the bytes."""
    weight = head.weight
    assert weight.num_bits == 8
    return weight.scale.double() * (weight.packed_weight.double() - weight.zero_point.double())


def rounded_twin(model: nn.Module, artifact: Artifact) -> nn.Module:
    """A plain copy of the model with the weights that the codes stand for, in float32."""
    twin, head = copy.deepcopy(model), head_of(artifact)
    assert artifact.checkpoint is not None
    for name, weight in artifact.checkpoint.linears.items():
        twin.get_submodule(name).weight.data = weight.dequantize()
    twin.get_submodule(head.name).weight.data.copy_(dequantized(head))  # tied: the same Parameter
    return twin


@TIED
def test_the_projection_is_a_product_in_float64(tied):
    model = build("llama", tie_word_embeddings=tied)
    artifact = with_head(model)
    lowbit.apply_to_huggingface(model, artifact)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = logits(model).double()
    expected = seen[0].double() @ dequantized(head_of(artifact)).T
    # The sum is float64, and rounded to float32 once.
    torch.testing.assert_close(y, expected, rtol=2.0**-23, atol=1e-12)


@TIED
def test_the_embedding_is_the_same_codes_where_it_is_tied(tied):
    model = build("llama", tie_word_embeddings=tied)
    original = model.model.embed_tokens
    artifact = with_head(model)
    assert head_of(artifact).embedding == ("model.embed_tokens" if tied else None)
    lowbit.apply_to_huggingface(model, artifact)
    logits(model)  # puts the weight into the kernels' order
    if not tied:
        assert model.model.embed_tokens is original
        return
    embedding, ids = model.get_input_embeddings(), token_ids()
    assert isinstance(embedding, QuantEmbedding) and embedding.head is model.lm_head
    assert (embedding.num_embeddings, embedding.embedding_dim) == (128, 64)
    assert torch.equal(embedding(ids), dequantized(head_of(artifact)).float()[ids])
    names = [name for name in model.state_dict() if "embed" in name or "lm_head" in name]
    assert names == ["lm_head.packed_weight", "lm_head.scale", "lm_head.zero_point"]


@TIED
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
def test_a_model_equals_one_with_the_rounded_weights(architecture, tied):
    model = build(architecture, tie_word_embeddings=tied)
    artifact = with_head(model)
    expected = logits(rounded_twin(model, artifact))
    lowbit.apply_to_huggingface(model, artifact)
    for _ in range(2):  # before and after the weights are in the kernels' order
        y = logits(model)
        # float32 rounding of matrix products over at most 172 inputs, through two blocks.
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@TIED
def test_generation(tied):
    model = build("llama", tie_word_embeddings=tied)
    artifact = with_head(model)
    twin, options = rounded_twin(model, artifact), {"max_new_tokens": 12, "do_sample": False}
    lowbit.apply_to_huggingface(model, artifact)
    ids = token_ids(2, 5)
    generated = model.generate(ids, **options)
    assert torch.equal(generated, twin.generate(ids, **options))
    assert generated.shape == (2, 17)


@TIED
def test_remove_restores_the_model(tied):
    model = build("llama", tie_word_embeddings=tied)
    before, modules = logits(model), [model.lm_head, model.model.embed_tokens]
    lowbit.apply_to_huggingface(model, with_head(model))
    assert isinstance(model.lm_head, QuantHead)
    lowbit.remove(model)
    assert modules == [model.lm_head, model.model.embed_tokens]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model), before)


@TIED
def test_saved_and_loaded_by_itself(tmp_path, tied):
    """save_pretrained of the patched model writes the same artifact, from which a model is built without the first."""
    model = build("llama", tie_word_embeddings=tied)
    artifact = with_head(model)
    lowbit.apply_to_huggingface(model, save_artifact(artifact, tmp_path / "first"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "second")
    loaded = Artifact.load(tmp_path / "second")
    assert torch.equal(head_of(loaded).weight.packed_weight, head_of(artifact).weight.packed_weight)
    config = StageConfig(artifact=str(tmp_path / "second"))
    alone = load_model(config, read_config(tmp_path / "second"), loaded.checkpoint).eval()
    lowbit.apply_to_huggingface(alone, loaded)
    assert torch.equal(logits(alone), expected)
    assert not any("embed" in name or "lm_head" in name for name, _ in alone.named_parameters()) or not tied


@TIED
def test_an_artifact_of_a_model_that_unties_its_config_loads(tmp_path, tied):
    """The config says tied; the weights say otherwise, and win."""
    model = build("llama", tie_word_embeddings=tied)
    if tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    artifact = with_head(model)
    folder = save_artifact(artifact, tmp_path)
    model.config.save_pretrained(folder)
    artifact.checkpoint.save(folder)
    loaded = Artifact.load(folder)
    alone = load_model(StageConfig(artifact=str(folder)), read_config(folder), loaded.checkpoint).eval()
    expected = logits(lowbit.apply_to_huggingface(model, artifact))
    assert torch.equal(logits(lowbit.apply_to_huggingface(alone, loaded)), expected)


def test_copies_share_nothing():
    model = build("llama", tie_word_embeddings=True)
    lowbit.apply_to_huggingface(model, with_head(model))
    before = logits(model)
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings().head is twin.lm_head is not model.lm_head
    twin.lm_head.scale.zero_()
    assert torch.equal(logits(model), before)


def test_the_result_has_the_models_dtype():
    """Scales stay float32; the embedding's result follows the model."""
    model = build("llama", tie_word_embeddings=True)
    lowbit.apply_to_huggingface(model, with_head(model)).bfloat16()
    assert model.get_input_embeddings()(token_ids()).dtype == torch.bfloat16
    assert model.lm_head.scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_kl_divergence_is_that_of_float64(architecture):
    """Gemma 2 caps its logits, which the divergence is of."""
    model = build(architecture, tie_word_embeddings=False)
    head, cap = head_of(with_head(model)), getattr(model.config, "final_logit_softcapping", None)
    assert (cap is not None) == (architecture == "gemma2")
    total, tokens = 0.0, 0
    for ids, mask in texts():
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0].double()
        full, rounded = (hidden @ w.T for w in (model.lm_head.weight.detach().double(), dequantized(head)))
        if cap is not None:
            full, rounded = (cap * torch.tanh(y / cap) for y in (full, rounded))
        p, q = full.log_softmax(-1), rounded.log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1)[mask[0]].sum().item()
        tokens += int(mask.sum())
    assert head.tokens == tokens == 24 + 24 + 9
    # A float32 logit is off by some 1e-6; the KL is half the variance of differences of 1e-2, so off by 1e-4 of itself.
    assert head.kl == pytest.approx(total / tokens, rel=1e-3) and head.kl > 0


def test_what_is_measured_is_not_kept():
    model = build("llama")
    before, artifact = logits(model), make_artifact(model, "W4A16")
    with pytest.raises(LowBitError, match="weights.lm_head_bits=2 costs a KL divergence"):  # noqa: RUF043
        quantize_head(model, artifact.checkpoint, 2, texts())
    assert torch.equal(logits(model), before) and not model.lm_head._forward_hooks


def test_another_models_projection_is_refused():
    model = build("llama")
    artifact = with_head(model)
    model.lm_head.weight.data[3, 4] += 1
    with pytest.raises(LowBitError, match="the first lm_head"):
        lowbit.apply_to_huggingface(model, artifact)


@pytest.mark.parametrize("change", ["scaled", "subclass", "three"])
def test_models_whose_projection_is_unknown_are_refused(change):
    if change == "scaled":  # its embedding multiplies by the square root of the width
        model, said = build("gemma2", tie_word_embeddings=True), "Gemma2TextScaledWordEmbedding"
    else:
        model = build("llama", tie_word_embeddings=change == "three")
        said = "FusedHead" if change == "subclass" else "are one weight"
    if change == "subclass":
        model.lm_head.__class__ = type("FusedHead", (nn.Linear,), {})
    if change == "three":
        model.model.layers[0].extra = nn.Linear(64, 128, bias=False)
        model.model.layers[0].extra.weight = model.lm_head.weight
    with pytest.raises(LowBitError, match=f"weights.lm_head_bits does not know .*{said}.*; leave it out"):
        find_head(model)


@pytest.mark.parametrize("reads", ["lm_head", "model.embed_tokens"])
def test_a_model_that_reads_the_weight_itself_is_refused(reads):
    """As Mamba does, for the dtype, and Llama 4, for the device."""
    model = build("llama", tie_word_embeddings=True)
    modules, forward = dict(model.named_modules()), type(model).forward

    def reading(*args: object, **options: object) -> object:
        assert model.get_submodule(reads).weight.dtype == torch.float32
        return forward(model, *args, **options)

    artifact = make_artifact(model, "W4A16")
    model.forward = reading
    with pytest.raises(LowBitError, match="LlamaForCausalLM: its code reads the weight of its output projection"):
        quantize_head(model, artifact.checkpoint, 8, texts())
    assert dict(model.named_modules()) == modules


def test_an_artifact_without_one_leaves_the_projection(tmp_path: Path):
    model = build("llama")
    projection = model.lm_head
    lowbit.apply_to_huggingface(model, save_artifact(make_artifact(model, "W4A8"), tmp_path))
    assert model.lm_head is projection
