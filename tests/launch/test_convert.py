"""convert: what becomes a checkpoint of Megatron-LM's scripts comes back as it was, and bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifact_files import differing
from commands import needs_megatron, run_here
from safetensors.torch import load_file
from tiny_models import embedded_folder

pytestmark = needs_megatron


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """The embedded model as a checkpoint, written by two pipeline stages."""
    output = tmp_path_factory.mktemp("full")
    assert run_here("convert", "model=embedded", "pp=2", f"output_dir={output}") == 0
    return output


def test_there_and_back(full, tmp_path):
    """Every tensor of the model's file, bit for bit, with nothing but the checkpoint's own folder."""
    checkpoint = full / "megatron"
    assert json.loads((full / "convert.json").read_text())["rows"][0]["folder"] == str(checkpoint)
    assert run_here("convert", f"checkpoint={checkpoint}", f"output_dir={tmp_path}") == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (embedded_folder(), tmp_path / "huggingface")
    )
    assert set(before) == set(after) and len(before) > 20
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (checkpoint / name).is_file() and (tmp_path / "huggingface" / name).is_file()


def test_an_artifact_there_and_back(embedded_artifact, tmp_path, capfd):
    """It says how it is loaded, and comes back as it was: tensors, fingerprint and plans; without its description it is
    refused."""
    assert run_here("convert", f"artifact={embedded_artifact}", f"output_dir={tmp_path}") == 0
    checkpoint = tmp_path / "megatron"
    options = (checkpoint / "megatron_arguments.txt").read_text()
    assert "--spec megatron_lowbit.adapters.megatron llama_lowbit_block_spec\n" in options
    assert run_here("convert", f"checkpoint={checkpoint}", f"output_dir={tmp_path}") == 0
    assert differing(embedded_artifact, tmp_path / "artifact") == []
    capfd.readouterr()
    common = torch.load(checkpoint / "release" / "common.pt", weights_only=False)
    del common["lowbit"]
    torch.save(common, checkpoint / "release" / "common.pt")
    assert run_here("convert", f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'back'}") == 2
    said = capfd.readouterr().err
    assert "packed weights without the description" in said and said.count("\n") == 1
    assert not (tmp_path / "back" / "artifact").exists()


def test_bad_input(full, tmp_path, capfd):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "latest_checkpointed_iteration.txt").write_text("3")
    before = sorted(full.rglob("*"))
    for argv, parts in [
        ([], ["model is not set"]),
        (["model=embedded", "engine=deepspeed"], ["engine=deepspeed", "leave it out"]),
        ([f"checkpoint={tmp_path}"], [str(tmp_path), "latest_checkpointed_iteration.txt", "--save"]),
        ([f"checkpoint={tmp_path / 'bare'}"], ["bare", "config.json", "model="]),
        (["model=embedded", f"output_dir={full}"], [str(full / "megatron"), "exists"]),
    ]:
        given = [*argv] if any(word.startswith("output_dir") for word in argv) else [*argv, f"output_dir={tmp_path}"]
        assert run_here("convert", *given) == 2, argv
        said = capfd.readouterr().err
        assert all(part in said for part in parts) and said.count("\n") == 1, (argv, said)
    assert sorted(full.rglob("*")) == before
