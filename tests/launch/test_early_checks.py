"""What would be noticed late, or never: NaN beside the linears, partial sums that overflow, too little text, features
that never moved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from commands import needs_deepspeed, needs_megatron, run_here
from tiny_models import make_artifact, save_artifact, save_model
from transformers import AutoModelForCausalLM

from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.comm.observers import RangeObserver, SharedSteps
from megatron_lowbit.config import CommConfig, LowBitError


@pytest.mark.parametrize("method", ["rtn", "qllm"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_nan_outside_the_linears_stops_quantize(method, name, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = save_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    given = [f"calibration.data={text}", "calibration.samples=4"] if method == "qllm" else []
    settings = ["weights.scheme=W4A16", f"weights.method={method}", f"output_dir={tmp_path / 'out'}", *given]
    capsys.readouterr()
    assert run_here("quantize", f"model={folder}", *settings) == 2
    line = capsys.readouterr().err.strip()
    assert f"{name} holds NaN or Inf; repair the checkpoint" in line and "\n" not in line
    assert not (tmp_path / "out/lowbit.json").exists()


def test_partial_sums_that_overflow_stop_calibration():
    """In float16 two of them may, while their sum fits: their plan would be refused when it is loaded."""
    full = torch.ones(1, 4, 3)
    parts = [torch.full((1, 4, 3), 60000.0) * 2, torch.ones(1, 4, 3)]
    parts[0] = parts[0].half().float()
    observers = [RangeObserver(1, 3, 0.1, full.device), RangeObserver(2, 3, 0.1, full.device)]
    steps = SharedSteps(None)
    steps.observe("down_proj puts out", observers, [[full], parts], torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(LowBitError, match="down_proj puts out NaN or Inf"):
        steps.finish()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A model of 8 heads and 4 KV heads, `artifact` with a plan for two ranks, and `weights` without plans."""
    folder = save_model("llama", tmp_path_factory.mktemp("fitted"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, sizes in {"artifact": (2,), "weights": ()}.items():
        save_artifact(make_artifact(model, "W4A8", tp_sizes=sizes), folder / name)
        (folder / name / "config.json").write_bytes((folder / "config.json").read_bytes())
    return folder


@pytest.fixture
def nothing_loads(monkeypatch):
    """No rank is started and no weight is read."""

    def too_late(*arguments, **options):
        raise AssertionError("too late")

    monkeypatch.setattr("megatron_lowbit.launch.runner.start_ranks", too_late)
    monkeypatch.setattr("megatron_lowbit.launch.runner.run_rank", too_late)


HEADS = "tp=3 does not divide the model's num_attention_heads=8; choose one of ["
NO_PLAN = "no communication plan for tp_size 4 (there are [2]); run calibrate with comm.tp_sizes=[4]"


@needs_deepspeed
@needs_megatron
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate model={folder} evaluation.data=stdlib:validation engine=deepspeed tp=3", HEADS),
        ("generate artifact={folder}/artifact prompt=x engine=deepspeed tp=3", HEADS),
        ("generate artifact={folder}/artifact prompt=x engine=megatron tp=3", HEADS),
        ("quantize model={folder} weights.scheme=W4A8 engine=deepspeed tp=3", HEADS),
        ("calibrate model={folder} calibration.data=stdlib:calibration engine=megatron tp=3", HEADS),
        ("generate model={folder} prompt=x virtual_tp=3", f"virtual_{HEADS}"),
        ("generate model={folder} artifact={folder}/artifact prompt=x engine=deepspeed tp=4", NO_PLAN),
        ("generate artifact={folder}/artifact prompt=x engine=megatron tp=4", NO_PLAN),
        ("generate artifact={folder}/artifact prompt=x virtual_tp=4", NO_PLAN),
    ],
)
def test_what_does_not_fit_is_told_before_ranks_start(command, said, fitted, nothing_loads, tmp_path, capsys):
    assert run_here(*command.format(folder=fitted).split(), f"output_dir={tmp_path / 'out'}") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"megatron-lowbit: {said}") and "\n" not in line
    assert not (tmp_path / "out").exists()


@needs_deepspeed
@pytest.mark.parametrize(
    "command",
    [
        "generate model={folder} artifact={folder}/artifact prompt=x engine=deepspeed tp=2",
        "generate model={folder} artifact={folder}/artifact prompt=x engine=deepspeed tp=4 comm.mode=bf16",
        "generate model={folder} artifact={folder}/artifact prompt=x engine=deepspeed tp=4 comm.mode=one_shot "
        "calibration.data=stdlib:calibration",
        "generate artifact={folder}/weights prompt=x virtual_tp=4",
    ],
)
def test_what_fits_goes_on(command, fitted, nothing_loads, tmp_path):
    with pytest.raises(AssertionError, match="too late"):
        run_here(*command.format(folder=fitted).split(), f"output_dir={tmp_path / 'out'}")


@pytest.mark.parametrize("samples", [4, 400])
def test_fewer_windows_than_asked_for_are_told(samples, tmp_path, capsys):
    folder = save_model("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    given = [f"calibration.data={text}", f"calibration.samples={samples}", "comm.tp_sizes=[2]"]
    assert run_here("calibrate", f"model={folder}", *given, f"output_dir={tmp_path / 'out'}") == 0
    assert ("fewer than calibration.samples=400" in capsys.readouterr().out) == (samples == 400)


@pytest.mark.parametrize("preset", [{}, {"preset": "paper", "scale": "rank1"}, {"preset": "paper"}])
def test_a_feature_that_never_moved_is_no_noise(preset):
    """A row of zeros in down_proj (a pruned channel). Codes have no middle, so with per-token scales it is off by about
    its own: one of 1.0 would be a hundred times the other features' size here."""
    x = 0.01 * torch.randn(2, 512, 128, generator=torch.Generator().manual_seed(0))
    x[:, :, 5] = 0
    wire = WireFormat(synthetic_plan(x, CommConfig(**preset)).first)
    decoded = wire.unpack_reduce(torch.stack([wire.pack(x[rank], rank) for rank in (0, 1)]), torch.float32)
    error = (decoded - x.sum(0)).square().mean(0).sqrt()
    assert error[5] < 2 * error.median()
    x[1, 3, 5] = 0.01  # and if it moves after all, the token's other features stay as good
    again = wire.unpack_reduce(torch.stack([wire.pack(x[rank], rank) for rank in (0, 1)]), torch.float32)
    assert (again - x.sum(0))[3].square().mean().sqrt() < 2 * error.median()
