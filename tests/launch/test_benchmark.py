"""megatron-lowbit benchmark: time to the first token, on loopback and behind slow links."""

from __future__ import annotations

import json
import os

import pytest
import torch
from commands import CALIBRATION, COMMAND, needs_deepspeed, run_here, run_there

from megatron_lowbit.launch import benchmark
from megatron_lowbit.launch.bench import netlab

LOW_BIT = "two_shot per-token tiered int4"
ROWS = ["patched, nothing quantized", LOW_BIT, "W4A16", f"W4A8 + {LOW_BIT}"]
QUICK = [*CALIBRATION, "repeats=2", "tokens=256", "tp=2"]


@needs_deepspeed
@pytest.mark.slow
def test_slow_links_slow_the_unpatched_engine_down(needs_namespaces, tmp_path):
    """256 tokens of bf16 partial sums, 128 wide, twice in each of 6 blocks, are 786,432 bytes either way at N = 2. That
    takes 0.31 s at 20 Mbit/s, but 128 KiB pass at once at both ends of a link. The low-bit ones are a quarter."""
    use = [*QUICK, "rate=20mbit", "comm.mode=two_shot", "comm.drift_threshold=none", f"output_dir={tmp_path}"]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", *use)
    assert code == 0, stderr
    assert "links of 20mbit" in stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    assert list(rows) == ROWS
    assert all(unpatched > 8 * (786_432 - 2 * 2**16) / 2e7 for row in rows.values() for unpatched, _ in row["pairs"])
    assert all(len(row["pairs"]) == 2 for row in rows.values())


@needs_deepspeed
def test_rows_on_loopback(tmp_path):
    """What each row compares, and that both engines' times come in pairs."""
    use = [*QUICK, "comm.mode=two_shot", "comm.drift_threshold=none", f"output_dir={tmp_path}"]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", *use)
    assert code == 0, stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    assert list(rows) == ROWS and all(name in stdout for name in ROWS)
    assert all(len(row["pairs"]) == 2 and min(min(pair) for pair in row["pairs"]) > 0 for row in rows.values())


def test_an_artifact_is_timed(embedded_artifact, tmp_path):
    """Its own scheme, in place of those that the model is rounded to."""
    use = ["engine=huggingface", "tp=1", "virtual_tp=2", "repeats=2", "tokens=64", "comm.mode=two_shot"]
    use = [*CALIBRATION, *use, f"artifact={embedded_artifact}", f"output_dir={tmp_path}"]
    assert run_here("benchmark", *use) == 0
    rows = [row["name"] for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]]
    assert rows == [*ROWS[:2], f"W4A4 + {LOW_BIT}"]


def test_only_the_last_token_has_logits():
    class Recorder:
        group = None

        def __call__(self, **given):
            self.given = given

    engine, ids = Recorder(), torch.zeros(1, 8, dtype=torch.int64)
    assert benchmark._forward_seconds(engine, ids) > 0  # type: ignore[arg-type]
    assert engine.given == {"input_ids": ids, "logits_to_keep": 1}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rate=fast", "give a rate such as 100mbit, 1gbit or 10gbit"),
        ("comm.mode=bf16", "comm.mode=bf16 is what the others are compared with; name another"),
        ("engine=huggingface", "rate needs ranks on a network; set engine=deepspeed or engine=megatron"),
        ("tp=1", "the benchmark compares collectives: set tp=2"),
    ],
)
def test_bad_input(tmp_path, capsys, argument, message):
    if argument == "tp=1":
        assert run_here("benchmark", "engine=huggingface", *CALIBRATION, argument, f"output_dir={tmp_path}") == 2
    else:
        assert run_here("benchmark", "rate=1gbit", *QUICK, argument, f"output_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_rate_needs_root(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert run_here("benchmark", *QUICK, "rate=1gbit", f"output_dir={tmp_path}") == 2
    assert "rate=1gbit needs root" in capsys.readouterr().err
