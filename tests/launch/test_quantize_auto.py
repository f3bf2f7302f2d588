"""weights.scheme=auto in `quantize`: what is chosen and written, on one rank and on several, and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import CALIBRATION_TEXT, COMMAND, run_here, run_there
from slow_cases import slow_but
from tiny_models import save_model
from unfinished_runs import artifact_files, killed_at

from megatron_lowbit.adapters.huggingface.apply import find_linears, sharing_bits
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.launch import allocate
from megatron_lowbit.launch.loading import load_model, read_config
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

TEXT = [
    *(f"calibration.data={CALIBRATION_TEXT}", "calibration.samples=6", "calibration.sequence_length=64"),
    "comm.tp_sizes=[2]",
]
RTN = ["weights.method=rtn", *TEXT]
QLLM = [*TEXT, "reassembly.expansions=[0.05]", "correction.blocks_per_group=1", "correction.epochs=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def command(model: Path, folder: Path, *settings: str) -> list[str]:
    auto = ["weights.scheme=autoA8", "weights.budget=4.5"]
    return ["quantize", f"model={model}", *auto, f"output_dir={folder}", *settings]


@pytest.fixture(scope="module")
def rtn(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rtn")
    assert run_here(*command(model, folder, *RTN)) == 0
    return folder


@pytest.fixture(scope="module")
def qllm(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qllm")
    assert run_here(*command(model, folder, *QLLM)) == 0
    return folder


def test_what_is_written(model, rtn):
    """Each linear rounded to its own bits, under the budget, qkv and gate and up to one number each."""
    meta = json.loads((rtn / "lowbit.json").read_text())
    assert meta["format"] == 6 and meta["scheme"] == "autoA8" and "head" not in meta
    checkpoint = LowBitCheckpoint.load(rtn)
    allocation, whole = checkpoint.allocation, load_model(QuantizeConfig(model=str(model)), read_config(model), None)
    linears = find_linears(whole)
    assert allocation is not None and allocation.bits.keys() == linears.keys() == checkpoint.linears.keys()
    for names in sharing_bits(linears).values():
        assert len({allocation.bits[name] for name in names}) == 1
    assert len(set(allocation.bits.values())) > 1, "all have the same bits: the test shows nothing"
    total = 0
    for name, (_, linear) in linears.items():
        weight = checkpoint.linears[name]
        expected = QuantizedWeight.from_float(linear.weight, allocation.bits[name])
        assert torch.equal(weight.packed_weight, expected.packed_weight) and torch.equal(weight.scale, expected.scale)
        assert weight.num_bits == allocation.bits[name]
        total += linear.weight.numel()
    spent = 8 * checkpoint.ideal_bytes() / total
    assert 4.5 - 6 * max(linear.weight.numel() for _, linear in linears.values()) * 2 / total < spent <= 4.5
    assert json.loads((rtn / "quantize.json").read_text())["rows"][0]["weight_bits"] == meta["allocation"]


def test_the_table(model, tmp_path, capsys):
    assert run_here(*command(model, tmp_path, *RTN)) == 0
    said = capsys.readouterr().out
    assert "bits per weight, 4.5 at most; rounding them is estimated to cost a KL of " in said
    rows = [line.split() for line in said.splitlines() if line.split() and line.split()[0].isdecimal()]
    checkpoint = LowBitCheckpoint.load(tmp_path)
    for bits, linears, weights, packed in (row for row in rows if len(row) == 4):
        mine = [weight for weight in checkpoint.linears.values() if weight.num_bits == int(bits)]
        assert int(linears) == len(mine)
        assert int(weights.replace(",", "")) == sum(len(w.packed_weight) * w.in_features for w in mine)
        assert int(packed.replace(",", "")) == sum(w.packed_weight.nbytes for w in mine)


def test_both_methods_choose_the_same(rtn, qllm):
    """The estimate is of rounding to nearest; method qllm deploys the same bits, corrected."""
    found = [LowBitCheckpoint.load(folder) for folder in (rtn, qllm)]
    assert found[0].allocation == found[1].allocation
    for name, weight in found[1].linears.items():
        assert weight.num_bits == found[0].linears[name].num_bits
    assert (rtn / "weight_bits.json").read_bytes() == (qllm / "weight_bits.json").read_bytes()
    assert (rtn / "quantization_recipe.yaml").read_bytes() == (qllm / "quantization_recipe.yaml").read_bytes()


@pytest.mark.parametrize("ranks", slow_but(["tp=2"], ["tp=2", "dp=2"]))
def test_two_ranks_write_the_same_files(model, qllm, tmp_path, ranks):
    settings = [*QLLM, "correction.batch_size=2"] if ranks == "dp=2" else QLLM
    expected = qllm
    if ranks == "dp=2":  # of as many windows a step
        expected = tmp_path / "one"
        assert run_here(*command(model, expected, *settings)) == 0
    code, _, stderr = run_there(*COMMAND, *command(model, tmp_path / "two", *settings, ranks))
    assert code == 0, stderr
    assert artifact_files(tmp_path / "two") == artifact_files(expected)


@pytest.mark.parametrize("method", slow_but(["rtn"], ["rtn", "qllm"]))
def test_a_killed_run_continues(method, model, tmp_path, request, capsys):
    """Killed before the third window is written; the windows done are not estimated again."""
    settings = RTN if method == "rtn" else QLLM
    killed_at("replace:weight_bits.json", 3, command(model, tmp_path, *settings))
    assert json.loads((tmp_path / "weight_bits.json").read_text())["windows"] == 2
    assert run_here(*command(model, tmp_path, *settings)) == 0
    assert "continuing after 2 of the 6 windows" in capsys.readouterr().out
    assert artifact_files(tmp_path) == artifact_files(request.getfixturevalue(method))


def test_a_killed_correction_keeps_its_bits(model, qllm, tmp_path, capsys):
    killed_at("replace:state.json", 2, command(model, tmp_path, *QLLM))
    assert run_here(*command(model, tmp_path, *QLLM)) == 0
    assert "continuing after 1 of the block groups" in capsys.readouterr().out
    assert artifact_files(tmp_path) == artifact_files(qllm)


def test_another_budget_needs_no_estimate(model, tmp_path, monkeypatch):
    """Nor do other bits of activations; other text, or a damaged file, does."""
    assert run_here(*command(model, tmp_path, *RTN)) == 0
    first = LowBitCheckpoint.load(tmp_path).allocation

    def refuse(*args):
        raise AssertionError("estimated again")

    with monkeypatch.context() as patch:
        patch.setattr(allocate, "window_costs", refuse)
        assert run_here(*command(model, tmp_path, *RTN, "weights.scheme=autoA4", "weights.budget=3")) == 0
        other = LowBitCheckpoint.load(tmp_path)
        assert other.scheme_name == "autoA4" and other.allocation.kl > first.kl
        for settings in (
            ["calibration.sequence_length=32"],
            ["weights.symmetric=true"],
            ["weights.zero_point=real"],
            ["seed=1"],
        ):
            with pytest.raises(AssertionError, match="estimated again"):
                run_here(*command(model, tmp_path, *RTN, *settings))
    (tmp_path / "weight_bits.json").write_text("{")
    assert run_here(*command(model, tmp_path, *RTN)) == 0
    assert LowBitCheckpoint.load(tmp_path).allocation == first


def test_a_scheme_of_equal_bits_leaves_no_recipe(model, tmp_path):
    assert run_here(*command(model, tmp_path, *RTN)) == 0
    assert (tmp_path / "quantization_recipe.yaml").exists()
    equal = ["quantize", f"model={model}", f"output_dir={tmp_path}", *RTN, "weights.scheme=W4A8"]
    assert run_here(*equal) == 0
    assert json.loads((tmp_path / "lowbit.json").read_text())["format"] == 4
    assert not (tmp_path / "quantization_recipe.yaml").exists()


def test_with_a_quantized_head(model, tmp_path):
    """An artifact of format 6, too, knows by its keys what it holds."""
    assert run_here(*command(model, tmp_path, *RTN, "weights.lm_head_bits=8")) == 0
    assert json.loads((tmp_path / "lowbit.json").read_text())["format"] == 6
    checkpoint = LowBitCheckpoint.load(tmp_path)
    assert checkpoint.head is not None and checkpoint.allocation is not None
    text = ["evaluation.data=stdlib:validation", "evaluation.samples=2", "evaluation.sequence_length=32"]
    assert run_here("evaluate", f"artifact={tmp_path}", f"output_dir={tmp_path / 'out'}", *text) == 0


def test_the_recipe(rtn):
    """One matcher for each layer and role, with the bits of the linears that make it up."""
    found, bits = yaml.safe_load((rtn / "quantization_recipe.yaml").read_text()), LowBitCheckpoint.load(rtn).allocation
    roles = {"linear_qkv": "self_attn.k_proj", "linear_proj": "self_attn.o_proj"}
    roles |= {"linear_fc1": "mlp.up_proj", "linear_fc2": "mlp.down_proj"}
    assert len(found["matchers"]) == 2 * len(roles)
    for layer in range(2):
        for role, leaf in roles.items():
            matcher = found["matchers"][f"layer_{layer}_{role}"]
            assert matcher["config"] == f"W{bits.bits[f'model.layers.{layer}.{leaf}']}A8" and matcher["enabled"] is True
            assert matcher["pattern"].startswith(f"*decoder.layers.{layer}.") and matcher["pattern"].endswith(role)
    assert found["configs"]["W4A8"] == {
        "scheme": "W4A8",
        "symmetric": False,
        "zero_point": "integer",
        "shard_groups": 8,
    }


def test_a_damaged_allocation(rtn, tmp_path):
    """Bits of another linear, a missing one, a scheme that does not go with the format: each is one line."""
    checkpoint = LowBitCheckpoint.load(rtn)
    first = next(iter(checkpoint.linears))
    for bits in (
        {**checkpoint.allocation.bits, "model.layers.9": 4},
        {name: b for name, b in checkpoint.allocation.bits.items() if name != first},
        {**checkpoint.allocation.bits, first: 9},
        {**checkpoint.allocation.bits, first: 2 if checkpoint.allocation.bits[first] != 2 else 3},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        replace(checkpoint, allocation=replace(checkpoint.allocation, bits=bits)).save(folder)
        with pytest.raises(LowBitError, match="write it again"):
            LowBitCheckpoint.load(folder)
    folder = tmp_path / "scheme"
    folder.mkdir()
    replace(checkpoint, allocation=None).save(folder)
    with pytest.raises(LowBitError, match="scheme autoA8 without allocation"):
        LowBitCheckpoint.load(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "weights.budget=1.9", *TEXT], "weights.budget=1.9: input should be greater than or equal to 2"),
        (["quantize", "weights.budget=8.1", *TEXT], "weights.budget=8.1: input should be less than or equal to 8"),
        (["quantize", "weights.scheme=W4A8", *TEXT], "budget=4.5 has no effect with scheme=W4A8"),
        (["quantize", "weights.budget=none", *TEXT], "scheme=autoA8 chooses bits under a budget; set weights.budget"),
        (["quantize"], "weights.scheme=autoA8 chooses bits on text; set calibration.data"),
        (["quantize", *RTN, "engine=deepspeed", "tp=1"], "which engine=deepspeed splits"),
        (["evaluate", "evaluation.data=stdlib:validation"], "make an artifact with quantize, and pass it"),
        (["generate"], "make an artifact with quantize, and pass it"),
        (["evaluate", "--ablation", "evaluation.data=stdlib:validation"], "make an artifact with quantize"),
    ],
)
def test_bad_input(model, tmp_path, capfd, arguments, said):
    auto = ["weights.scheme=autoA8", "weights.budget=4.5"]
    assert run_here(arguments[0], f"model={model}", f"output_dir={tmp_path}", *auto, *arguments[1:]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-lowbit: ")]
    assert said in line


@pytest.mark.parametrize("method", ["rtn", "qllm"])
def test_a_model_that_does_not_fit(method, model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(allocate, "free_memory", lambda: 1000)
    code = run_here(*command(model, tmp_path, *(RTN if method == "rtn" else QLLM)))
    if method == "rtn":  # it holds the model in any case
        assert code == 0
    else:
        assert code == 2 and "holds the whole model in memory to choose bits" in capfd.readouterr().err


def test_a_dry_run_takes_the_budget_for_the_bits(model, tmp_path):
    found = {}
    for name, settings in {
        "auto": ["weights.budget=6"],
        "W6A6": ["weights.scheme=W6A6", "weights.budget=none"],
    }.items():
        assert run_here(*command(model, tmp_path, *settings, "dry_run=true")) == 0
        found[name] = json.loads((tmp_path / "quantize.json").read_text())["rows"][-1]["packed_bytes_per_rank"]
    assert found["auto"] == found["W6A6"]
