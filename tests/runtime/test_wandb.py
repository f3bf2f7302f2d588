"""W&B: one logical run over killed and restarted processes, and a job that no outage stops or slows.

What is uploaded is read from the .wandb files by a reader of the tests' own (read_wandb.py).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import CALIBRATION_TEXT, COMMAND, SMALL_TEXT, run_there, started
from read_wandb import OfflineRun, read_file
from read_wandb import wandb_files as files
from tiny_models import save_model
from wandb_server import wandb_server

from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime import metrics, wandb_run
from megatron_lowbit.runtime.metrics import MetricLogger, read_metrics

wandb = pytest.importorskip("wandb", reason="needs megatron-lowbit[wandb]")

EVALUATE = ["evaluate", "model=embedded", "virtual_tp=2", "comm.mode=one_shot", *SMALL_TEXT]
# Three blocks in groups of one, two epochs each: per group two losses and a record of the group.
QUANTIZE = [
    *("quantize", f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=8", "calibration.sequence_length=64"),
    *("weights.scheme=W4A4", "reassembly.expansions=[0.05]", "correction.blocks_per_group=1", "correction.epochs=2"),
    *("comm.tp_sizes=[2]", "wandb=offline"),
]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Neither a key nor a running service of this process reaches what the tests start."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()


def logged(runs: list[OfflineRun]) -> list[dict]:
    """The history of all, merged as W&B does: record after record; an empty dictionary for what is no history."""
    return [entry for run in runs for entry in run.history if "step" in entry]


def told(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if "step" in record]


def figures(record: dict) -> dict:
    """What does not depend on the moment."""
    clock = ("time", "run", "group_seconds", "peak_bytes")
    return {key: value for key, value in record.items() if key not in clock}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, stderr = run_there(*COMMAND, *QUANTIZE, f"model={model}", f"output_dir={folder}")
    assert code == 0, stderr
    return folder


def test_a_run_that_is_not_interrupted(whole):
    (file,) = files(whole)
    run, records = read_file(file), told(whole)
    assert [entry["step"] for entry in run.history] == [record["step"] for record in records] == list(range(3 * 3 + 4))
    assert run.step_metrics["*"] == "step" and run.exit_code == 0
    losses = [(r["group"], r["epoch"]) for r in records if "correction_loss" in r]
    assert losses == [(group, epoch) for group in range(3) for epoch in range(2)]
    for record in records:
        if "correction_loss" in record:
            assert run.history[record["step"]]["correction_loss"] == record["correction_loss"]


def test_tables_of_every_layer(whole):
    tables = {record["table"]: record for record in told(whole) if "table" in record}
    assert set(tables) == {"reassembly", "correction", "ranges_tp2"}
    reassembly = tables["reassembly"]
    assert reassembly["columns"] == ["layer", "threshold", "splits", "added", "expansion", "error", "chosen"]
    inputs = ("input_layernorm", "post_attention_layernorm", "mlp.down_proj")
    assert [row[0] for row in reassembly["rows"]] == [f"model.layers.{n}.{name}" for n in range(3) for name in inputs]
    (row,) = [r for r in json.loads((whole / "quantize.json").read_text())["rows"] if "groups" in r]
    added = {name: number for group in row["groups"] for name, number in group["reassembled"].items()}
    for layer, threshold, splits, number, expansion, error, chosen in reassembly["rows"]:
        assert (threshold is None) == (number == 0) == (splits == 1) and number == added.get(layer, 0)
        assert expansion == pytest.approx(number / (172 if layer.endswith("down_proj") else 64), abs=0.02)
        assert chosen == ("reassemble" if number else "none")
        assert 0 < error <= 1, "more error than without reassembly was chosen"
    for name, about in [item for group in row["groups"] for item in group["layers"].items()]:
        counts, errors = zip(*about["search"], strict=True)
        assert counts[0] == 0 and 1.0 in errors and about["error"] == min(errors), name
        assert about["widest_before"][0] >= about["median_before"] > 0, name
    assert [row[:2] for row in tables["correction"]["rows"]] == [
        [group, epoch] for group in range(3) for epoch in (0, 1)
    ]
    charts = {key for entry in read_file(files(whole)[0]).history for key in entry}
    assert any(key.startswith("reassembly/plot") for key in charts), charts


def test_the_page_is_a_panel(whole):
    (file,) = files(whole)
    last = read_file(file).history[-1]
    assert last["report._type"] == "html-file"
    page = file.parent / "files" / last["report.path"]
    assert page.read_text() == (whole / "report.html").read_text(), "without a style sheet from the network"


def test_artifacts_are_references(whole):
    artifacts = read_file(files(whole)[0]).artifacts
    for kind, stems in {"checkpoint": {"lowbit"}, "plans": {"calibration", "comm_plan_tp2"}}.items():
        (artifact,) = [a for a in artifacts if a.type == kind]
        assert {name.partition(".")[0].partition("-")[0] for name in artifact.entries} == stems
        for name, (reference, _) in artifact.entries.items():
            assert reference == (whole / name).as_uri() and (whole / name).exists()
    assert not list(whole.glob("wandb/**/*.safetensors")), "a copy"


def test_config_and_environment(whole):
    config = read_file(files(whole)[0]).config
    assert config["weights"]["scheme"] == "W4A4" and config["environment"]["versions"]["wandb"] == wandb.__version__
    assert config["environment"]["job"] == {"host": socket.gethostname(), "world_size": 1, "launcher": "none"}
    assert {"commit", "machine"} < set(config["environment"])


@pytest.mark.slow
def test_killed_and_run_again(model, whole, tmp_path):
    """SIGKILL in the second group, of the process and of wandb's own, which loses what wandb has not written yet."""
    moment = 5
    command = [*COMMAND, *QUANTIZE, f"model={model}", f"output_dir={tmp_path}"]
    with started(*command) as process:
        deadline = time.monotonic() + 3000
        while len(told(tmp_path)) < moment and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(300)
    seen = len(told(tmp_path))
    code, _, stderr = run_there(*command, TZ="UTC-1")  # another clock must not matter
    assert code == 0 and "wandb sync" in stderr, stderr
    records = told(tmp_path)
    assert moment <= seen < len(records) and len({record["run"] for record in records}) == 1
    assert [figures(record) for record in records] == [figures(record) for record in told(whole)]
    runs = [read_file(file) for file in files(tmp_path)]
    assert len(runs) == 2 and {run.run_id for run in runs} <= {records[0]["run"], ""}  # the first may hold nothing
    merged = logged(runs)
    assert [entry["step"] for entry in merged] == list(range(len(records))), "a gap or an overlap"
    for record, entry in zip(records, merged, strict=True):
        if "correction_loss" in record:
            assert entry["correction_loss"] == record["correction_loss"]


def test_what_wandb_has_written_is_not_sent_again(tmp_path):
    """The first process got some of its records into wandb's file (here by ending in an orderly way)."""
    for values in (["a", "b"], ["a", "b", "c", "d"]):
        logger = MetricLogger(tmp_path, "evaluate", {"seed": 1}, "offline")
        for value in values:
            logger.log(row=value, perplexity=1.0)
        logger.close(1)
        wandb.teardown()
    assert [record["row"] for record in told(tmp_path)] == ["a", "b", "c", "d"]
    runs = [read_file(file) for file in files(tmp_path)]
    assert [[entry["row"] for entry in run.history] for run in runs] == [["a", "b"], ["c", "d"]]
    assert [wandb_run.last_step(file) for file in files(tmp_path)] == [1, 3]


def test_another_run_begins(tmp_path):
    """After one that finished, and for other settings; what a kill cut short is no obstacle."""
    ids, steps = [], []
    for seed, code in ((1, 0), (1, 1), (1, 1), (2, 1)):
        logger = MetricLogger(tmp_path, "evaluate", {"seed": seed, "output_dir": f"anywhere {len(ids)}"})
        logger.log(row="a", perplexity=1.0)
        ids.append(logger.run_id)
        steps.append(logger.step)
        logger.close(code)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"stage": "evaluate", "st')
    assert steps == [1, 1, 1, 1]
    assert ids[1] == ids[2] and len(set(ids)) == 3
    assert [record["run"] for record in told(tmp_path)] == [ids[0], ids[1], ids[3]]


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def check_offline(folder: Path, stderr: str, why: str) -> None:
    """Two lines: why it is not online, and how to upload what is there, which is everything."""
    lines = stderr.splitlines()
    assert len(lines) == 2 and "cannot log online" in lines[0] and why in lines[0], stderr
    words = shlex.split(lines[1])
    assert words[-3:-1] == ["wandb", "sync"] and list(Path("/").glob(words[-1][1:])), lines[1]
    run = read_file(files(folder)[-1])
    assert [entry["step"] for entry in run.history] == [record["step"] for record in told(folder)] != []


def test_a_server_that_never_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run, "ANSWER_SECONDS", 0.5)
    with silent_server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        logger = MetricLogger(tmp_path, "evaluate", {}, "online")
        logger.log(row="a", perplexity=1.0)
        logger.close(0)
        wandb.teardown()  # its service has then written all
    check_offline(tmp_path, capsys.readouterr().err, "graphql: timed out")


@pytest.mark.slow
def test_a_silent_server(tmp_path):
    """The same job without W&B finds the same."""
    rows = {}
    with silent_server() as url:
        for mode in ("off", "online"):
            folder = tmp_path / mode
            server = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
            code, _, stderr = run_there(*COMMAND, *EVALUATE, f"wandb={mode}", f"output_dir={folder}", **server)
            assert code == 0, stderr
            rows[mode] = json.loads((folder / "evaluate.json").read_text())["rows"]
            assert all(row.pop("evaluate_seconds") > 0 for row in rows[mode])
    said = [line for line in stderr.splitlines() if line.startswith("W&B: ")]  # beside what was written and comes next
    check_offline(tmp_path / "online", "\n".join(said), "graphql: timed out")
    assert rows["off"] == rows["online"]


def test_no_key(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a folder"
    folder.mkdir()
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = MetricLogger(folder, "evaluate", {}, "online")
        logger.log(row="a", perplexity=1.0)
        logger.close(0)
    check_offline(folder, capsys.readouterr().err, "API key")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """online(server): a logger whose run is online there."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2)

    def start(server) -> MetricLogger:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        return MetricLogger(tmp_path, "evaluate", {}, "online")

    return start


def log_rows(logger: MetricLogger, *rows: str) -> None:
    for row in rows:
        logger.log(row=row, perplexity=1.0)


def test_online(online, capsys):
    with wandb_server() as server:
        logger = online(server)
        log_rows(logger, "a", "b")
        logger.close(0)
        wandb.teardown()
    assert [(entry["step"], entry["row"]) for entry in server.history] == [(0, "a"), (1, "b")]
    assert capsys.readouterr().err == ""


def test_an_outage_in_the_middle(online, tmp_path, capsys):
    """All that could not be uploaded is in the file; neither a record nor the end waits for an answer, which never
    comes."""
    with wandb_server() as server:
        logger = online(server)
        log_rows(logger, "a")
        deadline = time.monotonic() + 300
        while logger._run._run is None and time.monotonic() < deadline:
            time.sleep(0.05)
        server.silent = True
        log_rows(logger, "b", "c")
        logger.close(0)
        wandb.teardown()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B: ")]
    assert "not all is uploaded" in line and "wandb sync --include-online" in line
    assert [entry["row"] for entry in read_file(files(tmp_path)[-1]).history] == ["a", "b", "c"]


def test_online_again(online, tmp_path):
    """The server knows the steps up to 1, metrics.jsonl those up to 2: what is missing there is sent first."""
    logger = MetricLogger(tmp_path, "evaluate", {})
    log_rows(logger, "a", "b", "c")
    logger.close(1)
    with wandb_server(known=1) as server:
        logger = online(server)
        log_rows(logger, "a", "b", "c", "d")
        logger.close(0)
        wandb.teardown()
    assert [(entry["step"], entry["row"]) for entry in server.history] == [(2, "c"), (3, "d")]


class Broken:
    """A run of which every use raises."""

    def __getattr__(self, name):
        raise RuntimeError(f"{name} is broken")


@pytest.mark.parametrize("where", ["init", "log"])
def test_an_exception_of_wandb_is_one_notice(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run.WandbRun, "_start", lambda self, config: setattr(self, "_run", Broken()))
    if where == "init":
        monkeypatch.setattr(wandb_run.WandbRun, "_start", lambda self, config: Broken().init)
    logger = MetricLogger(tmp_path, "evaluate", {}, "offline")
    for row in ("a", "b"):
        logger.log(row=row, perplexity=1.0)
    logger.table("sqnr", ["site"], [["a"]])
    logger.artifact("plans", [tmp_path / "metrics.jsonl"])
    logger.summary(seconds=1.0)
    logger.close(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("W&B: ") and "is broken" in line and "metrics.jsonl" in line
    assert len(told(tmp_path)) == 3


def test_a_wandb_that_hangs_does_not_hold_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run, "CLOSE_SECONDS", 0.5)
    over = threading.Event()
    monkeypatch.setattr(wandb_run.WandbRun, "_start", lambda self, config: over.wait())
    logger = MetricLogger(tmp_path, "evaluate", {}, "online")
    logger.log(row="a", perplexity=1.0)
    logger.close(0)
    over.set()
    assert "gave up after 0.5 s" in capsys.readouterr().err


def test_other_ranks_say_nothing(tmp_path):
    logger = MetricLogger(tmp_path, "evaluate", {}, "offline", rank=1)
    logger.log(row="a", perplexity=1.0)
    logger.table("sqnr", ["site"], [["a"]])
    logger.artifact("plans", [tmp_path])
    logger.close(0)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert metrics.job()["slurm_job_id"] == "17" and metrics.job()["launcher"] == "srun"


def test_a_full_disk_is_told(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(LowBitError, match="No space left"):
        MetricLogger(tmp_path, "evaluate", {})
