"""Distributed checkpoints of Megatron-Core: saved at one parallel size, loaded at another, to the last bit."""

from __future__ import annotations

import megatron_checkpoint_cases as cases
import pytest
from commands import needs_megatron
from megatron_artifacts import in_some_blocks, quantize_embedded
from slow_cases import slow
from tiny_models import build, embedded_folder, make_artifact, save_artifact

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.config import CommConfig, WeightsConfig
from megatron_lowbit.quant.round_to_nearest import quantize_model

pytestmark = needs_megatron

LAYOUTS = [(1, 1), (1, 2), slow(2, 1), slow(4, 1)]  # (tp, pp)
# 96 inputs of down_proj are 24 for each of four ranks: whole bytes in 4 and in 6 bits, and groups of 8.
CHANGES = {"intermediate_size": 96}
HIDDEN = {**CHANGES, "hidden_size": 32, "head_dim": 8}


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


def rounded(model, config: WeightsConfig) -> Artifact:
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    return Artifact(quantize_model(model, linears, config, huggingface.fingerprint(model)), {})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: model folder}."""
    root = tmp_path_factory.mktemp("models")
    for name, (architecture, changes) in {
        "llama": ("llama", CHANGES),
        "biases": ("llama with biases", {}),
        "172": ("llama", {}),
        "hidden": ("llama", HIDDEN),
        "padded": ("llama", {**CHANGES, "vocab_size": 105}),
        "layers": ("llama", {**CHANGES, "num_hidden_layers": 4}),
        "experts": ("mixtral", {}),
        "mixed": ("qwen3_moe", {"mlp_only_layers": [0]}),
        "shared": ("qwen2_moe", {"mlp_only_layers": [0]}),
    }.items():
        build(architecture, **changes).save_pretrained(root / name)
    return {**{folder.name: folder for folder in root.iterdir()}, "embedded": embedded_folder()}


@pytest.fixture(scope="module")
def jobs(models, two_ranks, tmp_path_factory):
    """{name: (model folder, artifact folder or None, checkpoint folder)}, all saved by two tensor-parallel ranks."""
    root, hf = tmp_path_factory.mktemp("checkpoints"), build("llama", **CHANGES)
    biases, qllm = build("llama with biases"), quantize_embedded(root / "qllm")
    artifacts = {
        "full precision": ("llama", None),
        "W4A16": ("llama", make_artifact(hf, "W4A16")),
        "W8A8 in groups": ("llama", rounded(hf, WeightsConfig(scheme="W8A8", group_size=8, zero_point="real"))),
        "W6A6": ("llama", make_artifact(hf, "W6A6", symmetric=True)),
        "plans": ("llama", make_artifact(hf, tp_sizes=(2, 4))),
        "padded": ("padded", make_artifact(build("llama", **CHANGES, vocab_size=105), "W4A16")),
        "biases": ("biases", make_artifact(biases, "W4A4", (2, 4))),
        "experts": ("experts", make_artifact(build("mixtral"), "W4A4", (2, 4))),
        "experts of one block": ("mixed", make_artifact(build("qwen3_moe", mlp_only_layers=[0]), "W4A16")),
        "shared expert": ("shared", make_artifact(build("qwen2_moe", mlp_only_layers=[0]), "W4A8", (2, 4))),
        "qllm": ("embedded", Artifact.load(qllm)),
        "qllm in some blocks": ("embedded", in_some_blocks(Artifact.load(qllm))),
    }
    made = {}
    for name, (model, artifact) in artifacts.items():
        stem = root / name.replace(" ", "-")
        folder = None if artifact is None else save_artifact(artifact, stem.with_suffix(".artifact"))
        made[name] = models[model], folder, stem.with_suffix(".checkpoint")
    two_ranks.run(cases.save, 2, 1, list(made.values()))
    return made


def assert_same(outcome: dict) -> None:
    assert outcome["differing"] == [] and outcome["traits"] == [] and outcome["logits_equal"], outcome
    assert outcome["tensors"] > 5


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_loaded_at_another_size(pools, jobs, tp, pp):
    """Codes, scales, reassembly, branches, plans and attention bits, as if the artifact had been applied there."""
    for results in pools[tp * pp].run(cases.load, tp, pp, jobs):
        assert list(results) == list(jobs)
        for name, outcome in results.items():
            assert_same({"name": name, **outcome})


@pytest.mark.parametrize(("tp", "pp"), [slow(1, 2), slow(4, 1)])
def test_saved_at_another_size(pools, models, jobs, tmp_path, tp, pp):
    """Pipeline stages and four ranks as writers; two tensor-parallel ranks read."""
    names = ["full precision", "plans", "padded", "biases", "qllm in some blocks"]
    again = {name: (*jobs[name][:2], tmp_path / f"{number}") for number, name in enumerate(names)}
    pools[tp * pp].run(cases.save, tp, pp, list(again.values()))
    for results in pools[2].run(cases.load, 2, 1, again):
        for name, outcome in results.items():
            assert_same({"name": name, **outcome})


def test_plans_of_the_gather(two_ranks, models, tmp_path):
    """Sequence parallelism also sends the inputs of column-parallel linears."""
    hf = build("llama", **CHANGES)
    artifact = make_artifact(hf, "W4A8", (2,))
    stats = gathered_stats(hf)
    plan = build_plan(stats, 2, CommConfig(preset="paper", gather=True))
    assert plan.gathers
    folder = save_artifact(Artifact(artifact.checkpoint, {2: plan}), tmp_path / "artifact")
    job = models["llama"], folder, tmp_path / "checkpoint"
    two_ranks.run(cases.save_sequence_parallel, job)
    for outcome in two_ranks.run(cases.load_sequence_parallel, job):
        assert_same(outcome)


def gathered_stats(model):
    import tiny_models

    from megatron_lowbit.comm.calibration import calibrate

    sites, inputs = huggingface.row_parallel_sites(model), huggingface.first_readers(huggingface.find_linears(model))
    fingerprint = huggingface.fingerprint(model)
    return calibrate(model, sites, tiny_models.batches(), (2,), fingerprint, gamma=0.25, inputs=inputs)


# In full precision


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_full_precision_checkpoint_is_rounded_on_load(pools, models, jobs, ranks):
    """By a model that was built with a scheme; bit for bit as rounding the whole weights and sharding them."""
    artifact = make_artifact(build("llama", **CHANGES), "W4A8")
    checkpoint = jobs["full precision"][2]
    for outcome in pools[ranks].run(cases.rounded_on_load, models["llama"], "W4A8", artifact, checkpoint):
        assert_same(outcome)
        assert outcome["before"] == set() and outcome["saved"] == 2 * 4


# Megatron's own way


def test_the_stock_route(two_ranks, models, jobs, tmp_path):
    """A training script that knows nothing of this package saves and loads a patched model."""
    model, artifact, _ = jobs["qllm"]
    for outcome in two_ranks.run(cases.stock_route, model, artifact, tmp_path / "stock"):
        assert_same(outcome)


# What is refused


@pytest.fixture(scope="module")
def bad(models, jobs, two_ranks, tmp_path_factory):
    """{name: folder} of checkpoints, or of what is none, that do not fit the tiny llama on four ranks."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "nonsense").mkdir()
    (root / "nonsense" / "metadata.json").write_text("{}")
    hf = build("llama", **CHANGES)
    saved = {
        "172": (models["172"], make_artifact(build("llama"), "W4A16")),
        "hidden": (models["hidden"], make_artifact(build("llama", **HIDDEN), "W4A16")),
        "hidden in full": (models["hidden"], None),
        "layers": (models["layers"], make_artifact(build("llama", **CHANGES, num_hidden_layers=4), "W4A16")),
        "groups": (models["llama"], rounded(hf, WeightsConfig(scheme="W4A4", shard_groups=2))),
    }
    two_ranks.run(cases.save, 2, 1, [(*job, root / name) for name, job in saved.items()])
    return {"nothing": root / "nothing", **{folder.name: folder for folder in root.iterdir()}}


SAID = {
    "nothing": ["nothing", "no distributed checkpoint"],
    "empty": ["empty", "no distributed checkpoint"],
    "nonsense": ["nonsense", "no distributed checkpoint"],
    "172": ["linear_fc1", "344", "192"],
    # The columns have as many outputs, so it shows only in what comes after them.
    "hidden": ["32", "64"],
    "hidden in full": ["32", "64"],
    "layers": ["4, 64", "2, 64"],
    "groups": ["2 shard groups", "tp=4"],
}


@pytest.mark.parametrize("patched", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "patched"])
def test_checkpoints_that_do_not_fit(four_ranks, models, bad, patched):
    """One line, and the model is as it was: the same modules, tensors and logits."""
    artifact = make_artifact(build("llama", **CHANGES), "W8A8", (4,)) if patched else None
    for results in four_ranks.run(cases.refused_loads, models["llama"], artifact, bad):
        assert set(results) == set(SAID)
        for name, (line, same) in results.items():
            assert all(part in line for part in SAID[name]) and "\n" not in line and len(line) < 400, (name, line)
            assert same, f"{name}: the model was changed"


def test_a_packed_byte_is_not_split(four_ranks, models, bad, tmp_path):
    """172 inputs of 4 bits are 43 for each of four ranks: neither loaded there nor saved."""
    for results in four_ranks.run(cases.refused_loads, models["172"], None, {"172": bad["172"]}):
        line, same = results["172"]
        assert "43 inputs of 4 bits end inside a byte" in line and "smaller tp" in line and same
    artifact = make_artifact(build("llama"), "W4A16")
    for line in four_ranks.run(cases.refused_save, models["172"], artifact, tmp_path / "new"):
        assert "linear_fc2: a rank's 43 inputs of 4 bits end inside a byte" in line and "\n" not in line
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_folder_that_exists_is_left_alone(two_ranks, models, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for line in two_ranks.run(cases.refused_save, models["llama"], None, tmp_path / "there"):
        assert "there" in line and "exists" in line and "\n" not in line
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "file"]


def test_an_interrupted_save_leaves_no_checkpoint(two_ranks, models, tmp_path):
    """The folder is there when it is whole or not at all; a second save needs no cleaning up."""
    for results in two_ranks.run(cases.interrupted_save, models["llama"], tmp_path / "checkpoint"):
        assert "No space left on device" in results["raised"] and not results["left"]
        assert "no distributed checkpoint" in results["loads"]
        assert_same(results["again"])
        assert results["parts"] == [], "a partial checkpoint is left"


def test_writing_has_a_bar(two_ranks, models, tmp_path):
    """On rank 0, of the bytes that both ranks write."""
    (first, *sizes), (second, *same) = two_ranks.run(cases.saved_with_a_bar, models["llama"], tmp_path / "there")
    assert "writing the checkpoint, percent" in first and not second
    assert sizes == same and sizes[0] == sizes[1] > 100_000
