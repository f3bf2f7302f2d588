"""Q, K and V quantized per token and head, and kept packed in the cache, against attention written down again."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.cache import layer_classes
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.kernels import decode_tokens, packed_bytes
from megatron_lowbit.quant.round_to_nearest import quantize_model

MODELS = ("llama", "gemma2", "qwen3")  # sdpa with GQA; eager, softcapping and a window of 8; norms of q and k
TOKENS = 20
FLOAT32_NOISE = 1e-5  # of logits up to 10: 10 of their last places; a flipped 4-bit code moves them by 0.01 or more


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint_of(model: nn.Module, quantized_attention: bool = True) -> Artifact:
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    config = WeightsConfig(scheme="W4A4", attention=quantized_attention)
    return Artifact(quantize_model(model, linears, config, huggingface.fingerprint(model)), {})


def quantized_model(architecture: str) -> nn.Module:
    model = tiny_models.build(architecture)
    return lowbit.apply_to_huggingface(model, checkpoint_of(model))


def attentions(model: nn.Module) -> list[nn.Module]:
    return [block.self_attn for block in huggingface.decoder_blocks(model)[1]]  # type: ignore[misc]


# The arithmetic


def rounded(x: Tensor, bits: int) -> Tensor:
    """Per row of the last dimension, by the independent float64 quantizer."""
    rows = x.detach().double().numpy()
    scale, zero = oracles.qparams(rows.min(-1, keepdims=True), rows.max(-1, keepdims=True), bits)
    return torch.from_numpy((oracles.quantize(rows, scale, zero, bits) - zero) * scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention_by_hand(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, bits: int) -> Tensor:
    """What o_proj is given, one head at a time: softmax(Q(q) Q(k)^T / sqrt(d) + mask) Q(v), each query head with the
    KV head of its group."""
    config, width = module.config, module.head_dim
    split = [getattr(module, f"{name}_proj")(x).unflatten(-1, (-1, width)).transpose(1, 2) for name in "qkv"]
    if hasattr(module, "q_norm"):
        split[:2] = [module.q_norm(split[0]), module.k_norm(split[1])]
    q, k, v = rotate(split[0], cos, sin), rotate(split[1], cos, sin), split[2]
    if bits < 16:
        q, k, v = rounded(q, bits), rounded(k, bits), rounded(v, bits)
    q, k, v = q.double(), k.double(), v.double()
    scale = getattr(config, "query_pre_attn_scalar", width) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    queries = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // queries].transpose(1, 2) * scale
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        heads.append((scores + mask[0].double()).softmax(-1) @ v[:, head // queries])
    return torch.cat(heads, -1)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("bits", (3, 4, 8, 16))
@torch.inference_mode()
def test_attention_by_hand(architecture, bits):
    """Full-precision projections, so that nothing but the attention is compared; 16 bits: as without this module."""
    model = tiny_models.build(architecture)
    (module, _), x = attentions(model), normal(2, 12, 64, seed=1)
    cos, sin = model.model.rotary_emb(x, torch.arange(12)[None])
    mask = torch.full((12, 12), -math.inf).triu(1)[None, None]
    attention.enable(model.config)
    attention.set_bits([module], bits)
    given: list[Tensor] = []
    module.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    module(x, position_embeddings=(cos, sin), attention_mask=mask)
    expected = attention_by_hand(module, x, cos.unsqueeze(1), sin.unsqueeze(1), mask, bits)
    torch.testing.assert_close(given[0].double(), expected, rtol=1e-5, atol=1e-5)
    exact = attention_by_hand(module, x, cos.unsqueeze(1), sin.unsqueeze(1), mask, 16)
    assert (expected - exact).abs().max() > 0.01 or bits >= 8


@pytest.mark.parametrize("architecture", MODELS)
def test_enabling_alone_changes_nothing(architecture):
    """Registered for all attention modules, but one without a number of bits computes as before, bit for bit."""
    model = tiny_models.build(architecture)
    ids = tiny_models.token_ids(2, TOKENS)
    before = tiny_models.logits(model, ids)
    implementation = model.config._attn_implementation
    assert attention.enable(model.config) == implementation
    assert model.config._attn_implementation == f"lowbit_{implementation}"
    assert torch.equal(tiny_models.logits(model, ids), before)
    attention.set_bits(attentions(model), 4)
    assert not torch.equal(tiny_models.logits(model, ids), before)
    attention.set_bits(attentions(model), 16)
    assert torch.equal(tiny_models.logits(model, ids), before)


@pytest.mark.parametrize("architecture", MODELS)
def test_attention_bits_come_with_the_checkpoint(architecture):
    """attention=True quantizes it to the activations' bits, attention=False leaves it and the cache alone."""
    model = tiny_models.build(architecture)
    quantized, plain = checkpoint_of(model), checkpoint_of(model, False)
    assert quantized.checkpoint is not None and plain.checkpoint is not None
    assert (quantized.checkpoint.attention_bits, plain.checkpoint.attention_bits) == (4, 16)
    implementation, ids = model.config._attn_implementation, tiny_models.token_ids(2, TOKENS)
    with_plain = tiny_models.logits(lowbit.apply_to_huggingface(model, plain), ids)
    assert model.config._attn_implementation == implementation
    assert cache_of(model, ids).layers[1].keys.dtype == torch.float32
    with_quantized = tiny_models.logits(lowbit.apply_to_huggingface(model, quantized), ids)
    assert (with_plain - with_quantized).abs().max() > 0.01
    # By hand, on the other checkpoint: the same linears, and attention modules told to quantize.
    lowbit.apply_to_huggingface(model, plain)
    attention.enable(model.config)
    attention.set_bits(attentions(model), 4)
    assert torch.equal(tiny_models.logits(model, ids), with_quantized)


# The cache


@torch.inference_mode()
def cache_of(model: nn.Module, ids: Tensor, cache: DynamicCache | None = None) -> DynamicCache:
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def logits_in_steps(model: nn.Module, ids: Tensor, lengths: tuple[int, ...], cache: DynamicCache) -> Tensor:
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(lengths, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("lengths", [(7, 1, 1, 3, 8), (TOKENS - 1, 1), (1,) * TOKENS], ids=str)
def test_logits_with_cache(architecture, lengths):
    """Quantized once when they enter the cache, K and V are those that a forward without cache quantizes at once.

    Float32 sums over different shapes differ in their last bits, which could flip a code of 4 bits: these seeds have
    none.
    """
    model, ids = quantized_model(architecture), tiny_models.token_ids(2, TOKENS)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
    stepwise = logits_in_steps(model, ids, lengths, DynamicCache(config=model.config))
    assert (stepwise - whole).abs().max() < FLOAT32_NOISE
    attention.set_bits(attentions(model), 16)
    with torch.inference_mode():
        assert (model(input_ids=ids, use_cache=False).logits - whole).abs().max() > 1000 * FLOAT32_NOISE


@pytest.mark.parametrize("architecture", MODELS)
def test_generation(architecture):
    """Greedy generation with its cache picks the tokens that forwards without a cache pick, left padding included."""
    model = quantized_model(architecture)
    ids, mask = tiny_models.token_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    ids[1, :2], mask[1, :2] = 0, 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    fast = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert fast.sequences.shape == (2, 18) and torch.equal(fast.sequences, slow.sequences)
    assert (torch.stack(fast.logits) - torch.stack(slow.logits)).abs().max() < FLOAT32_NOISE


@pytest.mark.parametrize(("architecture", "head_dim", "packed"), [("llama", 8, 2), ("gemma2", 16, 1), ("qwen3", 8, 2)])
def test_cache_is_packed(architecture, head_dim, packed):
    """uint8 rows of codes, a scale and a zero point; Gemma 2's layer with a window stays as it is."""
    model, ids = quantized_model(architecture), tiny_models.token_ids(2, TOKENS)
    row = packed_bytes(head_dim, 4) + 8
    assert row == head_dim // 2 + 8
    for cache in (DynamicCache(config=model.config), DynamicCache()):  # layers that are there, and that are added
        if architecture == "gemma2" and not cache.layers:
            continue  # without a config no layer knows its window, so none is Gemma's
        cache_of(model, ids[:, :5], cache)
        cache_of(model, ids[:, 5:], cache)
        layers = [layer for layer in cache.layers if isinstance(layer, layer_classes().packed)]
        assert len(layers) == packed and len(cache.layers) == 2
        for layer in layers:
            for rows in (layer.keys, layer.values):
                assert rows.dtype == torch.uint8 and rows.shape == (2, 4, TOKENS, row)
                assert rows.nbytes == 2 * 4 * TOKENS * row
            assert layer.get_seq_length() == TOKENS
        for layer in cache.layers:
            if layer not in layers:
                assert layer.is_sliding and layer.keys.dtype == torch.float32
        assert cache.get_seq_length() == TOKENS


def test_cache_holds_what_attention_reads():
    """The packed rows of layer 0 decode to this test's own rounding of K after RoPE and of V."""
    model, ids = quantized_model("llama"), tiny_models.token_ids(2, TOKENS)
    module, seen = attentions(model)[0], []
    module.v_proj.register_forward_hook(lambda _, args, output: seen.append(output))
    layer = cache_of(model, ids).layers[0]
    values = rounded(seen[0].unflatten(-1, (-1, 8)).transpose(1, 2), 4)
    decoded = decode_tokens(layer.values, 4, 8, torch.float32)
    torch.testing.assert_close(decoded.double(), values, rtol=1e-5, atol=1e-5)
    assert decoded.flatten(0, -2).unique(dim=0).shape[0] > 50, "rows differ, so it is known which is which"


def test_cache_survives_what_transformers_does_to_it():
    """Cropped, reordered and repeated along batch and tokens, a packed cache goes on as the same text would."""
    model, ids = quantized_model("llama"), tiny_models.token_ids(2, TOKENS)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[:, 12:]

        def go_on(cache: DynamicCache, rows: Tensor) -> Tensor:
            return model(input_ids=rows[:, 12:], past_key_values=cache, use_cache=True).logits

        cache = cache_of(model, torch.cat([ids[:, :12], ids[:, :3]], 1))
        cache.crop(-3)
        assert (go_on(cache, ids) - whole).abs().max() < FLOAT32_NOISE
        cache = cache_of(model, ids[:, :12])
        cache.reorder_cache(torch.tensor([1, 0]))
        assert (go_on(cache, ids.flip(0)) - whole.flip(0)).abs().max() < FLOAT32_NOISE
        cache = cache_of(model, ids[:, :12])
        cache.batch_repeat_interleave(3)
        assert (go_on(cache, ids.repeat_interleave(3, 0)) - whole.repeat_interleave(3, 0)).abs().max() < FLOAT32_NOISE
        beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
        fast, slow = (model.generate(input_ids=ids[:, :6], use_cache=use, **beams) for use in (True, False))
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("architecture", MODELS)
def test_remove(architecture):
    """Back to the model as it was: its attention, its cache, its logits, bit for bit; also after two applications."""
    model, ids = tiny_models.build(architecture), tiny_models.token_ids(2, TOKENS)
    before, implementation = tiny_models.logits(model, ids), model.config._attn_implementation
    artifact = checkpoint_of(model)
    lowbit.apply_to_huggingface(model, artifact)
    first = tiny_models.logits(model, ids)
    lowbit.apply_to_huggingface(model, artifact)
    assert torch.equal(tiny_models.logits(model, ids), first) and not torch.equal(first, before)
    assert model.config._attn_implementation == f"lowbit_{implementation}"
    lowbit.remove(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(tiny_models.logits(model, ids), before)
    packed = layer_classes().packed
    cache = cache_of(model, ids)
    assert not any(isinstance(layer, packed) for layer in cache.layers)
    assert all(layer.keys.dtype == torch.float32 for layer in cache.layers)
    lowbit.remove(model)  # once more: nothing left to do
    assert model.config._attn_implementation == implementation
    lowbit.apply_to_huggingface(model, artifact)
    assert torch.equal(tiny_models.logits(model, ids), first)
