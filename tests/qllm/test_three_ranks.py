"""A model of 9 heads and 3 KV heads, which runs on 3 ranks alone: every command on it, on one process and on three."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import CALIBRATION_TEXT, COMMAND, EVALUATION, needs_deepspeed, needs_megatron, run_here, run_there
from tiny_models import save_model

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.plan import CalibrationStats

CALIBRATION = [
    *(f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=4", "calibration.sequence_length=32"),
    "calibration.batch_size=2",
]
QLLM = [*CALIBRATION, "weights.scheme=W4A4", "reassembly.expansions=[0.1]", "correction.epochs=1", "correction.rank=2"]
ROTATED = [*CALIBRATION, "weights.scheme=W4A8", "weights.rotation=hadamard", "weights.clipping=mse"]
ROTATED += ["weights.rounding=gptq", "reassembly.mode=none", "correction.mode=none"]
HYBRID = ["comm.mode=one_shot"]
ENGINES = [pytest.param("deepspeed", marks=needs_deepspeed), pytest.param("megatron", marks=needs_megatron)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Tied embeddings, as in SmolLM2-135M; 1,024 words, which 3 does not divide."""
    shape = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 96}
    return save_model("llama", tmp_path_factory.mktemp("model"), **shape, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory) -> Path:
    """An artifact of method qllm, by one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run_here("quantize", f"model={model}", *QLLM, f"output_dir={folder}") == 0
    return folder


def there(*argv: object) -> str:
    code, out, err = run_there(*COMMAND, *argv, OMP_NUM_THREADS="1", timeout=600)
    assert code == 0, err
    return out


def rows(folder: Path, stage: str = "evaluate") -> list[dict]:
    return json.loads((folder / f"{stage}.json").read_text())["rows"]


def described(folder: Path) -> dict:
    meta = json.loads((folder / "lowbit.json").read_text())
    return {**meta, "files": list(meta["files"].values())}


def test_what_is_chosen_is_stored(artifact):
    """6 groups: the multiple of 3 nearest to 8 that divides 72, 24 and 96; a plan for 3 ranks and no other."""
    assert json.loads((artifact / "lowbit.json").read_text())["shard_groups"] == 6
    assert sorted(CalibrationStats.load(artifact).ranges) == [1, 3] and list(Artifact.load(artifact).plans) == [3]


def test_three_ranks_write_the_same_files(model, artifact, tmp_path):
    out = there("quantize", f"model={model}", *QLLM, "tp=3", f"output_dir={tmp_path}")
    assert "weights.shard_groups=6" in out
    assert described(tmp_path) == described(artifact)
    for stem in ("comm_plan_tp3", "calibration"):
        for suffix in (".json", ".safetensors"):
            assert (tmp_path / (stem + suffix)).read_bytes() == (artifact / (stem + suffix)).read_bytes(), stem


def test_three_ranks_round_a_rotated_model_alike(model, tmp_path):
    """R4 turns inputs shard group by shard group, and Hessians and errors are summed in an order of their own."""
    one, three = tmp_path / "one", tmp_path / "three"
    assert run_here("quantize", f"model={model}", *ROTATED, f"output_dir={one}") == 0
    there("quantize", f"model={model}", *ROTATED, "tp=3", f"output_dir={three}")
    assert described(one)["rotation"]["inputs"] and described(three) == described(one)


@pytest.fixture(scope="module")
def virtual(model, artifact, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("virtual")
    use = ["evaluate", f"model={model}", f"artifact={artifact}", *EVALUATION, *HYBRID]
    assert run_here(*use, "virtual_tp=3", f"output_dir={folder}") == 0
    return rows(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_real_ranks_measure_what_virtual_ones_do(engine, model, artifact, virtual, tmp_path):
    use = ["evaluate", f"model={model}", f"artifact={artifact}", *EVALUATION, *HYBRID]
    there(*use, f"engine={engine}", "tp=3", f"output_dir={tmp_path}")
    for mine, theirs in zip(rows(tmp_path), virtual, strict=True):
        assert (mine["name"], mine["tokens"]) == (theirs["name"], theirs["tokens"])
        # Float32 rounding; in the second row a code may fall on the other side of a boundary.
        tolerance = 1e-5 if mine["name"] == "full precision" else 1e-2
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=tolerance)
    assert mine["bytes_per_token"] == theirs["bytes_per_token"]


@pytest.mark.parametrize("engine", ENGINES)
def test_calibrate(engine, model, tmp_path):
    there("calibrate", f"model={model}", *CALIBRATION, f"engine={engine}", "tp=3", f"output_dir={tmp_path}")
    assert list(Artifact.load(tmp_path).plans) == [3]


@pytest.mark.parametrize("engine", ENGINES)
def test_parity(engine, model, artifact, tmp_path):
    """Float32 sums are exact, so three ranks make the tokens of one, and under communication those of three virtual
    ones. Not with sums in bf16: gloo adds three values in an order of its own, and a rounding moves 4-bit codes."""
    (tmp_path / "prompts.txt").write_text("def f(x):\n\nimport os\n")
    use = [f"model={model}", f"artifact={artifact}", f"prompts={tmp_path / 'prompts.txt'}", "max_new_tokens=4"]
    there("parity", *use, f"engines=[huggingface, {engine}]", "tp_sizes=[3]", f"output_dir={tmp_path}")
    compared = [row for row in rows(tmp_path, "parity") if row["name"] != "W4A4 + bf16"]
    assert {row["name"] for row in compared} == {"full precision", "W4A4", "W4A4 + hybrid"}
    for row in compared:
        assert row["prompts_equal"] == row["prompts"] == 2, row
    assert {row["tp"] for row in rows(tmp_path, "parity") if row["engine"] == engine} == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", *EVALUATION, "virtual_tp=2"], "virtual_tp=2 does not divide the model's num_attention_heads=9"),
        (
            ["evaluate", *EVALUATION, "engine=megatron", "tp=6"],
            "tp=6 does not divide the model's num_attention_heads=9",
        ),
        (["quantize", *QLLM, "comm.tp_sizes=[2]"], "comm.tp_sizes=2 does not divide the model's num_attention_heads=9"),
        (["quantize", *QLLM, "weights.shard_groups=8", "comm.tp_sizes=[3]"], "set weights.shard_groups=6, or leave 3"),
        (["quantize", *QLLM, "weights.shard_groups=8", "--dry-run", "tp=3"], "set weights.shard_groups=6"),
        (["evaluate", *EVALUATION, "weights.scheme=W4A4", "weights.shard_groups=8", "virtual_tp=3"], "shard_groups=6"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, said, model, tmp_path, capsys):
    if "engine=megatron" in arguments:
        pytest.importorskip("megatron.core", reason="needs megatron-lowbit[megatron]")
        code, _, err = run_there(*COMMAND, *arguments, f"model={model}", f"output_dir={tmp_path}", timeout=600)
    else:
        code, err = run_here(*arguments, f"model={model}", f"output_dir={tmp_path}"), capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_left_out_of_the_default(model, tmp_path, capsys):
    """A size that is chosen is left out where the given number of shard groups does not serve it."""
    use = [f"model={model}", *CALIBRATION, "weights.scheme=W4A8", "weights.method=rtn", "weights.shard_groups=8"]
    assert run_here("quantize", *use, f"output_dir={tmp_path}") == 0
    assert "left out: comm.tp_sizes: 3 does not divide the 8 shard groups" in capsys.readouterr().out
    assert not Artifact.load(tmp_path).plans
