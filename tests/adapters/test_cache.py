"""KV caches that grow in place, against torch.cat and transformers' own DynamicCache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.cache import SPARE_TOKENS, layer_classes
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.quant.round_to_nearest import quantize_model

SHAPE = (2, 3, 5)  # batch, heads, width; tokens come between


def patched_model(architecture: str, attention: bool = False) -> nn.Module:
    model = tiny_models.build(architecture)
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    config = WeightsConfig(scheme="W4A8", attention=attention)
    return lowbit.apply_to_huggingface(
        model, Artifact(quantize_model(model, linears, config, huggingface.fingerprint(model)), {})
    )


def some(tokens: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    batch, heads, width = shape
    return torch.randn(batch, heads, tokens, width, generator=torch.Generator().manual_seed(seed))


def filled(tokens: int = 4) -> Any:
    """A layer with room: it has been given a prompt, which gets none, and a token more."""
    layer = layer_classes().growing()
    with torch.no_grad():
        for part, has_room in ((slice(tokens - 1), False), (slice(tokens - 1, tokens), True)):
            layer.update(some(tokens, 1)[..., part, :], some(tokens, 2)[..., part, :])
            assert (layer.key_room is not None) == has_room
    return layer


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_logits_are_those_of_a_dynamic_cache(architecture):
    """Prompt and 70 tokens, which is more than the room of the first: bit for bit, with Gemma 2's window beside it."""
    ids = tiny_models.token_ids(2, 6 + SPARE_TOKENS + 6)
    logits: list[Tensor] = []
    for stock in (False, True):
        model = patched_model(architecture)
        if stock:
            for module in model.modules():
                module._forward_pre_hooks.clear()
        cache = DynamicCache(config=model.config)
        steps = [ids[:, :6], *ids[:, 6:].split(1, 1)]
        with torch.inference_mode():
            out = [model(input_ids=step, past_key_values=cache, use_cache=True).logits for step in steps]
        logits.append(torch.cat(out, 1))
        kinds = [type(layer) for layer in cache.layers if not layer.is_sliding]
        assert kinds and set(kinds) == {DynamicLayer if stock else layer_classes().growing}
    assert torch.equal(*logits)


@pytest.mark.parametrize("packed", [False, True])
def test_new_tokens_alone_are_written(packed):
    """The tokens before stay where they are, but for the first one's, until the room is full: then all are copied."""
    layers = layer_classes()
    layer = layers.packed(8) if packed else layers.growing()
    places = []
    with torch.inference_mode():
        for seed in range(2 * SPARE_TOKENS + 3):
            layer.update(some(1, seed), some(1, seed))
            places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(set(places)) == 2 + 1
    assert layer.get_seq_length() == 2 * SPARE_TOKENS + 3


def test_it_holds_what_torch_cat_would():
    pieces = [some(n, seed) for seed, n in enumerate((5, 1, 1, SPARE_TOKENS, 1, 3))]
    layer = layer_classes().growing()
    with torch.no_grad():
        for piece in pieces:
            keys, values = layer.update(piece, -piece)
    whole = torch.cat(pieces, -2)
    assert torch.equal(keys, whole) and torch.equal(values, -whole)


def test_what_was_read_before_is_not_overwritten():
    """A cache cropped and gone on with, and a copy of it that shares its memory: neither changes the other's tokens."""
    layer = filled()
    before = layer.keys
    kept, twin = before.clone(), copy.copy(layer)
    with torch.no_grad():
        layer.crop(-2)
        mine, _ = layer.update(some(2, 7), some(2, 7))
        twin.update(some(2, 8), some(2, 8))
        again, _ = layer.update(some(1, 9), some(1, 9))
    assert torch.equal(before, kept)
    assert torch.equal(mine, torch.cat([kept[..., :2, :], some(2, 7)], -2))
    assert torch.equal(twin.keys, torch.cat([kept, some(2, 8)], -2))
    assert torch.equal(again, torch.cat([mine, some(1, 9)], -2))


def test_a_deep_copy_goes_on_by_itself():
    layer = filled()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.update(some(1, 7), some(1, 7))
        twin.update(some(1, 8), some(1, 8))
    assert torch.equal(layer.keys, torch.cat([some(4, 1), some(1, 7)], -2))
    assert torch.equal(twin.keys, torch.cat([some(4, 1), some(1, 8)], -2))


def test_a_cache_that_is_reset_begins_anew():
    layer = filled()
    layer.reset()
    assert layer.key_room is layer.value_room is None, "its memory is free"
    with torch.no_grad():
        keys, _ = layer.update(some(2, 7, (1, 3, 5)), some(2, 7, (1, 3, 5)))
    assert torch.equal(keys, some(2, 7, (1, 3, 5)))


def test_outside_inference_mode_it_goes_on():
    with torch.inference_mode():
        layer = layer_classes().growing()
        layer.update(some(3), some(3))
        layer.update(some(1, 1), some(1, 1))
    with torch.no_grad():
        keys, _ = layer.update(some(1, 2), some(1, 2))
    assert torch.equal(keys, torch.cat([some(3), some(1, 1), some(1, 2)], -2))


def test_a_backward_pass_sees_what_the_forward_saw():
    """With gradients K is copied, as ever: what autograd kept is not written to afterwards."""
    layer, key = filled(), some(1, 7).requires_grad_()
    keys, _ = layer.update(key, some(1, 7))
    loss = keys.square().sum()
    with torch.no_grad():
        for seed in (8, 9):
            layer.update(some(1, seed), some(1, seed))
    loss.backward()
    assert key.grad is not None and torch.equal(key.grad, 2 * key.detach())


def test_tokens_of_another_batch_are_an_error():
    layer = filled()
    with torch.no_grad(), pytest.raises(RuntimeError, match="izes of tensors must match"):
        layer.update(some(1, 7, (1, 3, 5)), some(1, 7, (1, 3, 5)))


def test_a_compiled_model_is_one_graph():
    """The layers are transformers' own then, which torch.compile can trace."""
    model, ids = patched_model("llama"), tiny_models.token_ids(1, 7)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    logits = []
    for run in (model, compiled):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [ids[:, :5], ids[:, 5:6], ids[:, 6:]]
            out = [run(input_ids=step, past_key_values=cache, use_cache=True).logits for step in steps]
        logits.append(torch.cat(out, 1))
    assert torch.equal(*logits)


def test_beams_and_remove():
    """Beam search reorders and repeats the cache at every token; afterwards caches are transformers' own again."""
    model, ids = patched_model("llama"), tiny_models.token_ids(2, 6)
    beams: Any = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    generate: Any = model.generate
    fast, slow = (generate(input_ids=ids, use_cache=use, **beams) for use in (True, False))
    assert torch.equal(fast, slow)
    lowbit.remove(model)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}
