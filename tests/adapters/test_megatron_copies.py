"""Copies of a patched GPTModel: each is right by itself, and so is what remains. tests/test_patched_copies.py has those
of Hugging Face models."""

from __future__ import annotations

import dataclasses

import megatron_copies_cases as cases
import pytest
import torch
from commands import needs_megatron
from reassembled_models import reassembled
from tiny_models import build, make_artifact

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron


def full_artifact() -> Artifact:
    """W4A4 linears, quantized attention, reassembled norms and a plan for two ranks."""
    model = build("llama")
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    weights = WeightsConfig(scheme="W4A4", attention=True)
    checkpoint = quantize_model(model, linears, weights, huggingface.fingerprint(model))
    return reassembled(model, Artifact(checkpoint, make_artifact(model, tp_sizes=(2,)).plans))


def unquantized_attention(artifact: Artifact) -> Artifact:
    assert artifact.checkpoint is not None
    return dataclasses.replace(artifact, checkpoint=dataclasses.replace(artifact.checkpoint, attention_bits=16))


@pytest.mark.parametrize("first", ["the copy", "the original"])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_remove_from_one_leaves_the_other(pool_of, size, sequence_parallel, first):
    artifact = full_artifact()
    ranks = pool_of(size).run(cases.copied, sequence_parallel, artifact, first)
    without = pool_of(size).run(cases.copied, sequence_parallel, unquantized_attention(artifact), first)
    for results, other in zip(ranks, without, strict=True):
        plain, patched = results["plain"], results["patched"]
        assert (patched - plain).abs().max() > 0.01 and (patched - other["patched"]).abs().max() > 0.01
        for name in ("twin", "left", "left by zeros"):
            assert torch.equal(results[name], patched), name
        for name in ("removed", "both removed"):
            assert torch.equal(results[name], plain), name
        assert results["kinds left"] == results["kinds"] and not results["kinds removed"]
        assert results["apart"] and results["names"] and not results["traces"]


def test_a_copy_generates_by_its_own_attention(one_rank):
    """The dynamic engine quantizes K and V on their way into its cache, and Q on its way out."""
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    artifact = full_artifact()
    (results,) = one_rank.run(cases.generated_by_copies, artifact, prompts)
    (without,) = one_rank.run(cases.generated_by_copies, unquantized_attention(artifact), prompts)
    assert results["twin"] == results["left"] == results["patched"]
    assert results["removed"] == results["plain"] != results["patched"]
    assert without["patched"] != results["patched"], "attention in 4 bits would not show"


def test_copies_of_a_model_that_a_spec_has_rounded(two_ranks):
    for results in two_ranks.run(cases.rounded_and_copied):
        assert results["kept"], "a load into one rounded the other"
        assert torch.equal(results["twin"], results["rounded"]) and torch.equal(results["late"], results["rounded"])


def test_pickles_are_refused_as_megatron_does(pool_of):
    """A process group lives in its process, and every module of Megatron holds one. A state dict can be pickled."""
    for size in (1, 2):
        for results in pool_of(size).run(cases.pickled, full_artifact()):
            for name in ("plain", "patched"):
                assert "cannot" in results[name] and "pickle" in results[name] and len(results[name].splitlines()) == 1
            assert results["state dict"] and results["kept"] and not results["spoilt"]
