"""weights.clipping and weights.rounding of whole runs: the same bits on any ranks and after a kill; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import CALIBRATION_TEXT, COMMAND, run_here, run_there
from slow_cases import slow
from tiny_models import save_model
from unfinished_runs import artifact_files, done, killed_at, quantize, renamed

from megatron_lowbit.qllm.clip_inputs import RATIOS
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import as_clip

LEARNED = ["weights.clipping=learned", "weights.rounding=gptq", "correction.batch_size=2"]
UNTRAINED = ["weights.clipping=mse", "weights.rounding=gptq", "weights.zero_point=real", "correction.mode=none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def quantized(model: Path, folder: Path, *settings: str) -> Path:
    assert run_here(*quantize(model, folder, *settings)) == 0
    return folder


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory) -> Path:
    """The artifact of one process that nobody interrupted."""
    return quantized(model, tmp_path_factory.mktemp("learned"), *LEARNED)


@pytest.fixture(scope="module")
def untrained(model, tmp_path_factory) -> Path:
    return quantized(model, tmp_path_factory.mktemp("untrained"), *UNTRAINED)


def tensors_and_clipping(folder: Path) -> tuple[dict[str, str], dict]:
    """The artifact's files by their names without the settings' digest, and what lowbit.json says of sites."""
    files = {renamed(name): value for name, value in artifact_files(folder).items() if name != "lowbit.json"}
    meta = json.loads((folder / "lowbit.json").read_text())
    return files, {key: meta.get(key) for key in ("format", "clipping", "reassembly")}


def has_real_zero_points(checkpoint: LowBitCheckpoint) -> bool:
    return all((weight.zero_point != weight.zero_point.round()).any() for weight in checkpoint.linears.values())


def test_what_is_stored(learned, untrained):
    """Trained ratios of every site that is quantized, none of them 1; without training one of a few for the inputs of
    linears."""
    checkpoint = LowBitCheckpoint.load(learned)
    assert tensors_and_clipping(learned)[1]["format"] == 6
    assert has_real_zero_points(LowBitCheckpoint.load(untrained)) and not has_real_zero_points(checkpoint)
    heads = {f"model.layers.{layer}.self_attn:{name}" for layer in range(2) for name in "qkv"}
    assert set(checkpoint.clipping) == {*checkpoint.linears, *heads}
    assert len(set(checkpoint.clipping.values())) == 2 * (4 + 3), "linears of one input share its ratios"
    assert all(0.5 < ratio < 1 for clip in checkpoint.clipping.values() for ratio in clip)
    searched = LowBitCheckpoint.load(untrained)
    assert set(searched.clipping) < set(searched.linears), "nothing, or everything, was clipped"
    assert {clip for clip in searched.clipping.values()} <= {as_clip(ratio, ratio) for ratio in RATIOS[1:]}


def test_what_does_not_help_is_dropped(model, tmp_path):
    """Steps that are far too large lower no loss: the artifact is that of no training, and nothing is clipped."""
    wild = ["weights.clipping=learned", "correction.learning_rate=5", "correction.clipping_rate=5"]
    dropped = LowBitCheckpoint.load(quantized(model, tmp_path / "dropped", *wild))
    plain = LowBitCheckpoint.load(quantized(model, tmp_path / "plain", "correction.mode=none"))
    assert not dropped.clipping and not dropped.low_rank
    for name, weight in plain.linears.items():
        assert torch.equal(dropped.linears[name].packed_weight, weight.packed_weight), name


@pytest.mark.parametrize("ranks", [slow((2, 1)), slow((1, 2)), (2, 2)], ids=str)
@pytest.mark.parametrize("how", ["learned", slow("untrained")])
def test_ranks_write_the_same_files(how, ranks, model, request, tmp_path):
    tp, dp = ranks
    settings = LEARNED if how == "learned" else UNTRAINED
    code, _, stderr = run_there(*COMMAND, *quantize(model, tmp_path, *settings, f"tp={tp}", f"dp={dp}"), timeout=600)
    assert code == 0, stderr
    assert tensors_and_clipping(tmp_path) == tensors_and_clipping(request.getfixturevalue(how))


@pytest.mark.parametrize("how", ["learned", "untrained"])
def test_killed_and_run_again(how, model, request, tmp_path):
    command = quantize(model, tmp_path, *(LEARNED if how == "learned" else UNTRAINED))
    killed_at("replace:state.json", 2, command)
    assert done(tmp_path) == 1
    assert run_here(*command) == 0
    assert artifact_files(tmp_path) == artifact_files(request.getfixturevalue(how))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["weights.clipping=learned", "correction.mode=none"], "set correction.mode=merged, or weights.clipping=mse"),
        (["weights.clipping=learned", "correction.mode=branch"], "is trained with a merged correction"),
        (["weights.clipping=learned", "weights.method=rtn"], "weights.clipping=learned needs calibration text"),
        (["weights.rounding=gptq", "weights.method=rtn"], "weights.rounding=gptq needs calibration text"),
        (["weights.clipping=some"], "weights.clipping"),
        (["correction.clipping_rate=0"], "correction.clipping_rate"),
    ],
)
def test_what_is_refused(settings, said, model, tmp_path, capsys):
    command = [
        "quantize",
        f"model={model}",
        f"calibration.data={CALIBRATION_TEXT}",
        f"output_dir={tmp_path}",
        *settings,
    ]
    assert run_here(*command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-lowbit: ")]
    assert said in line
