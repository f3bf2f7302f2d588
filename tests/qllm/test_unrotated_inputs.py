"""An MLP's input stays as it is where reassembly alone, or nothing, has the smaller error of the block's output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import deepspeed_cases
import megatron_cases
import pytest
import tiny_models
import torch
import transformers
from closeness import assert_equal_but_for_flips
from commands import needs_deepspeed, needs_megatron, run_here
from quantize_runs import checksums, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_lowbit
from megatron_lowbit import embedded
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.kernels import hadamard_matrix
from megatron_lowbit.launch.engines.prepare import round_weights
from megatron_lowbit.qllm import pipeline, rotate_model
from megatron_lowbit.qllm.choose_rotation import Rotator
from megatron_lowbit.qllm.rotation import InputRotation
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

SETTINGS = [
    *("weights.scheme=W4A4", "weights.method=qllm", "weights.rotation=hadamard", "reassembly.mode=adaptive"),
    *("correction.mode=none", "correction.blocks_per_group=1", "calibration.data=stdlib:calibration"),
    *("calibration.samples=4", "calibration.sequence_length=64", "comm.tp_sizes=[]", "reassembly.expansions=[0.1]"),
]
VOCAB = 130
PLAIN, INJECTED = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The first two blocks of the embedded model, with one outlier channel within the second's MLP; same function."""
    folder = tmp_path_factory.mktemp("model")
    for path in Path(embedded.__file__).parent.glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(Path(embedded.__file__).parent / "model.safetensors")
    others = tuple(f"model.layers.{index}." for index in range(2, config["num_hidden_layers"]))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}
    tensors["model.layers.1.mlp.up_proj.weight"][100] *= 64
    tensors[f"{INJECTED}.weight"][:, 100] /= 64
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory) -> Path:
    return quantize(tmp_path_factory.mktemp("artifact"), f"model={model}", *SETTINGS)


def test_an_outlier_channel_is_split_and_the_rest_is_rotated(artifact):
    groups = json.loads((artifact / "quantize.json").read_text())["rows"][0]["groups"]
    told = {name: about for group in groups for name, about in group["layers"].items()}
    assert (told[PLAIN]["chosen"], told[INJECTED]["chosen"]) == ("rotate", "reassemble")
    assert told[INJECTED]["without_rotation"] < 0.5 and told[PLAIN]["without_rotation"] > 1
    assert [group["unrotated"] for group in groups] == [[], [INJECTED]]
    assert json.loads((artifact / "lowbit.json").read_text())["rotation"]["inputs"] == [PLAIN]
    plans = LowBitCheckpoint.load(artifact).reassembly
    assert INJECTED in plans and PLAIN not in plans


def test_only_what_is_rotated_by_weights_is_rotated_when_it_runs(model, artifact):
    """The artifact computes nearly what the model does; with one rotation too many or too few, it does not."""
    host = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    before, checkpoint, errors = tiny_models.logits(host), LowBitCheckpoint.load(artifact), []
    assert checkpoint.rotation is not None
    for inputs in ({PLAIN}, {PLAIN, INJECTED}, set()):
        rotation = replace(checkpoint.rotation, inputs=frozenset(inputs))
        megatron_lowbit.apply_to_huggingface(host, Artifact(replace(checkpoint, rotation=rotation)))
        errors.append((tiny_models.logits(host) - before).norm())
        megatron_lowbit.remove(host)
    assert errors[0] < 0.5 * min(errors[1:]), errors


@pytest.fixture
def mixed(monkeypatch) -> Artifact:
    """A tiny Llama of two blocks, of which the second alone has its MLP's input rotated."""

    class LeavesTheFirst(Rotator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.leave({PLAIN})

    monkeypatch.setattr(rotate_model, "Rotator", LeavesTheFirst)
    config = WeightsConfig(scheme="W4A4", attention=True, rotation="hadamard")
    checkpoint = round_weights(tiny_models.build("llama", vocab_size=VOCAB), config, None, seed=2)
    assert checkpoint.rotation is not None and checkpoint.rotation.inputs == {INJECTED}
    return Artifact(checkpoint)


def on_hugging_face(artifact: Artifact, ids: Tensor | None = None) -> Tensor:
    host = tiny_models.build("llama", vocab_size=VOCAB)
    return tiny_models.logits(megatron_lowbit.apply_to_huggingface(host, artifact, 2), ids)


@needs_deepspeed
def test_deepspeed_computes_what_hugging_face_does(mixed, two_ranks, tmp_path):
    folder = tiny_models.save_artifact(mixed, tmp_path)
    for there in two_ranks.run(deepspeed_cases.rotated, folder, "llama", {"vocab_size": VOCAB}):
        # The ranks' sums of the output projection alone are added in another order.
        torch.testing.assert_close(there["logits"], on_hugging_face(mixed), rtol=1e-4, atol=1e-4)


@needs_megatron
def test_megatron_computes_what_hugging_face_does(mixed, two_ranks):
    expected = on_hugging_face(mixed, megatron_cases.token_ids())[..., : tiny_models.VOCAB]
    changes = {"vocab_size": VOCAB}
    for rank in two_ranks.run(megatron_cases.applied, "llama", True, {"mixed": (mixed, None)}, changes):
        assert_equal_but_for_flips(rank["mixed"], expected, windows=1 / 4, flip=0.5)


@pytest.mark.parametrize("ranks", ["tp=2", "dp=2"])
def test_ranks_write_the_same_files(ranks, model, artifact, tmp_path):
    many = quantize(tmp_path, f"model={model}", *SETTINGS, ranks)
    assert checksums(many) == checksums(artifact)
    assert _rotation(many) == _rotation(artifact)


def test_a_killed_run_keeps_the_choice(model, artifact, tmp_path, monkeypatch):
    """All blocks are done when it is killed, before the artifact is written."""

    def killed(*args):
        raise LowBitError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.BlockwiseQuantizer, "_finish", killed)
        assert run_here("quantize", f"model={model}", *SETTINGS, f"output_dir={tmp_path}") == 2
    resumed = quantize(tmp_path, f"model={model}", *SETTINGS)
    assert checksums(resumed) == checksums(artifact)
    assert _rotation(resumed) == _rotation(artifact)


def test_a_rotation_is_undone_and_redone():
    """Against dense matrices: 2 shards of 12 inputs. Weights are rounded once more, to 2^-24 of their size."""
    weights = list(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).chunk(2, 1))
    linear = ShardedLinear("down", "row", weights, None, None)
    rotation, h = InputRotation(linear, 2), hadamard_matrix(12).float()
    rotated = [w @ h for w in weights]
    linear.hp_weights = rotated
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    before = linear(x)
    rotation.undo(linear)
    assert InputRotation.of(linear) is None
    for now, was in zip(linear.hp_weights, weights, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-6)
    torch.testing.assert_close(linear(x), before, rtol=1e-5, atol=1e-5)
    rotation.redo(linear, rotated)
    assert InputRotation.of(linear) is rotation and torch.equal(linear(x), before)


def _rotation(folder: Path) -> dict:
    return json.loads((folder / "lowbit.json").read_text())["rotation"]
