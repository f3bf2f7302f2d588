"""generation_config.json travels with the artifact, and text is continued by it as from the model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from commands import CALIBRATION, run_here
from tiny_models import embedded_folder

from megatron_lowbit.config import LowBitError
from megatron_lowbit.launch.generation import load_generation_config

PROMPT, TOKENS = "def read(", 16


def model_folder(folder: Path, generation: dict | None) -> Path:
    shutil.copytree(embedded_folder(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "generation*"))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def generated(folder: Path, *settings: object) -> list[int]:
    arguments = [f"output_dir={folder}", f"prompt={PROMPT}", f"max_new_tokens={TOKENS}", *settings]
    assert run_here("generate", *arguments) == 0
    return json.loads((folder / "generate.json").read_text())["rows"][0]["tokens"]


@pytest.mark.parametrize("method", ["rtn", "qllm"])
def test_an_artifact_generates_as_its_model_does(method, tmp_path):
    """Two end-of-text tokens, of which the second is one that the model comes to."""
    bare, artifact = model_folder(tmp_path / "bare", None), tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "generation_config.json").write_text('{"eos_token_id": 7}')  # of another model
    text = [*CALIBRATION, "correction.mode=none", "reassembly.mode=none"] if method == "qllm" else []

    def through_artifact(source: Path) -> tuple[dict | None, list[int]]:
        """(the file in the artifact, the tokens that the artifact alone makes, as many as with the model beside it)"""
        settings = [f"model={source}", "weights.scheme=W8A8", f"weights.method={method}", f"output_dir={artifact}"]
        assert run_here("quantize", *settings, *text) == 0
        file = artifact / "generation_config.json"
        tokens = generated(tmp_path / "alone", f"artifact={artifact}")
        assert tokens == generated(tmp_path / "both", f"model={source}", f"artifact={artifact}")
        return (json.loads(file.read_text()) if file.exists() else None), tokens

    found, tokens = through_artifact(bare)
    assert found is None and len(tokens) == TOKENS
    stop = next(token for token in tokens[4:] if token not in tokens[:4])
    written = {"eos_token_id": [1, stop], "transformers_version": "5.0.0"}
    found, stopped = through_artifact(model_folder(tmp_path / "model", written))
    assert found == written and stopped == tokens[: tokens.index(stop) + 1]


def test_a_damaged_file_is_one_line(tmp_path):
    assert load_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(LowBitError, match=r"^cannot read .*generation_config\.json"):
        load_generation_config(tmp_path)


def test_a_model_without_one_gets_what_its_config_says(tmp_path):
    folder = model_folder(tmp_path / "bare", None)
    config = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert config.eos_token_id == transformers.AutoConfig.from_pretrained(folder).eos_token_id
