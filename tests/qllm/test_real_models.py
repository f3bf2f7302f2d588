"""Trained models, where they are at hand: published perplexity, and real ranks against virtual ones.

The files are no part of this project (their licences differ); these tests skip without them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commands import COMMAND, needs_deepspeed, needs_megatron, run_here, run_there

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, STORIES = DATA / "models" / "stories260K", DATA / "text" / "tinystories_ascii_clean400.json"

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and STORIES.is_file()), reason="the trained models of ../shared/data are not here"
)

HYBRID = ["comm.mode=one_shot", f"calibration.data={STORIES}", "calibration.samples=16"]


def evaluate_rows(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "evaluate.json").read_text())["rows"]}


def arguments(folder: Path, samples: int) -> list[str]:
    return [f"model={MODEL}", f"evaluation.data={STORIES}", f"evaluation.samples={samples}", f"output_dir={folder}"]


@pytest.fixture(scope="module")
def virtual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("virtual")
    assert run_here("evaluate", *arguments(folder, 16), *HYBRID, "virtual_tp=2") == 0
    return evaluate_rows(folder)


def test_perplexity_is_the_published_one(tmp_path):
    """4.08 per token over 300 stories: the figure that came with the model and text, to its last digit."""
    assert run_here("evaluate", *arguments(tmp_path, 300), "evaluation.kl_tokens=0") == 0
    (row,) = evaluate_rows(tmp_path).values()
    assert row["perplexity"] == pytest.approx(4.08, abs=0.005)


def test_perplexity_is_the_models_own_loss(virtual):
    """Story by story, without padding, through the loss that the model itself computes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        AutoTokenizer.from_pretrained(MODEL),
    )
    total, tokens = 0.0, 0
    for story in json.loads(STORIES.read_text())[:16]:
        ids = torch.tensor([tokenizer(story)["input_ids"][: model.config.max_position_embeddings]])
        with torch.inference_mode():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert virtual["full precision"]["tokens"] == tokens
    assert virtual["full precision"]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_hybrid_communication_is_close_to_full_precision(virtual):
    full, hybrid = virtual["full precision"], virtual["full precision + per-token tiered int4"]
    # Four bits cost this small model a few percent; a wrong site or a wrong scale costs it everything.
    assert 1.0 < hybrid["perplexity"] / full["perplexity"] < 1.10
    assert 0 < hybrid["kl"] < 0.15
    assert 4 < hybrid["bits_per_value"] <= 4 + 12 / 64  # the budget: one of 64 features in bf16
    assert min(hybrid["sites"].values()) > 10


@needs_deepspeed
def test_real_ranks_equal_virtual_ranks(virtual, tmp_path):
    code, _, stderr = run_there(
        *COMMAND, "evaluate", *arguments(tmp_path, 16), *HYBRID, "engine=deepspeed", "tp=2", OMP_NUM_THREADS="1"
    )
    assert code == 0, stderr
    real = evaluate_rows(tmp_path)
    assert list(real) == list(virtual)
    for name, row in real.items():
        # The first row differs by float32 rounding. In the second a value may fall on the other side of a boundary.
        tolerance = 1e-5 if name == "full precision" else 1e-3
        assert row["perplexity"] == pytest.approx(virtual[name]["perplexity"], rel=tolerance), name
        assert row["tokens"] == virtual[name]["tokens"]
    assert real[name]["kl"] == pytest.approx(virtual[name]["kl"], rel=0.05)
    assert real[name]["bytes_per_token"] == virtual[name]["bytes_per_token"]


@needs_megatron
@pytest.mark.parametrize("model", [pytest.param("stories260K", marks=pytest.mark.slow), "babyllama105"])
def test_megatron_makes_the_tokens_of_virtual_ranks(tmp_path, model):
    """One artifact with 4-bit weights, activations and messages, greedy: the first slip would change all that follows.

    The 105 words of the second model do not divide among two ranks.
    """
    weights = ["weights.method=rtn", "weights.scheme=W4A4", "comm.tp_sizes=[2]", *HYBRID[1:]]
    assert run_here("quantize", f"model={MODEL.parent / model}", *weights, f"output_dir={tmp_path}") == 0
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe little dog\nTim and his mom went to the park\n")
    use = ["generate", f"artifact={tmp_path}", f"prompts={tmp_path / 'prompts.txt'}", "max_new_tokens=24"]
    virtual, real = tmp_path / "virtual", tmp_path / "real"
    assert run_here(*use, "virtual_tp=2", f"output_dir={virtual}") == 0
    command = [*COMMAND, *use, "engine=megatron", "tp=2", f"output_dir={real}"]
    code, _, stderr = run_there(*command, OMP_NUM_THREADS="1")
    assert code == 0, stderr
    made, expected = (
        [row["tokens"] for row in json.loads((folder / "generate.json").read_text())["rows"]]
        for folder in (real, virtual)
    )
    assert made == expected and all(len(new) == 24 for new in made)
