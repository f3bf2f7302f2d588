"""Commands of several processes, started as a user starts them: the demo, torchrun, deepspeed, and a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import COMMAND, EVALUATION, alive_in_group, needs_deepspeed, ranks_of, run_here, run_there, started
from ports import free_port
from tiny_models import embedded_folder

from megatron_lowbit.runtime.preemption import REQUEUE

pytestmark = needs_deepspeed
NAMES = ["full precision", "W4A16", "W8A8", "W4A4", "int4 communication", "random bf16", "hybrid"]
NAMES += ["tiered", "W4A8 + tiered"]
TWO_RANKS = ["model=embedded", "engine=deepspeed", "tp=2"]


def rows(folder: Path, stage: str) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / f"{stage}.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(output folder, standard output) of one demo on two real ranks."""
    folder = tmp_path_factory.mktemp("demo")
    # Of less text, one site's ranges do not hold on what is evaluated, and it falls back to bf16.
    calibration = ["calibration.data=stdlib:calibration", "calibration.samples=32", "calibration.sequence_length=64"]
    arguments = [*calibration, *EVALUATION, "max_new_tokens=4", f"output_dir={folder}"]
    code, stdout, stderr = run_there(*COMMAND, "demo", *arguments)
    assert code == 0, stderr
    return folder, stdout


def test_demo_rows(demo):
    folder, stdout = demo
    by_name = rows(folder, "demo")
    assert list(by_name) == NAMES
    assert {row["tp"] for row in by_name.values()} == {2} and {row["tokens"] for row in by_name.values()} == {4 * 63}
    bits = {name: row["bits_per_value"] for name, row in by_name.items()}
    weights_only = dict.fromkeys(["W4A16", "W8A8", "W4A4"], 16.0)  # with plain bf16 communication
    low_bit = dict.fromkeys(["random bf16", "hybrid"], 4.1875)
    # 32: DeepSpeed's own all-reduce of float32 partial sums, on a CPU
    tiered = bits.pop("tiered")
    assert 4 < tiered == bits.pop("W4A8 + tiered") <= 4.1875, "adaptive bits of the same budget"
    assert bits == {"full precision": 32.0, **weights_only, "int4 communication": 4 + 8 / 128, **low_bit}
    for row in by_name.values():  # 12 sites of 128 features
        assert row["bytes_per_token"] == 12 * 128 * row["bits_per_value"] / 8
    assert all(f" {name} " in stdout for name in NAMES)


def test_demo_quality_is_in_order(demo):
    """Only comparisons that hold for any weights: fewer bits on top of the same rest."""
    by_name = rows(demo[0], "demo")
    kl = {name: row["kl"] for name, row in by_name.items()}
    assert kl["full precision"] == 0 < kl["W8A8"] < kl["W4A16"] and kl["W8A8"] < kl["W4A4"]
    assert all(0 < value < 5 for name, value in kl.items() if name != "full precision")
    sqnr = {name: row["sqnr_db"] for name, row in by_name.items()}
    # Steps of 4 bits are 17 times those of 8 bits: 24 dB. bf16 communication adds little: 48 dB by itself.
    assert sqnr["W8A8"] > sqnr["W4A16"] + 10 and sqnr["W4A16"] > sqnr["W4A4"]
    assert sqnr["tiered"] > max(sqnr["hybrid"], sqnr["W4A8 + tiered"])
    assert sqnr["full precision"] is None


def test_demo_leaves_an_artifact_of_the_whole_model(demo, tmp_path):
    """Written by a rank that held half the model; loads in one process, and gives the figures of the two."""
    folder, _ = demo
    config, original = (json.loads((f / "config.json").read_text()) for f in (folder / "artifact", embedded_folder()))
    assert {**config, "dtype": None} == {**original, "dtype": None}, "AutoTP's divided shapes were saved"
    use = ["model=embedded", f"artifact={folder / 'artifact'}", "virtual_tp=2", *EVALUATION]
    assert run_here("evaluate", *use, f"output_dir={tmp_path}") == 0
    real, virtual = rows(folder, "demo")["W4A8 + tiered"], rows(tmp_path, "evaluate")["W4A8 + per-token tiered int4"]
    # Bit-identical but where a matrix product of half the width rounds differently and a code flips.
    assert virtual["perplexity"] == pytest.approx(real["perplexity"], rel=1e-3)
    assert virtual["kl"] == pytest.approx(real["kl"], rel=0.02, abs=1e-6)
    assert virtual["bits_per_value"] == real["bits_per_value"]


def test_torchrun_and_the_deepspeed_launcher_agree(tmp_path):
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        "deepspeed": [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--master_port", str(free_port()), "--num_accelerators", "2", "--module"),
        ],
    }
    for name, launcher in launchers.items():
        arguments = [*TWO_RANKS, *EVALUATION, f"output_dir={tmp_path / name}"]
        code, stdout, stderr = run_there(*launcher, "megatron_lowbit.launch.evaluate", *arguments)
        assert code == 0, stderr
        assert stdout.count("perplex-") == 1, "more than one rank prints the table"
    torchrun, deepspeed = (rows(tmp_path / name, "evaluate") for name in launchers)
    for row in (*torchrun.values(), *deepspeed.values()):
        assert row.pop("evaluate_seconds") > 0
    assert torchrun == deepspeed and list(torchrun) == ["full precision", "full precision + float32"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_command(tmp_path, victim):
    """Rank 0 dies before it has joined its peer, rank 1 in the middle of the work."""
    arguments = [*TWO_RANKS, "calibration.data=stdlib:calibration", "calibration.samples=512", f"output_dir={tmp_path}"]
    metrics = tmp_path / "metrics.jsonl"
    with started(*COMMAND, "calibrate", *arguments, "calibration.batch_size=1") as process:
        ranks = ranks_of(process, 2)
        deadline = time.monotonic() + 300
        while (
            victim == 1 and time.monotonic() < deadline and not (metrics.exists() and '"step"' in metrics.read_text())
        ):
            time.sleep(0.05)
        assert process.poll() is None
        os.kill(ranks[victim], signal.SIGKILL)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode not in (0, None) and process.returncode > 0
        assert not alive_in_group(process.pid), "a rank outlives its command"
    if victim == 1:
        assert "a collective failed: " in stderr and "Traceback" not in stderr
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "calibrate.json").exists()


@pytest.mark.slow
def test_terminating_a_command_ends_its_ranks(tmp_path):
    """What a scheduler or `timeout` does: the ranks hear of it from the command, and all ask to be run again."""
    arguments = [*TWO_RANKS, "calibration.data=stdlib:calibration", f"output_dir={tmp_path}"]
    with started(*COMMAND, "calibrate", *arguments) as process:
        ranks_of(process, 2)
        process.terminate()
        process.communicate(timeout=300)  # its ranks hear it once they have imported torch
        assert process.returncode == REQUEUE
        assert not alive_in_group(process.pid)
