"""The cost model of --dry-run against counts of what really runs, and against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import CALIBRATION_TEXT, COMMAND, run_here, run_there
from slow_cases import slow
from tiny_models import two_blocks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import RatesConfig
from megatron_lowbit.launch.dry_run.cost_model import OBSERVING_BYTES, ROUNDING_BYTES, find_rates
from megatron_lowbit.qllm import pipeline

CONFIG = Path(__file__).parents[2] / "configs" / "llama2_70b.yaml"
RATES = {"flops": 4e14, "memory": 2e12, "disk": 1e9, "network": 1e11}
TEXT = [f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=2", "calibration.sequence_length=64"]


def attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * sdpa_flop_count(query_shape, key_shape, value_shape)


# torch counts the attention of GPUs only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def dry_run(folder: Path, *arguments: str) -> dict:
    given = [f"rates.{name}={value}" for name, value in RATES.items()]
    assert run_here("quantize", "--dry-run", *given, *arguments, f"output_dir={folder}") == 0
    return json.loads((folder / "quantize.json").read_text())["rows"][-1]


@pytest.mark.parametrize("rank", (slow("4"), "auto"))
def test_operations_are_those_that_run(rank, tmp_path, monkeypatch):
    """torch counts what quantize multiplies. Our count knows nothing of low-rank products and norms' gains."""
    arguments = [f"model={two_blocks()}", "correction.blocks_per_group=1", *TEXT]
    arguments += ["weights.scheme=W4A4", "correction.epochs=1", f"correction.rank={rank}"]
    said = dry_run(tmp_path / "dry", *arguments)["stages"]
    real, counts = pipeline.BlockwiseQuantizer._quantize_group, []

    def counted(self, *group):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            real(self, *group)
        counts.append(counter.get_total_flops())

    monkeypatch.setattr(pipeline.BlockwiseQuantizer, "_quantize_group", counted)
    assert run_here("quantize", *arguments, f"output_dir={tmp_path / 'run'}") == 0
    assert len(counts) == 2
    assert sum(stage["flops"] for stage in said.values()) == pytest.approx(sum(counts), rel=0.05)


def test_seconds_are_work_over_rates(tmp_path):
    total = dry_run(tmp_path, "--config", str(CONFIG), "tp=8", "dp=8", "correction.batch_size=8", "dtype=bfloat16")
    assert total["rates"]["given"] == ["flops", "rounded", "observed", "disk", "network"]
    per_second = {**RATES, "rounded": RATES["memory"] / ROUNDING_BYTES, "observed": RATES["memory"] / OBSERVING_BYTES}
    for stage in (*total["stages"].values(), total["calibrate"]):
        for resource, seconds in stage["seconds"].items():
            assert seconds == pytest.approx(stage[resource] / per_second[resource])
    seconds = sum(sum(stage["seconds"].values()) for stage in total["stages"].values())
    assert total["estimated_seconds"] == pytest.approx(seconds)
    # One forward of 128 windows of 2048 tokens over 8 data-parallel ranks: two per weight, and the attention.
    weights = 8192 * (8192 + 2 * 1024 + 8192 + 3 * 28672) // 8
    forward = 80 * 128 * 2048 / 8 * (2 * weights + 4 * 2048 * 8192 / 8)
    assert total["stages"]["full precision"]["flops"] == pytest.approx(forward)
    # Two sums of all 8 shards' bf16 partial sums, of which 7 come from other ranks.
    assert total["stages"]["full precision"]["network"] == pytest.approx(80 * 128 * 2048 / 8 * 2 * 7 * 8192 * 2)
    assert total["stages"]["load"]["disk"] == 80 * weights * 2
    # Partial sums of o and down: the whole one, and those of 2, 4 and 8 ranks.
    assert total["stages"]["ranges"]["observed"] == 80 * 128 * 2048 / 8 * 2 * 15 * 8192


def test_more_ranks_take_less(tmp_path):
    layouts = {"1": [], "8": ["tp=8"], "64": ["tp=8", "dp=8", "correction.batch_size=8"]}
    found = {
        name: dry_run(tmp_path / name, "--config", str(CONFIG), "dtype=bfloat16", *layout)
        for name, layout in layouts.items()
    }
    seconds = [total["estimated_seconds"] for total in found.values()]
    assert seconds[0] > 2 * seconds[1] > 4 * seconds[2]
    assert sum(s["network"] for s in found["1"]["stages"].values()) == found["1"]["calibrate"]["network"] == 0


def test_an_unknown_network_is_left_out(tmp_path, capsys):
    arguments = ["--config", str(CONFIG), "--dry-run", "tp=8", f"output_dir={tmp_path}"]
    assert run_here("quantize", *arguments) == 0
    total = json.loads((tmp_path / "quantize.json").read_text())["rows"][-1]
    assert total["rates"]["network"] is None and total["rates"]["given"] == []
    assert all("network" not in stage["seconds"] for stage in total["stages"].values())
    out = capsys.readouterr().out
    assert "give rates.network" in out and out.count("measured here") == 4


def test_rates_are_measured():
    rates = find_rates(RatesConfig(), 64, (256, 256), 256)
    assert all(value > 1e6 for value in (rates.flops, rates.rounded, rates.observed, rates.disk))


@pytest.mark.parametrize("change", ["rates.flops=0", "rates.memory=fast", "rates.flop=1"])
def test_bad_rates(change, tmp_path, capsys):
    assert run_here("quantize", "--config", CONFIG, "--dry-run", change, f"output_dir={tmp_path}") == 2
    assert change.partition("=")[0] in capsys.readouterr().err


def test_ranks_share_the_windows_of_calibrate(tmp_path):
    """dp=2 without an engine of its own: the same statistics, bit for bit; seven windows do not divide equally."""
    use = ["calibrate", "model=embedded", *TEXT[::2], "calibration.samples=7", "calibration.batch_size=4"]
    assert run_here(*use, f"output_dir={tmp_path / 'one'}") == 0
    code, _, stderr = run_there(*COMMAND, *use, "dp=2", f"output_dir={tmp_path / 'two'}")
    assert code == 0, stderr
    one, two = (CalibrationStats.load(tmp_path / name) for name in ("one", "two"))
    for size, sites in one.ranges.items():
        for name, ranges in sites.items():
            for field in ("min_vals", "max_vals", "mean", "std", "crest"):
                assert torch.equal(getattr(ranges, field), getattr(two.ranges[size][name], field)), (size, name, field)


@pytest.mark.parametrize("engine", ["deepspeed", "huggingface"])
def test_where_windows_are_not_shared(engine, tmp_path, capsys):
    layout = ["engine=deepspeed"] if engine == "deepspeed" else ["tp=2"]
    code = run_here("calibrate", "model=embedded", "dp=2", *layout, *TEXT, f"output_dir={tmp_path}")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and ("dp=2" if engine == "deepspeed" else "tp=2") in line
