"""Patched DeepSpeed engines: layers that stay, copies and folders, and the engines of deepspeed.initialize."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import deepspeed_cases
import pytest
from closeness import assert_equal_but_for_flips
from commands import needs_deepspeed
from rank_pool import RankPool
from reassembled_models import reassembled
from slow_cases import slow
from tiny_models import FusedLinear, build, logits, make_artifact, save_artifact

import megatron_lowbit as lowbit

pytestmark = needs_deepspeed


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.k_proj"])
def test_layers_in_full_precision_read_the_plain_norm(two_ranks, tmp_path, name, merge):
    """As the Hugging Face adapter, which is tested against full-precision arithmetic, with the same linear left."""
    name, model = f"model.layers.1.{name}", build("llama")
    folder = save_artifact(reassembled(model, make_artifact(model, "W4A16"), merge), tmp_path)
    model.get_submodule(name).__class__ = FusedLinear
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(lowbit.apply_to_huggingface(model, folder, 2))
    for results in two_ranks.run(deepspeed_cases.other_readers, folder, name):
        assert_equal_but_for_flips(results["logits"], expected)
        assert results["removed"]
        assert any(f"FusedLinearLayer (first: {name})" in warning for warning in results["warnings"])
        assert any(f"find no linear to replace: {name}" in warning for warning in results["warnings"])


def test_copies_and_saved_folders_of_an_engine(two_ranks, tmp_path):
    model = build("llama")
    folder = save_artifact(make_artifact(model, "W4A8", (2,)), tmp_path / "artifact")
    expected = logits(lowbit.apply_to_huggingface(model, folder, 2))
    for results in two_ranks.run(deepspeed_cases.copies, folder, tmp_path / "saved"):
        assert results["copied"] and results["removed"] and results["kept"]
        assert "cannot be pickled" in results["pickle"] and "save_pretrained" in results["pickle"]
        assert_equal_but_for_flips(results["logits"], expected)
    assert (logits(lowbit.apply_to_huggingface(build("llama"), tmp_path / "saved", 2)) == expected).all()


def test_an_engine_in_a_pipeline(two_ranks, tmp_path):
    """pipe.model = engine.module. Logits differ by about 1e-5 from virtual ranks' (sums in another order), so only a
    near tie of two tokens could fall the other way; these prompts have none."""
    prompts = ["import os\n", "class A:\n    def __init__(self"]
    model = deepspeed_cases.embedded_model()
    folder = save_artifact(make_artifact(model, "W4A8", (2,)), tmp_path)
    expected = deepspeed_cases.piped(lowbit.apply_to_huggingface(model, folder, 2), prompts)
    assert all(len(text) > len(prompt) for text, prompt in zip(expected, prompts, strict=True))
    assert two_ranks.run(deepspeed_cases.pipeline, folder, prompts) == [expected, expected]


def test_slips_are_one_line(two_ranks, tmp_path):
    folder = save_artifact(make_artifact(build("llama"), "W4A16"), tmp_path)
    for swapped, twice, model, mode in two_ranks.run(deepspeed_cases.arguments, folder):
        assert swapped.startswith("apply_to_deepspeed takes a DeepSpeed engine first") and "swap" in swapped
        assert twice.startswith("apply_to_deepspeed takes the model first") and "swap" in twice
        assert "has not sharded this LlamaForCausalLM" in model and "apply_to_huggingface" in model
        assert mode.startswith("comm_mode='twoshot' is not one of") and mode.endswith("did you mean 'two_shot'?")
        assert not any("\n" in message for message in (swapped, twice, model, mode))


def test_engines_of_initialize(tmp_path):
    model = build("llama")
    weights = save_artifact(make_artifact(model, "W4A8", (2,)), tmp_path / "weights")
    plans = save_artifact(make_artifact(model, tp_sizes=(2,)), tmp_path / "plans")
    expected = logits(lowbit.apply_to_huggingface(model, weights, 2, deepspeed_cases.EVERY_SITE))
    pool = RankPool(2)  # of its own: AutoTP of deepspeed.initialize leaves a process changed
    try:
        ranks = pool.run(deepspeed_cases.initialized_engines, weights, plans, tmp_path)
    finally:
        pool.close()
    for results in ranks:
        for stage in (1, 3):
            losses = results[f"losses {stage}"]
            assert losses[-1] < losses[0] - 1 and results[f"resumed {stage}"]
        applied, saved = results["zero 3"]
        assert applied.startswith("ZeRO stage 3") and "before deepspeed.initialize" in applied
        assert saved.startswith("save_pretrained: ZeRO stage 3") and "state_dict=" in saved
        assert_equal_but_for_flips(results["logits"], expected)
        for made in ("save_16bit_model", "save_16bit_model 1", "save_16bit_model 3"):
            assert results[made].startswith("save_16bit_model: ") and "save_pretrained" in results[made]
        assert results["removed"] and (tmp_path / "half/pytorch_model.bin").exists()
        assert "packed weights cannot be trained" in results["optimizer"]
        assert results["losses of the plan"][-1] < results["losses of the plan"][0] - 1


BEFORE_ITS_IMPORT = """
import sys, tiny_models, deepspeed_cases, megatron_lowbit as lowbit
model = lowbit.apply_to_huggingface(tiny_models.build("llama"), sys.argv[1])
assert "deepspeed" not in sys.modules
import deepspeed.runtime.engine as engines
engine = engines.DeepSpeedEngine.__new__(engines.DeepSpeedEngine)
engine.__dict__["module"] = {wrapped}
print(deepspeed_cases.message_of(lambda: engine.save_16bit_model("nowhere")))
"""


@pytest.mark.parametrize("wrapped", [slow("model"), "__import__('torch').nn.Sequential(model)"])
def test_a_patch_before_deepspeed_is_imported(wrapped, tmp_path):
    folder = save_artifact(make_artifact(build("llama"), "W4A8"), tmp_path)
    command = [sys.executable, "-c", BEFORE_ITS_IMPORT.format(wrapped=wrapped), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "\nsave_16bit_model: the engine" in f"\n{done.stdout}", done.stderr
