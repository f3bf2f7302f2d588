"""The commands on the embedded model in one process: the chain of stages, what they write, W&B."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import yaml
from commands import CALIBRATION, EVALUATION, EVALUATION_TEXT, SMALL_TEXT, run_here
from read_wandb import read_run
from slow_cases import slow
from tiny_models import embedded_folder, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_lowbit
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import DemoConfig, QuantizeConfig, load_config
from megatron_lowbit.io.data import stdlib_text, token_windows

SITES = {f"model.layers.{layer}.{site}" for layer in range(6) for site in ("self_attn.o_proj", "mlp.down_proj")}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """calibrate -> quantize -> evaluate -> generate, each reading what the one before wrote."""
    root = tmp_path_factory.mktemp("chain")
    assert run_here("calibrate", "model=embedded", *CALIBRATION, f"output_dir={root / 'plans'}") == 0
    assert run_here("quantize", "model=embedded", f"artifact={root / 'plans'}", f"output_dir={root / 'artifact'}") == 0
    # The artifact folder alone is a model: no `model` from here on.
    use = [f"artifact={root / 'artifact'}", "virtual_tp=2"]
    assert run_here("evaluate", *use, *EVALUATION, f"output_dir={root / 'evaluate'}") == 0
    prompt = ["prompt=def read(path):", "max_new_tokens=6"]
    assert run_here("generate", *use, *prompt, f"output_dir={root / 'generate'}") == 0
    return root


def results(folder, stage: str) -> dict:
    return json.loads((folder / f"{stage}.json").read_text())


def metrics(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "event" not in record]


def rows(folder, stage: str = "evaluate") -> dict[str, dict]:
    return {row["name"]: row for row in results(folder, stage)["rows"]}


def test_calibrate_writes_a_plan_per_size(chain):
    artifact = Artifact.load(chain / "plans")
    assert artifact.checkpoint is None and sorted(artifact.plans) == [2, 4, 8]
    for size, plan in artifact.plans.items():
        assert set(plan.sites) == SITES
        assert all(site.first.scale.shape == (size, 128) and site.first.bits.max() <= 8 for site in plan.sites.values())
    for size, row in zip((2, 4, 8), results(chain / "plans", "calibrate")["rows"], strict=True):
        assert row == {"name": f"tp{size}", "tp_size": size, "sites": 12, "communication": "per-token tiered int4"}


def test_quantize_writes_a_folder_that_is_a_model(chain):
    artifact = Artifact.load(chain / "artifact")
    assert artifact.checkpoint.scheme_name == "W4A8" and len(artifact.checkpoint.linears) == 6 * 7
    assert sorted(artifact.plans) == [2, 4, 8], "the plans of the artifact that was given are not passed on"
    assert AutoTokenizer.from_pretrained(chain / "artifact")("def")["input_ids"]
    (row,) = results(chain / "artifact", "quantize")["rows"]
    # Half a byte per weight, and two float32 per output channel: q, o: 128; k, v: 64; gate, up: 384; down: 128.
    weights = 6 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
    assert row["linear_bytes"] == weights // 2 + 6 * 8 * (128 + 64 + 64 + 128 + 384 + 384 + 128)
    assert row["bytes"] == artifact.checkpoint.nbytes() > row["linear_bytes"]


def test_evaluate_an_artifact_without_its_model(chain):
    (row,) = results(chain / "evaluate", "evaluate")["rows"]
    assert row["name"] == "W4A8 + per-token tiered int4" and (row["tp"], row["weights"]) == (2, "W4A8")
    # 12 sites of 128 values, and a budget over all of them: what (2 * 2 + 126 / 2) bytes each would be
    sites = Artifact.load(chain / "artifact").plan(2).sites.values()
    sent = sum(1 - -sum(site.first.bits.tolist()) // 8 for site in sites)  # a byte per token and site says its scale
    assert 12 * 64 < row["bytes_per_token"] == sent <= 12 * 67 and row["bits_per_value"] == sent / (12 * 16)
    assert row["kl"] is row["sqnr_db"] is None, "there is nothing in full precision to compare with"
    assert row["tokens"] == 4 * 63 and row["sites"] == {}
    assert 1 < row["perplexity"] < 10 * 1024  # a vocabulary of 1024


def test_generate_with_an_artifact_without_its_model(chain):
    (row,) = results(chain / "generate", "generate")["rows"]
    assert row["name"] == "W4A8 + per-token tiered int4" and row["prompt"] == "def read(path):"
    assert 0 < row["new_tokens"] <= 6 and isinstance(row["text"], str)


def test_generate_streams_the_text_that_it_records(chain, tmp_path, capsys):
    arguments = [f"artifact={chain / 'artifact'}", "virtual_tp=2", "prompt=def read(path):", "max_new_tokens=6"]
    assert run_here("generate", *arguments, f"output_dir={tmp_path}") == 0
    (row,), (before,) = results(tmp_path, "generate")["rows"], results(chain / "generate", "generate")["rows"]
    assert row["text"] == before["text"]  # greedy
    assert row["text"] in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["calibrate", "quantize", "evaluate", "generate"])
def test_result_files(chain, stage):
    folder = chain / {"calibrate": "plans", "quantize": "artifact"}.get(stage, stage)
    record = results(folder, stage)
    assert set(record) >= {"config", "rows", "environment"}
    assert record["config"] == yaml.safe_load((folder / f"{stage}.yaml").read_text())
    assert record["config"]["output_dir"] == str(folder)
    versions = record["environment"]["versions"]
    assert versions["torch"] == torch.__version__ and {"python", "megatron-lowbit", "transformers"} <= set(versions)
    assert {"commit", "machine"} <= set(record["environment"])
    assert not list(folder.glob(".*")), "a temporary file is left"


@pytest.mark.parametrize("stage", ["calibrate", "quantize", "evaluate", "generate"])
def test_metrics_file(chain, stage):
    records = metrics(chain / {"calibrate": "plans", "quantize": "artifact"}.get(stage, stage))
    assert records and {record["stage"] for record in records} == {stage}
    assert [record["step"] for record in records] == list(range(len(records)))
    if stage == "calibrate":
        assert sum(record.get("calibration_tokens", 0) for record in records) == 4 * 64
        assert [record["table"] for record in records if "table" in record] == [
            "ranges_tp2",
            "ranges_tp4",
            "ranges_tp8",
        ]
    if stage == "evaluate":
        assert not [record for record in records if "table" in record], "nothing to compare the sites with"


def test_artifact_made_on_the_fly_equals_the_saved_one(chain, tmp_path):
    """evaluate calibrates and quantizes by itself when it is told to; the same figures come out."""
    here = ["weights.scheme=W4A8", "comm.mode=one_shot", *SMALL_TEXT]
    assert run_here("evaluate", "model=embedded", "virtual_tp=2", *here, f"output_dir={tmp_path / 'here'}") == 0
    there = [f"artifact={chain / 'artifact'}", "virtual_tp=2", *EVALUATION]
    assert run_here("evaluate", "model=embedded", *there, f"output_dir={tmp_path / 'there'}") == 0
    on_the_fly, saved = rows(tmp_path / "here"), rows(tmp_path / "there")
    assert list(on_the_fly) == list(saved) == ["full precision", "W4A8 + per-token tiered int4"]
    for name in on_the_fly:
        for figure in ("perplexity", "kl", "bits_per_value", "bytes_per_token", "tokens"):
            assert on_the_fly[name][figure] == saved[name][figure], (name, figure)
    low_bit = saved["W4A8 + per-token tiered int4"]
    assert saved["full precision"]["kl"] == 0 < low_bit["kl"]
    assert set(low_bit["sites"]) == SITES and min(low_bit["sites"].values()) > 0
    assert low_bit["sqnr_db"] == pytest.approx(sum(low_bit["sites"].values()) / 12)
    (table,) = [record for record in metrics(tmp_path / "there") if "table" in record]
    assert dict(table["rows"]) == low_bit["sites"]
    # Without its model the artifact gives the same figures, but for what only full precision can tell.
    (alone,) = results(chain / "evaluate", "evaluate")["rows"]
    # Its unquantized tensors are the stored bf16 ones in both cases.
    assert alone["perplexity"] == pytest.approx(saved[alone["name"]]["perplexity"], rel=1e-6)


def test_full_precision_perplexity_is_the_models_own_loss(tmp_path):
    assert run_here("evaluate", "model=embedded", *EVALUATION, f"output_dir={tmp_path}") == 0
    (row,) = results(tmp_path, "evaluate")["rows"]
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    windows = token_windows(tokenizer, EVALUATION_TEXT, 4, 64, 256, "evaluation")
    with torch.inference_mode():  # the mean over 63 predictions of each of four windows of equal length
        losses = [model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.double().item() for ids in windows.ids]
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert (row["tp"], row["kl"], row["bits_per_value"], row["communication"]) == (1, 0, None, "none")


def test_overrides_win_over_the_config_file(tmp_path):
    config = {
        "model": "embedded",
        "virtual_tp": 4,
        "evaluation": {"data": "stdlib:validation", "samples": 2, "sequence_length": 32},
        "output_dir": str(tmp_path / "wrong"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["evaluation.samples=3", "virtual_tp=2", "--output-dir", tmp_path / "right"]
    assert run_here("evaluate", "--config", tmp_path / "run.yaml", *arguments) == 0
    assert not (tmp_path / "wrong").exists()
    saved = results(tmp_path / "right", "evaluate")["config"]
    assert saved["evaluation"]["samples"] == 3 and saved["evaluation"]["sequence_length"] == 32
    assert saved["virtual_tp"] == 2


def test_a_saved_config_repeats_the_run(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_here("evaluate", "model=embedded", "virtual_tp=2", *EVALUATION, f"output_dir={first}") == 0
    assert run_here("evaluate", "--config", first / "evaluate.yaml", f"output_dir={second}") == 0
    rows = [results(folder, "evaluate")["rows"] for folder in (first, second)]
    for row in (row for of_run in rows for row in of_run):
        assert row.pop("evaluate_seconds") > 0
    assert rows[0] == rows[1]


def test_a_section_keeps_the_other_defaults_of_its_stage(tmp_path):
    """`demo calibration.samples=3` must not forget where the demo's text comes from."""
    demo = load_config(DemoConfig, None, ["calibration.samples=3"])
    assert (demo.calibration.samples, demo.calibration.data) == (3, "stdlib:calibration")
    assert load_config(QuantizeConfig, None, ["weights.group_size=32"]).weights.scheme == "W4A8"
    (tmp_path / "run.yaml").write_text("weights: {symmetric: true}\n")
    quantize = load_config(QuantizeConfig, str(tmp_path / "run.yaml"), [])
    assert quantize.weights.scheme == "W4A8" and quantize.weights.symmetric


def test_options_and_keys_in_any_order(tmp_path):
    (tmp_path / "run.yaml").write_text("virtual_tp: 2\n")
    use = ["model=embedded", "--config", tmp_path / "run.yaml", *EVALUATION[:1], "--model", "embedded", *EVALUATION[1:]]
    assert run_here("evaluate", *use, f"output_dir={tmp_path}") == 0
    assert results(tmp_path, "evaluate")["config"]["virtual_tp"] == 2


def test_a_saved_calibration_config_repeats_the_run(tmp_path):
    """The sizes are chosen for the model again: 172 inputs do not divide by 8."""
    model, first = save_model("llama", tmp_path / "model"), tmp_path / "first"
    assert run_here("calibrate", f"model={model}", *CALIBRATION, f"output_dir={first}") == 0
    assert sorted(Artifact.load(first).plans) == [2, 4]
    assert run_here("calibrate", "--config", first / "calibrate.yaml", f"output_dir={tmp_path / 'second'}") == 0
    assert sorted(Artifact.load(tmp_path / "second").plans) == [2, 4]


def test_metrics_are_appended(tmp_path):
    for _ in range(2):
        assert run_here("evaluate", "model=embedded", *EVALUATION, f"output_dir={tmp_path}") == 0
    assert [record["step"] for record in metrics(tmp_path)] == [0, 0]


def test_wandb_offline(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs megatron-lowbit[wandb]")
    use = ["model=embedded", "virtual_tp=2", "comm.mode=one_shot", *SMALL_TEXT, "wandb=offline"]
    assert run_here("evaluate", *use, f"output_dir={tmp_path}") == 0
    wandb.teardown()  # the end of a process does this: it waits for W&B's writer
    record, run = results(tmp_path, "evaluate"), read_run(tmp_path)
    assert (run.project, run.job_type, run.exit_code) == ("megatron-lowbit", "evaluate", 0)
    assert {key: run.config[key] for key in record["config"]} == record["config"]
    logged = [entry for entry in run.history if "row" in entry]
    assert [entry["row"] for entry in logged] == list(rows(tmp_path))
    for entry in logged:
        assert entry["perplexity"] == rows(tmp_path)[entry["row"]]["perplexity"]
    assert [entry["step"] for entry in run.history] == [record["step"] for record in metrics(tmp_path)]
    assert run.summary["rows"] == json.loads(json.dumps(record["rows"]))
    assert run.summary["seconds"] == record["seconds"]
    assert any("_type" in key for entry in run.history for key in entry if key.startswith("sqnr/")), "no table"


def test_seeded_runs_repeat(tmp_path):
    """Random features are random by the seed only."""
    use = ["model=embedded", "virtual_tp=2", "comm.mode=one_shot", *SMALL_TEXT]
    use += ["comm.preset=paper", "comm.selection=random"]
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_here("evaluate", *use, f"seed={seed}", f"output_dir={tmp_path / folder}") == 0
    a, b, c = (rows(tmp_path / folder)["full precision + random int4/bf16"]["kl"] for folder in "abc")
    assert a == b != c


def test_the_result_says_what_was_read(chain, tmp_path, capsys):
    """What was read is told for every section with text: in the JSON, and in a line of output."""
    assert results(chain / "plans", "calibrate")["data"]["calibration"]["first"] == stdlib_text("calibration")[:80]
    assert results(chain / "generate", "generate")["data"] == {}
    rows = [{"url": "x" * 99, "content": f"def f{number}(): pass"} for number in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"evaluation.data={tmp_path / 'data.jsonl'}"
    assert run_here("evaluate", "model=embedded", data, f"output_dir={tmp_path}") == 0
    about = results(tmp_path, "evaluate")["data"]["evaluation"]
    assert (about["column"], about["first"], about["windows"]) == ("content", "def f0(): pass", 3)
    assert (
        f"{data}: column content, 3 windows (fewer than evaluation.samples=128); it begins 'def f0(): pass'\n"
        in capsys.readouterr().out
    )
    assert run_here("evaluate", "model=embedded", data, "evaluation.text_column=url", f"output_dir={tmp_path}") == 0
    assert results(tmp_path, "evaluate")["data"]["evaluation"]["first"] == "x" * 80


def test_version(capsys):
    assert run_here("--version") == run_here("-V") == 0
    assert capsys.readouterr().out == f"megatron-lowbit {metadata.version('megatron-lowbit')}\n" * 2
    assert megatron_lowbit.__version__ == metadata.version("megatron-lowbit"), "what a bare checkout says"


def test_usage_names_every_stage(capsys):
    assert run_here() == run_here("--help") == run_here("help") == 0
    out = capsys.readouterr().out
    assert all(f"  {stage} " in out for stage in ("demo", "calibrate", "quantize", "evaluate", "generate", "benchmark"))


def test_an_unknown_kind_of_benchmark(capsys):
    assert run_here("benchmark", "models") == 2
    assert "unknown benchmark 'models'; did you mean 'model'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "given", "sleeps"),
    [
        slow("megatron_lowbit.launch", {}, True),
        ("megatron_lowbit.launch.quantize", {}, True),
        ("megatron_lowbit.launch.serve", {}, True),
        slow("megatron_lowbit.launch", {"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_threads_sleep_while_they_wait(module, given, sleeps, tmp_path):
    """As libgomp itself says when torch loads it: how often a thread looks before it sleeps, 300,000 by default."""
    stage = ["quantize"] if module.endswith("launch") else []
    argv = [sys.executable, "-m", module, *stage, "model=embedded", "weights.scheme=W4A8", f"output_dir={tmp_path}"]
    code = 0
    if module.endswith("serve"):  # torch is there by then
        argv, code = [*argv, "host=nohost.invalid"], 2
    outside = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    outside |= {"OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run(argv, env=outside, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    counts = re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)'", done.stderr)
    if not counts:
        pytest.skip("torch's OpenMP is not libgomp")
    assert (int(counts[0]) == 0) == sleeps
