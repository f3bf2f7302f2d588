"""Requests in flight on a Hugging Face model: each gets the tokens that transformers' generate gives it alone."""

from __future__ import annotations

import pytest
import torch
from family_models import build as family_model
from tiny_models import ARCHITECTURES, build, make_artifact, token_ids
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, sdpa_attention_forward

from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
from megatron_lowbit.adapters.huggingface.batching import Batch

NEW = 12
# Requests come in at these steps: some join others in the middle.
ARRIVALS = [0, 0, 1, 5, 5, 9]


def alone(model: nn.Module, ids: list[int]) -> list[int]:
    """generate's tokens; a random model is not asked when to end."""
    inputs = torch.tensor([ids])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    made = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    return made[0, len(ids) :].tolist()


def together(batch: Batch, prompts: list[list[int]], end: int) -> list[list[int]]:
    """Greedy tokens of all, without `end`, as min_new_tokens has it; one is dropped when it has enough."""
    made: list[list[int]] = [[] for _ in prompts]
    most = 0

    def sample(numbers: list[int], logits: torch.Tensor) -> list[int]:
        logits[:, end] = -torch.inf
        for number, token in zip(numbers, logits.argmax(-1).tolist(), strict=True):
            made[number].append(token)
        return [made[number][-1] for number in numbers]

    for step in range(NEW + max(ARRIVALS)):
        add = [(number, prompts[number]) for number, arrival in enumerate(ARRIVALS) if arrival == step]
        drop = [number for number, arrival in enumerate(ARRIVALS) if arrival + NEW == step]
        batch.advance(add, drop, sample)
        most = max(most, len(batch.caches))
    batch.advance([], list(range(len(prompts))), sample)
    assert most > 3 and not batch.caches and not batch.last, "all at once, and nothing is left"
    return made


def prompts(vocab: int) -> list[list[int]]:
    return [ids[: 3 + number].tolist() for number, ids in enumerate(token_ids(len(ARRIVALS), 9, vocab=vocab))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_a_family(architecture):
    """gemma2 keeps a window of eight tokens in every second block, and is longer than that."""
    model = build(architecture)
    batch = Batch(model)
    assert batch.joined
    assert together(batch, prompts(128), 2) == [alone(model, ids) for ids in prompts(128)]


@pytest.mark.parametrize("family", ["bloom", "gptj", "bamba"])
def test_families_that_cannot_share_steps(family):
    """Attention of their own, or a state that is no K and V: they run side by side."""
    model = family_model(family)
    batch = Batch(model)
    assert not batch.joined
    assert together(batch, prompts(1024), 1) == [alone(model, ids) for ids in prompts(1024)]


def test_low_bits_have_the_same_bits():
    """W4A4 with quantized attention and communication of two virtual ranks: codes are exact sums, so that logits do not
    depend on what else is in the batch. The output projection, in float32, is taken out."""
    model = build("llama")
    artifact = make_artifact(model, "W4A4", (2,))
    model.lm_head = nn.Identity()
    apply_to_huggingface(model, artifact, virtual_tp=2)
    ids = prompts(128)
    batch, single = Batch(model), Batch(model)
    assert batch.joined
    for number, prompt in enumerate(ids):
        assert torch.equal(batch.add(number, prompt), single.add(number, prompt))
    for step in range(5):
        tokens = {number: 3 + (7 * number + step) % 100 for number in range(len(ids))}
        joined = batch.step(tokens)
        assert torch.equal(joined, torch.cat([single.step({number: token}) for number, token in tokens.items()]))


def test_eager_attention():
    """It is in each model's own file, not among transformers' functions."""
    model = build("qwen2")
    model.set_attn_implementation("eager")
    batch = Batch(model)
    assert batch.joined
    assert together(batch, prompts(128), 2) == [alone(model, ids) for ids in prompts(128)]


@torch.no_grad()
def test_two_models_in_one_process(monkeypatch):
    """While one is in the middle of a step another one steps, and runs as it is; after it the process's own attention
    function stands where it stood."""
    own: list[int] = []

    def attention(*args, **options):
        own.append(1)
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    first, second = build("llama"), build("qwen2")
    assert {model.config._attn_implementation for model in (first, second)} == {"sdpa"}
    batches, singles = ([Batch(first), Batch(second)] for _ in range(2))
    for batch in (*batches, *singles):
        for number, ids in enumerate(prompts(128)[:2]):
            batch.add(number, ids)
    tokens, ids = {0: 5, 1: 6}, torch.tensor([prompts(128)[0]])
    plain = second(ids).logits
    by_one = [torch.cat([single.step({n: t}) for n, t in tokens.items()]) for single in singles]
    inside: list[torch.Tensor] = []

    def meanwhile(module, inputs):
        inside.extend([batches[1].step(tokens), second(ids).logits])

    with first.model.layers[1].register_forward_pre_hook(meanwhile):
        found = batches[0].step(tokens)
    # float32, with other numbers of rows in the linears' sums.
    for made, want in zip((found, *inside), (*by_one, plain), strict=True):
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention and own
    monkeypatch.undo()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
