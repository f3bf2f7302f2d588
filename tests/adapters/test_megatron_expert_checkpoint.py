"""Experts in codes in Megatron's distributed checkpoints, and mixtures in `megatron-lowbit convert`, there and back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import megatron_cases
import megatron_expert_checkpoint_cases as cases
import pytest
import tiny_models
from closeness import assert_equal_but_for_flips
from commands import needs_megatron, run_here
from safetensors.torch import load_file
from slow_cases import slow_but
from tiny_models import add_tokenizer, build, make_artifact, save_artifact

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.experts import attach_experts
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron

# {name: (architecture, what differs)}, with the vocabulary of the embedded model's tokenizer.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "fewer": ("mixtral", {"num_local_experts": 2}),
    "narrow": ("mixtral", {"intermediate_size": 64}),
    "odd": ("qwen3_moe", {"moe_intermediate_size": 42}),
}
# {name: (model, scheme of linears and experts, group size, whether with a plan)}
ARTIFACTS = {
    "W8A8 and a plan": ("mixtral", "W8A8", None, True),
    "W4A16 in groups": ("mixtral", "W4A16", 8, False),
    "experts of one block": ("qwen3_moe", "W8A8", None, False),
    "odd": ("odd", "W4A16", None, False),
    "shared expert and a plan": ("qwen2_moe", "W8A8", None, True),
}


@functools.cache
def model(name: str) -> Any:
    architecture, changes = MODELS[name]
    return build(architecture, vocab_size=1024, bos_token_id=0, eos_token_id=1, **changes)


@functools.cache
def artifact(name: str) -> Artifact:
    source, scheme, group_size, plan = ARTIFACTS[name]
    hf, config = model(source), WeightsConfig(scheme=scheme, experts=scheme, group_size=group_size)
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(hf).items()}
    checkpoint = quantize_model(hf, linears, config, huggingface.fingerprint(hf))
    plans = make_artifact(hf, tp_sizes=(2,)).plans if plan else {}
    return Artifact(attach_experts(hf, checkpoint, config), plans)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        model(name).save_pretrained(root / name)
        add_tokenizer(root / name)
    return {name: root / name for name in MODELS}


def jobs(folders: dict[str, Path], root: Path, *names: str) -> cases.Jobs:
    return {root / name: (folders[ARTIFACTS[name][0]], artifact(name)) for name in names}


FITTING = ("W8A8 and a plan", "W4A16 in groups", "experts of one block", "shared expert and a plan")


@pytest.fixture(scope="module")
def by_experts(two_ranks, folders, tmp_path_factory) -> cases.Jobs:
    """Checkpoints of all artifacts, saved by ranks that have half of the experts each."""
    given = jobs(folders, tmp_path_factory.mktemp("saved"), *ARTIFACTS)
    assert two_ranks.run(cases.save, 1, 2, given) == [["accepted"] * len(given)] * 2
    return given


def assert_loaded(ranks: list[dict[str, Any]], count: int) -> None:
    """Tensors and logits are as if the artifact had been applied there, to the last bit."""
    for results in ranks:
        assert len(results) == count
        for name, outcome in results.items():
            assert outcome["differing"] == [] and outcome["traits"] == [], (name, outcome)
            assert outcome["experts"] and outcome["logits_equal"], (name, outcome)


def test_ranks_that_share_experts_load_what_owners_saved(two_ranks, by_experts):
    given = {folder: job for folder, job in by_experts.items() if folder.name in FITTING}
    assert_loaded(two_ranks.run(cases.loaded, 2, 1, given), 4)


@pytest.mark.slow
def test_owners_load_what_ranks_saved_that_share_experts(two_ranks, folders, tmp_path):
    given = jobs(folders, tmp_path, *FITTING[:2])
    assert two_ranks.run(cases.save, 2, 1, given) == [["accepted"] * 2] * 2
    assert_loaded(two_ranks.run(cases.loaded, 1, 2, given), 2)


def test_experts_that_do_not_fit(two_ranks, folders, by_experts, tmp_path):
    """One line, and the model keeps its modules. 21 inputs of 4 bits end inside a byte."""
    saved = {folder.name: folder for folder in by_experts}
    given = {folders[name]: saved["W8A8 and a plan"] for name in ("fewer", "narrow")} | {folders["odd"]: saved["odd"]}
    for lines in two_ranks.run(cases.refused, 2, given):
        assert "linear_fc1 of 2 x [192, 64] in the GPTModel and 4 x [192, 64] in the checkpoint" in lines[0]
        assert "linear_fc1 of 4 x [128, 64] in the GPTModel and 4 x [192, 64] in the checkpoint" in lines[1]
        assert "experts.linear_fc2: a rank's 21 inputs of 4 bits end inside a byte" in lines[2]
        assert not any("\n" in line for line in lines)
    for (line,) in two_ranks.run(cases.save, 2, 1, jobs(folders, tmp_path, "odd")):
        assert "experts.linear_fc2: a rank's 21 inputs of 4 bits end inside a byte" in line
    assert not list(tmp_path.iterdir())


def test_a_shared_expert_whose_sums_are_sent_apart(two_ranks, folders, by_experts):
    saved = next(folder for folder in by_experts if folder.name == "shared expert and a plan")
    for line in two_ranks.run(cases.overlapped, folders["qwen2_moe"], saved):
        assert line.startswith("moe_shared_expert_overlap=True sends") and "\n" not in line


@pytest.mark.parametrize("name", slow_but(["mixtral"], tiny_models.MIXTURES))
def test_convert_there_and_back(folders, tmp_path, name):
    """Every tensor of the model's file, bit for bit; a script is told of the experts."""
    assert run_here("convert", f"model={folders[name]}", f"output_dir={tmp_path}") == 0
    options = (tmp_path / "megatron" / "megatron_arguments.txt").read_text().splitlines()
    frequency, count = {"mixtral": ("([1,1])", 4), "qwen3_moe": ("([0,1])", 6), "qwen2_moe": ("([0,1])", 4)}[name]
    assert f"--moe-layer-freq {frequency}" in options and f"--num-experts {count}" in options
    shared = [line for line in options if "shared-expert" in line]
    told = ["--moe-shared-expert-intermediate-size 48", "--moe-shared-expert-gate"]
    assert shared == (told if name == "qwen2_moe" else [])
    assert run_here("convert", f"checkpoint={tmp_path / 'megatron'}", f"output_dir={tmp_path}") == 0
    before, after = (load_file(f / "model.safetensors") for f in (folders[name], tmp_path / "huggingface"))
    assert before.keys() == after.keys() and any("experts" in key for key in before)
    assert all(before[key].dtype == after[key].dtype and before[key].equal(after[key]) for key in before)


@pytest.mark.slow
def test_a_converted_artifact_in_a_script(two_ranks, folders, tmp_path):
    """The spec that convert names, with --load: logits of transformers on two virtual ranks."""
    checkpoints, names = {}, {"W8A8 and a plan": "mixtral", "experts of one block": "qwen3_moe"}
    for name, source in names.items():
        folder = save_artifact(artifact(name), tmp_path / source)
        model(source).config.save_pretrained(folder)
        artifact(name).checkpoint.save(add_tokenizer(folder))  # with the checksums of what lies beside
        assert run_here("convert", f"artifact={folder}", f"output_dir={folder}") == 0
        checkpoint = folder / "megatron"
        spec = f"{source}_lowbit_block_spec"
        first = (checkpoint / "megatron_arguments.txt").read_text().splitlines()[0]
        assert first == f"--spec megatron_lowbit.adapters.megatron {spec}"
        checkpoints[spec] = folders[source], checkpoint
    for results in two_ranks.run(cases.in_a_script, checkpoints):
        for name, source in names.items():
            whole = lowbit.apply_to_huggingface(model(source), artifact(name), 2)
            expected = tiny_models.logits(whole, megatron_cases.token_ids(1024))
            lowbit.remove(model(source))
            assert_equal_but_for_flips(results[f"{source}_lowbit_block_spec"], expected)
