"""Artifacts that earlier versions wrote still load, and still say the same words.

Both are of one random Llama: a block, hidden size 64, W4A4 by qllm with reassembled norms and low-rank branches, and a
plan for two ranks. Format 3 has no checksums in its JSON files; its tensors were the same bytes as those of format 4.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest

import megatron_lowbit as lowbit
from megatron_lowbit.launch import main

DATA = Path(__file__).parents[1] / "data"
DOWN_PROJ = "43ab9c83e56d1708"  # the dequantized weight
TOKENS = [141, 280, 961, 616, 885, 992, 945, 335, 642, 923, 356, 123]  # after "import os", as the version of then said


@pytest.fixture(params=[3, 4])
def artifact(request, tmp_path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(DATA / "artifact_format_4", folder)
    if request.param == 3:
        shutil.copytree(DATA / "artifact_format_3", folder, dirs_exist_ok=True)
        for name in json.loads((folder / "lowbit.json").read_text())["files"]:
            (stored,) = folder.glob(f"lowbit-a57cead3{name.removeprefix('lowbit-69712881')}")
            stored.rename(folder / name)
    return folder


def test_it_loads(artifact, caplog):
    with caplog.at_level(logging.INFO, "megatron_lowbit"):
        loaded = lowbit.Artifact.load(artifact)
    old = json.loads((artifact / "lowbit.json").read_text())["format"] == 3
    assert any("checksum" in message for message in caplog.messages) == old
    assert loaded.checkpoint is not None and loaded.checkpoint.scheme_name == "W4A4"
    assert (
        len(loaded.checkpoint.linears) == 7
        and loaded.checkpoint.reassembly
        and loaded.checkpoint.low_rank
        and loaded.plan(2).sites
    )
    weight = loaded.checkpoint.linears["model.layers.0.mlp.down_proj"].dequantize()
    assert hashlib.sha256(weight.numpy().tobytes()).hexdigest().startswith(DOWN_PROJ)


def test_it_says_the_same_words(artifact, tmp_path, capsys):
    output = tmp_path / "generate"
    command = ["generate", f"artifact={artifact}", "virtual_tp=2", "prompt=import os", "max_new_tokens=12"]
    assert main([*command, f"output_dir={output}"]) == 0
    (row,) = json.loads((output / "generate.json").read_text())["rows"]
    assert row["tokens"] == TOKENS
