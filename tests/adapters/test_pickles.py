"""A model whose weights are pickles only, or a file cut short, is refused in one line, wherever weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import CALIBRATION, EVALUATION, run_here
from safetensors.torch import load_file
from tiny_models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its weights are harmless: that they are pickled is enough."""
    folder = save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "weights.scheme=W4A16"],
        ["quantize", "weights.scheme=W4A4", *CALIBRATION],
        ["evaluate", *EVALUATION],
        ["generate"],
    ],
    ids=["rtn", "qllm", "evaluate", "generate"],
)
def test_refused(command, model, tmp_path, capsys):
    assert run_here(*command, f"model={model}", f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds its weights as pickles (pytorch_model.bin)" in line and "save_pretrained" in line
    assert "weights_only" not in line


def test_safetensors_beside_a_pickle_are_taken(model, tmp_path):
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert run_here("quantize", "weights.scheme=W4A16", f"model={folder}", f"output_dir={tmp_path / 'out'}") == 0


@pytest.mark.parametrize("command", [["quantize", "weights.scheme=W4A16"], ["generate"]], ids=["quantize", "generate"])
def test_a_file_that_was_cut_short_is_named(command, tmp_path, capsys):
    file = save_model("llama", tmp_path / "model", num_hidden_layers=2) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run_here(*command, f"model={file.parent}", f"output_dir={tmp_path / 'out'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-lowbit: {str(file)!r} is damaged (") and line.endswith("; download it again")


def test_code_of_a_model_folder_is_not_run(tmp_path, capsys):
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    config = (folder / "config.json").read_text()
    names = '{\n  "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},\n'
    own = config.replace("{\n", names, 1).replace('"model_type": "llama"', '"model_type": "own"')
    (folder / "config.json").write_text(own)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    assert run_here("generate", f"model={folder}", f"output_dir={tmp_path / 'out'}") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "trace").exists()
