"""Ready specs take in an artifact by themselves: the model is the one that apply_to_megatron makes, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import megatron_filler_cases as cases
import pytest
from commands import needs_megatron
from tiny_models import build, make_artifact, save_artifact

from megatron_lowbit.artifact import Artifact

pytestmark = [needs_megatron, pytest.mark.filterwarnings("ignore:.*Apex")]

CHANGES = {"intermediate_size": 96}
OTHER = {"intermediate_size": 160}


@pytest.fixture(scope="module")
def pools(one_rank, two_ranks, four_ranks):
    return {1: one_rank, 2: two_ranks, 4: four_ranks}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model, and artifacts that load without it."""
    root, made = tmp_path_factory.mktemp("filler"), {}
    for name, changes in {"model": CHANGES, "other": OTHER}.items():
        hf = build("llama", **changes)
        made[name] = root / name
        hf.save_pretrained(made[name])
        for kind, artifact in {
            "artifact": make_artifact(hf, "W4A8", (2, 4)),
            "plans": make_artifact(hf, tp_sizes=(2,)),
        }.items():
            made[f"{kind} of {name}"] = save_artifact(artifact, root / f"{kind}-{name}")
            hf.config.save_pretrained(root / f"{kind}-{name}")
    hf = build("llama", **CHANGES)
    one_group = dataclasses.replace(make_artifact(hf, "W4A8").checkpoint, shard_groups=1)
    made["one group"] = save_artifact(Artifact(one_group), root / "one-group")
    hf.config.save_pretrained(made["one group"])
    return made


@pytest.fixture(scope="module")
def checkpoints(folders, two_ranks, tmp_path_factory) -> dict[str, Path]:
    """Saved by two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {"full precision": root / "full", "low-bit": root / "lowbit"}
    jobs = {
        made["full precision"]: (folders["model"], None),
        made["low-bit"]: (folders["model"], folders["artifact of model"]),
    }
    two_ranks.run(cases.save, 2, jobs)
    return made


@pytest.mark.parametrize("how", ["alone", "full precision", "low-bit"])
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_the_model_is_filled(pools, folders, checkpoints, how, layout):
    """By the artifact alone, or when a full-precision checkpoint has come in; a low-bit one needs no artifact. It is
    said where weights come from, and nothing of the spec's own rounding, which has no effect then."""
    tp, pp = layout
    outcomes = pools[tp * pp].run(
        cases.filled, tp, pp, folders["model"], folders["artifact of model"], how, checkpoints
    )
    assert any("come from" in line for line in outcomes[0]["warned"])
    for outcome in outcomes:
        assert not any("low-bit linears of this rank" in line for line in outcome["warned"]), outcome["warned"]
        assert outcome["differing"] == [] and outcome["traits"] == [] and outcome["logits_equal"], outcome


def test_plans_alone_are_put_in_when_the_weights_are_there(two_ranks, folders, checkpoints):
    """The weights stay as they were loaded; the layers are the spec's own classes, which round nothing then."""
    how = "full precision"
    for outcome in two_ranks.run(cases.filled, 2, 1, folders["model"], folders["plans of model"], how, checkpoints):
        assert outcome["differing"] == [] and outcome["logits_equal"], outcome
        assert not any("proj" in key or "fc2" in key for key in outcome["traits"]), "a row-parallel layer has no plan"


def test_what_the_script_loads(checkpoints):
    """Folder, tracker and options are those that Megatron-LM's scripts look for."""
    folder = checkpoints["low-bit"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (folder / "release" / "metadata.json").is_file()
    options = (folder / "megatron_arguments.txt").read_text().splitlines()
    assert {"--num-layers 2", "--ffn-hidden-size 96", "--swiglu", "--position-embedding-type rope"} <= set(options)


def test_a_block_under_sequence_parallelism(two_ranks, folders):
    for outcome in two_ranks.run(cases.block, folders["model"], folders["artifact of model"]):
        assert outcome["differing"] == [] and outcome["traits"] == [] and outcome["logits_equal"], outcome


def test_what_is_refused(two_ranks, folders, checkpoints):
    """One line that names the value and the fix, before the first layer is built where that can be known."""
    model, full, low = folders["model"], str(checkpoints["full precision"]), str(checkpoints["low-bit"])
    ours = folders["artifact of model"]
    jobs = {
        "another architecture": (model, folders["artifact of other"], {}),
        "no folder": (model, model.parent / "nothing", {}),
        "one shard group": (model, folders["one group"], {}),
        "plans alone": (model, folders["plans of model"], {}),
        "trained": (model, ours, {"train_iters": 3}),
        "trained, of a checkpoint": (model, ours, {"train_iters": 3, "load": full}),
        "trained, low-bit checkpoint": (model, ours, {"train_iters": 3, "load": low}),
    }
    parts = {
        "another architecture": ["--ffn-hidden-size 96", "160", "artifact-other"],
        "no folder": ["nothing", "does not exist"],
        "one shard group": ["layers.0.self_attn.o_proj", "1 activation shard groups", "tp=2", "shard_groups=8"],
        "plans alone": ["plans-model", "--load"],
        "trained": ["artifact-model", "cannot be trained", "--skip-train"],
        "trained, of a checkpoint": ["artifact-model", "cannot be trained"],
        "trained, low-bit checkpoint": ["lowbit", "cannot be trained"],
    }
    for results in two_ranks.run(cases.refused, 2, jobs):
        for name, (line, layers) in results.items():
            assert all(part in line for part in parts[name]) and "\n" not in line, (name, line)
            assert (layers == 0) == (name in ("another architecture", "no folder", "one shard group")), (name, layers)


def test_a_spec_of_an_artifact():
    """artifact_spec names the artifact itself; a copy of the spec shares what has been read."""
    import copy

    from megatron_lowbit.adapters.megatron import artifact_spec, llama_lowbit_spec
    from megatron_lowbit.adapters.megatron.spec_layer import SpecLayer

    spec = artifact_spec("some/folder")
    assert spec.module is SpecLayer and spec.params["filler"].folder == Path("some/folder")
    assert spec.submodules is llama_lowbit_spec.submodules
    assert copy.deepcopy(spec).params["filler"] is spec.params["filler"]
