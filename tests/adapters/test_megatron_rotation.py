"""Rotated artifacts in Megatron-Core, on real ranks, against the Hugging Face model on virtual ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import megatron_cases
import megatron_checkpoint_cases
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from slow_cases import slow
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.launch.engines.prepare import round_weights

pytestmark = needs_megatron

# A vocabulary that four ranks pad. phi3's Q, K and V are one linear, so V stays; biases of V are turned by heads.
ARCHITECTURES = ["llama", "llama with biases", "qwen3", "phi3"]
LAYOUTS = [(1, False), (2, True), (4, False)]
VOCAB = 130


def rounded(model) -> Artifact:
    config = WeightsConfig(scheme="W4A4", attention=True, rotation="hadamard")
    return Artifact(round_weights(model, config, None, seed=2))


@functools.cache
def artifact(architecture: str) -> Artifact:
    return rounded(tiny_models.build(architecture, vocab_size=VOCAB))


@functools.cache
def reference(architecture: str, size: int) -> Tensor:
    model = tiny_models.build(architecture, vocab_size=VOCAB)
    lowbit.apply_to_huggingface(model, artifact(architecture), size)
    return tiny_models.logits(model, megatron_cases.token_ids())[..., : tiny_models.VOCAB]


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_hugging_face(pool_of, architecture, size, sequence_parallel):
    artifacts = {"rotated": (artifact(architecture), None)}
    changes = {"vocab_size": VOCAB}
    ranks = pool_of(size).run(megatron_cases.applied, architecture, sequence_parallel, artifacts, changes)
    for rank in ranks:
        assert_equal_but_for_flips(rank["rotated"], reference(architecture, size), windows=1 / 4, flip=0.5)
        assert rank["same_modules"] and torch.equal(rank["removed"], rank["unpatched"])
        assert not torch.equal(rank["rotated"], rank["unpatched"])


def test_a_tied_model_is_refused(two_ranks):
    """Its embedding is its output projection; the artifact's are two."""
    tied = rounded(tiny_models.build("llama", tie_word_embeddings=True))
    for message in two_ranks.run(megatron_cases.refused_tied, tied):
        assert "untie_embeddings_and_output_weights" in message and "\n" not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # An MLP of 96 inputs: four-bit codes of two ranks end at whole bytes.
    return tiny_models.save_model("mistral", tmp_path_factory.mktemp("mistral"), sliding_window=None)


@pytest.mark.parametrize(("saved", "loaded"), [slow(1, 2), (2, 1)])
def test_distributed_checkpoints(folder, saved, loaded, pool_of, tmp_path):
    """What runs online is stored, and the embeddings are the artifact's, at another size too."""
    given = rounded(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    job = (folder, given, tmp_path / "checkpoint")
    pool_of(saved).run(megatron_checkpoint_cases.save, saved, 1, [job])
    for rank in pool_of(loaded).run(megatron_checkpoint_cases.load, loaded, 1, {"rotated": job}):
        result = rank["rotated"]
        assert result["logits_equal"] and not result["differing"] and not result["traits"]
