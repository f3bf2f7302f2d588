"""megatron-lowbit parity: what it compares, with what, and how it tells."""

import json

import pytest
import torch
from commands import run_here
from tiny_models import build, embedded_folder, make_artifact, save_artifact

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.launch.parity import compare, modes, name_of


def outcome(logits: list[list[float]], tokens: list[int]) -> dict:
    return {"logits.0": torch.tensor(logits), "tokens.0": torch.tensor(tokens)}


def test_compare():
    reference = outcome([[0.0, 4.0], [1.0, -8.0]], [5, 6, 7, 8])
    row = compare(outcome([[0.0, 4.0], [1.0, -7.0]], [5, 6, 9, 8]), reference)
    assert row["max_relative_difference"] == 1 / 8
    assert (row["argmax_equal"], row["prompt_tokens"]) == (2, 2)
    assert (row["tokens_equal"], row["new_tokens"]) == (2, 4)  # after the first other token all is another story
    assert (row["prompts_equal"], row["prompts"]) == (0, 1)
    same = compare(reference, reference)
    assert same["max_relative_difference"] == 0 and same["prompts_equal"] == 1 and same["tokens_equal"] == 4
    assert compare(outcome([[9.0, 4.0], [1.0, -8.0]], [5]), reference)["argmax_equal"] == 1


def test_what_is_compared_at_which_size():
    model = build("llama")
    both = make_artifact(model, "W4A16", (2,))
    assert modes(both, 1) == [None, "native"]
    assert modes(both, 2) == [None, "native", "bf16", "one_shot"]
    assert modes(both, 4) == [None, "native", "bf16"]
    assert modes(Artifact(None, both.plans), 2) == [None, "one_shot"]
    names = [name_of(both, str(mode)) for mode in modes(both, 2)]
    assert names == ["full precision", "W4A16", "W4A16 + bf16", "W4A16 + hybrid"]


def test_a_run(tmp_path, capsys):
    """One rank against two virtual ones: the sums of a float32 model are exact, so the bits are the same."""
    from megatron_lowbit.launch.loading import load_model, read_config
    from megatron_lowbit.launch.quantize import CONFIG

    config = CONFIG(model=str(embedded_folder()))
    model = load_model(config, read_config(config.model), None)
    folder = save_artifact(make_artifact(model, "W4A4"), tmp_path / "artifact")
    (tmp_path / "prompts.txt").write_text("def f(x):\n\nimport os\n")
    arguments = ["model=embedded", f"artifact={folder}", f"prompts={tmp_path / 'prompts.txt'}", "max_new_tokens=4"]
    code = run_here("parity", *arguments, "engines=[huggingface]", "tp_sizes=[2]", f"output_dir={tmp_path / 'out'}")
    assert code == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "parity.json").read_text())["rows"]
    found = {(row["name"], row["tp"]): row for row in rows}
    assert set(found) == {("full precision", 1), ("full precision", 2), ("W4A4", 1), ("W4A4", 2), ("W4A4 + bf16", 2)}
    for row in rows:
        assert (row["prompts"], row["prompts_equal"], row["tokens_equal"]) == (2, 2, 8)
    assert found["W4A4", 2]["max_relative_difference"] == 0
    assert "W4A4 + bf16" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["model", "artifact", "prompts"])
def test_what_is_missing_is_named(tmp_path, capsys, missing):
    given = {"model": "embedded", "artifact": "somewhere", "prompts": "somewhere.txt"}
    arguments = [f"{key}={value}" for key, value in given.items() if key != missing]
    assert run_here("parity", *arguments, f"output_dir={tmp_path}") == 2
    assert f"{missing} is not set" in capsys.readouterr().err


def test_a_run_that_fails_says_where(tmp_path, capsys):
    artifact = save_artifact(make_artifact(build("llama"), "W4A16"), tmp_path / "other")
    (tmp_path / "prompts.txt").write_text("def f(x):\n")
    arguments = [f"artifact={artifact}", f"prompts={tmp_path / 'prompts.txt'}", f"output_dir={tmp_path / 'out'}"]
    assert run_here("parity", "model=embedded", *arguments, "engines=[huggingface]", "tp_sizes=[2]") == 2
    error = capsys.readouterr().err
    assert "engine=huggingface tp=1 failed: the checkpoint belongs to another model" in error and error.count("\n") == 1
