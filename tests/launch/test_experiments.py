"""evaluate --experiment: the papers' rows, what they are made with, and that no row is made twice."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import CALIBRATION, EVALUATION, run_here
from task_files import write_tasks
from tiny_models import two_blocks

from megatron_lowbit.config import EvaluateConfig, QuantizeConfig, load_config
from megatron_lowbit.launch.studies.qllm_table import variants

COMM = ["int4", "random 1/64", "hybrid 1/256", "hybrid 1/128", "hybrid 1/64", "hybrid 1/32", "hybrid 1/16", "ours"]
QLLM = ["full", "W4A4 rtn", "W4A4 qllm", "W4A4 best"]
MODEL = [f"model={two_blocks()}", "dtype=float32", *CALIBRATION, *EVALUATION]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "evaluate.json").read_text())["rows"]


def with_tasks(folder: Path) -> list[str]:
    """Options of one task, where lm-eval is installed."""
    if find_spec("lm_eval") is None:
        return []
    data = write_tasks(folder / "data", 4)
    return ["evaluation.tasks=[local_arc_easy]", f"evaluation.task_data={data}"]


@pytest.fixture(scope="module")
def comm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comm")
    command = ["evaluate", "--experiment", "lowbit_comm", *MODEL, "comm.tp_sizes=[2,4]", *with_tasks(folder)]
    command.append(f"output_dir={folder}")
    assert run_here(*command) == 0
    return folder, command


def test_rows_of_lowbit_comm(comm):
    folder, _ = comm
    found = rows(folder)
    names = [("full precision", 1), *((name, size) for size in (2, 4) for name in COMM)]
    assert [(row["name"], row["tp"]) for row in found] == names
    features = 128  # of the embedded model: 1/256 of them is none
    expected = {"int4": 4 + 8 / features, "hybrid 1/64": 4 + 12 * 2 / features, "hybrid 1/16": 4 + 12 * 8 / features}
    for row in found[1:]:
        assert row["kl"] > 0 and row["kl_stderr"] > 0 and math.isfinite(row["perplexity"])
        if row["name"] in expected:
            assert row["bits_per_value"] == pytest.approx(expected[row["name"]])
    for size in (2, 4):
        kl = {row["name"]: row["kl"] for row in found if row["tp"] == size}
        assert kl["ours"] < kl["hybrid 1/64"] and kl["hybrid 1/16"] < kl["int4"]
        assert kl["hybrid 1/256"] == kl["int4"], "floor(128 / 256) features"
    if "tasks" in found[0]:
        assert found[0]["accuracy"] > 0
        assert all(row["accuracy_kept_percent"] is not None for row in found)
        kept = [*folder.glob("tasks/tp*/*.json")]
        assert kept and all("ema_gamma" in file.read_text() for file in kept), "what ranges are of decides the logits"


def test_a_row_is_what_evaluate_measures(comm, tmp_path):
    """The paper's own row, by the command that calibrates and patches for itself."""
    settings = ["virtual_tp=4", "comm.preset=paper", "comm.mode=one_shot", "comm.drift_threshold=none"]
    assert run_here("evaluate", *MODEL, *settings, "comm.bf16_fraction=0.03125", f"output_dir={tmp_path}") == 0
    (expected,) = [row for row in rows(tmp_path) if row["kl"]]
    (found,) = [row for row in rows(comm[0]) if (row["name"], row["tp"]) == ("hybrid 1/32", 4)]
    for key in ("perplexity", "kl", "bits_per_value", "sqnr_db"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key


def test_rows_that_are_done_are_not_made_again(comm, monkeypatch):
    from megatron_lowbit.launch.studies import lowbit_comm

    folder, command = comm
    before, made = rows(folder), []
    measure = lowbit_comm.applied_row
    monkeypatch.setattr(
        lowbit_comm, "applied_row", lambda engine, name, *rest: made.append(name) or measure(engine, name, *rest)
    )
    assert run_here(*command) == 0
    assert made == [] and rows(folder) == before
    (folder / "lowbit_comm" / "tp4" / "ours.json").unlink()
    damaged = folder / "lowbit_comm" / "tp2" / "int4.json"
    damaged.write_text(damaged.read_text()[:-40])
    assert run_here(*command) == 0
    assert made == ["int4", "ours"]
    again = {(row["name"], row["tp"]): row["kl"] for row in rows(folder)}
    assert again == pytest.approx({(row["name"], row["tp"]): row["kl"] for row in before})


@pytest.fixture(scope="module")
def qllm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qllm")
    small = ["calibration.samples=2", "correction.epochs=1", "reassembly.expansions=[0.05]", "weights.scheme=W4A4"]
    command = ["evaluate", "--experiment", "qllm", *MODEL, *small, *with_tasks(folder), f"output_dir={folder}"]
    assert run_here(*command) == 0
    return folder, command


def test_rows_of_qllm(qllm, monkeypatch):
    folder, command = qllm
    found = rows(folder)
    assert [row["name"] for row in found] == QLLM
    assert all(row["kl"] > 0 and row["quantize_seconds"] > 0 for row in found[1:])
    settings = {
        name: json.loads((folder / "qllm" / f"W4A4_{name}" / "row.json").read_text())["settings"]
        for name in ("qllm", "best")
    }
    assert settings["qllm"]["correction"]["epochs"] == 1 and settings["qllm"]["correction"]["learning_rate"] == 5e-4
    assert settings["qllm"]["correction"]["mode"] == "merged" and settings["best"]["correction"]["mode"] == "none"
    assert settings["best"]["weights"]["rotation"] == "learned" and settings["qllm"]["weights"]["rotation"] == "none"
    made = {path: path.stat().st_mtime_ns for path in (folder / "qllm").rglob("*.safetensors")}
    assert run_here(*command) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "qllm").rglob("*.safetensors")}
    assert [row["kl"] for row in rows(folder)] == [row["kl"] for row in found]


def test_the_rows_of_qllm_are_the_presets(tmp_path):
    """As quantize would be told, from the command line, from a file and from Python; keys that are given win."""
    file = tmp_path / "run.yaml"
    file.write_text("experiment: qllm\ncorrection: {learning_rate: 0.0001}\n")
    configs = [
        load_config(EvaluateConfig, None, ["experiment=qllm", "correction.learning_rate=0.0001"]),
        load_config(EvaluateConfig, str(file), []),
        EvaluateConfig(experiment="qllm", correction={"learning_rate": 1e-4}),
    ]
    expected = QuantizeConfig(weights={"preset": "qllm"}, correction={"learning_rate": 1e-4})
    best = QuantizeConfig(weights={"preset": "best"})
    for config in configs:
        row = variants(config)
        assert (row["qllm"].reassembly, row["qllm"].correction) == (expected.reassembly, expected.correction)
        assert (row["best"].reassembly, row["best"].correction) == (best.reassembly, best.correction)
        assert config.weights.rotation == "none" and config.weights.method == "qllm"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--experiment", "lowbit_com"], "did you mean 'lowbit_comm'"),
        (["--experiment", "lowbit_comm", "--ablation"], "two tables"),
        (["--experiment", "lowbit_comm", "virtual_tp=2"], "name the numbers of ranks as comm.tp_sizes"),
        (["--experiment", "lowbit_comm", "comm.bits=5"], "leave comm.* but comm.tp_sizes out"),
        (["--experiment", "lowbit_comm", "comm.tp_sizes=[3]"], "comm.tp_sizes=3"),
        (["--experiment", "qllm", "weights.preset=best"], "leave weights.preset out"),
        (["--experiment", "qllm", "weights.scheme=W8A8"], "is none of them"),
        (["--experiment", "qllm", "virtual_tp=2"], "leave artifact, engine, virtual_tp and dp out"),
    ],
)
def test_bad_input_is_one_line(options, says, tmp_path, capfd):
    assert run_here("evaluate", *options, *MODEL, f"output_dir={tmp_path}") == 2
    err = capfd.readouterr().err
    assert says in err and len(err.splitlines()) == 1
