"""Learned rotations: orthogonal, below the loss of Hadamard's, and the same bits on any number of ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import family_models
import pytest
import tiny_models
import torch
import transformers
from commands import CALIBRATION_TEXT, run_here
from quantize_runs import checksums, quantize
from slow_cases import slow_but
from tiny_models import two_blocks
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError, QuantizeConfig, WeightsConfig
from megatron_lowbit.qllm import pipeline
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.orthogonal import OrthogonalMatrix
from megatron_lowbit.qllm.rotation import Rotation
from megatron_lowbit.qllm.turns import Trained

WIDTH = 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(width: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def distance(q: Tensor) -> float:
    """The largest entry of Q^T Q - I."""
    return (q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max().item()


# Steps on orthogonal matrices


def test_a_step_is_the_cayley_transform():
    """Against a linear solve. |S| is some 0.03 here, and four iterations leave |S| (|S| / 2)^4 = 2e-9 of it."""
    q, gradient, angle, eye = orthogonal(WIDTH), normal(WIDTH, WIDTH, seed=1), 0.01, torch.eye(WIDTH).double()
    a = gradient @ q.T - q @ gradient.T
    s = a / a.norm() * angle * math.sqrt(WIDTH)
    expected = torch.linalg.solve(eye + s / 2, eye - s / 2) @ q
    matrix = OrthogonalMatrix(q)
    matrix.step(gradient, angle)
    torch.testing.assert_close(matrix.value, expected, rtol=0, atol=2e-9)


def test_the_angle_is_that_of_the_step():
    """The root mean square of the angles of Q' Q^T's eigenvalues; the transform turns by 2 atan(s / 2), 1 % less."""
    q = orthogonal(WIDTH)
    matrix = OrthogonalMatrix(q)
    matrix.step(normal(WIDTH, WIDTH, seed=1), 0.1)
    angles = torch.linalg.eigvals(matrix.value @ q.T).angle()
    assert angles.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("rank", [1, WIDTH])
def test_it_stays_orthogonal(rank):
    """Steps as large as they may be, of gradients of full rank and of one that turns one plane alone."""
    matrix = OrthogonalMatrix(orthogonal(WIDTH))
    for seed in range(100):
        matrix.step(1e6 * normal(WIDTH, rank, seed=seed) @ normal(rank, WIDTH, seed=seed + 1000), 0.5)
    assert distance(matrix.value) < 1e-12


def test_no_gradient_is_no_step():
    q = orthogonal(WIDTH)
    matrix = OrthogonalMatrix(q)
    matrix.step(torch.zeros(WIDTH, WIDTH), 0.1)
    assert torch.equal(matrix.value, q)


def test_it_finds_a_matrix():
    """min |Q - T|^2, with an angle that falls to 0: what is left is of the size of the last steps."""
    s = normal(WIDTH, WIDTH, seed=3) * 0.05
    eye = torch.eye(WIDTH).double()
    q = orthogonal(WIDTH)
    target = torch.linalg.solve(eye + (s - s.T), eye - (s - s.T)) @ q
    matrix = OrthogonalMatrix(q)
    before = (matrix.value - target).norm()
    for step in range(200):
        matrix.step(matrix.value - target, 0.02 * (1 - step / 200))
    assert (matrix.value - target).norm() < 0.02 * before


# Gradients


@pytest.mark.parametrize("architecture", ["llama", "llama with biases", "qwen2"])
def test_nothing_is_gained_without_rounding(architecture, tmp_path):
    """The loss is then the same for all orthogonal Q and R, whatever the target: every path of the gradient cancels,
    through weights, biases, heads, input and target. Float32 leaves some 1e-6 of it; a path that lacks, all of it."""
    folder = tiny_models.save_model(architecture, tmp_path)
    config = QuantizeConfig(weights=WeightsConfig(scheme="W4A4", rotation="learned", shard_groups=8))
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    source = BlockSource(folder, hf_config, config, torch.float32, torch.device("cpu"), None)
    ids = tiny_models.token_ids(1, 16)
    source.trace(ids)
    source.rotate(ids, 4)
    assert source.rotator is not None
    hidden, calls = source.embed(ids)
    rotation, block, kinds = source.rotator.rotation, source.load(0), source.kinds[0]
    unfolded = rotation.unfold(0, block, kinds)
    q, r = (nn.Parameter(orthogonal(width, seed=width).float()) for width in (64, rotation.blocks[0].head_dim))
    about = replace(rotation.blocks[0], heads=Trained(r, None))
    Rotation([about], Trained(q, None), None, 8, torch.float32).fold(0, block, kinds, unfolded)
    target = hidden + 0.1 * normal(*hidden.shape, seed=5).float()
    loss = (calls[0].run(block, hidden @ q) - target @ q).square().mean()
    for matrix, gradient in zip((q, r), torch.autograd.grad(loss, [q, r]), strict=True):
        step = gradient @ matrix.T
        assert gradient.norm() > 0 and (step - step.T).norm() < 1e-4 * gradient.norm()


# The pass

SETTINGS = [
    *("weights.scheme=W4A4", "weights.rotation=learned", f"calibration.data={CALIBRATION_TEXT}"),
    *("calibration.samples=4", "calibration.sequence_length=64", "correction.mode=none", "reassembly.mode=none"),
    *("comm.tp_sizes=[2]", "rotation.batch_size=2", "rotation.epochs=1"),
]


def losses(folder: Path) -> dict[int, list[float]]:
    """{epoch: loss of every block}"""
    found: dict[int, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "rotation_loss" in record:
            found.setdefault(record["epoch"], []).append(record["rotation_loss"])
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return quantize(tmp_path_factory.mktemp("whole"), f"model={two_blocks()}", *SETTINGS)


def test_the_loss_falls(tmp_path):
    """On the same windows, epoch after epoch; a fixed matrix would have the same loss in all."""
    more = ["rotation.epochs=3", "rotation.batch_size=1", "rotation.learning_rate=0.02"]
    found = losses(quantize(tmp_path, f"model={two_blocks()}", *SETTINGS, *more))
    sums = [sum(found[epoch]) for epoch in range(3)]
    assert sums[2] < 0.97 * sums[0], sums


def test_the_artifact_says_that_it_is_learned(whole):
    assert json.loads((whole / "lowbit.json").read_text())["rotation"]["kind"] == "learned"
    assert not (whole / "resume").exists()


@pytest.mark.slow
def test_clipping_and_gptq_come_after_it(whole, tmp_path):
    """The pass rounds to nearest in whole ranges, whose gradients it knows."""
    after = ["weights.clipping=mse", "weights.rounding=gptq"]
    assert losses(quantize(tmp_path, f"model={two_blocks()}", *SETTINGS, *after)) == losses(whole)


def test_it_is_learned_at_the_bits_of_each_linear(tmp_path):
    found = losses(quantize(tmp_path, f"model={two_blocks()}", *SETTINGS, "weights.scheme=autoA4", "weights.budget=4"))
    assert found and all(math.isfinite(loss) for epoch in found.values() for loss in epoch)


@pytest.mark.parametrize("ranks", ["tp=2", "dp=2"])
def test_ranks_write_the_same_files(ranks, whole, tmp_path):
    assert checksums(quantize(tmp_path, f"model={two_blocks()}", *SETTINGS, ranks)) == checksums(whole)


@pytest.mark.slow
def test_ranks_that_share_biases_write_the_same_files(tmp_path):
    """Biases of V are turned by the heads' matrix; four KV heads, two on each rank."""
    model = tiny_models.save_model("qwen2", tmp_path / "model")
    one = quantize(tmp_path / "one", f"model={model}", *SETTINGS)
    assert checksums(quantize(tmp_path / "many", f"model={model}", *SETTINGS, "tp=2")) == checksums(one)


KILLED_AT = ["in the pass", "before the first group", "before the second group"]


@pytest.mark.parametrize("killed_at", slow_but(["before the second group"], KILLED_AT))
def test_a_killed_run_continues_to_the_same_files(killed_at, whole, tmp_path, monkeypatch, capsys):
    """What is learned is kept; a pass that is not at its end begins anew."""
    settings, calls = [f"model={two_blocks()}", *SETTINGS, "correction.blocks_per_group=1"], []
    whole = quantize(tmp_path / "whole", *settings)
    last = {"in the pass": 0, "before the first group": 1, "before the second group": 2}[killed_at]

    def dying(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) == max(last, 1):
                raise LowBitError("killed")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if last == 0:
            patch.setattr("megatron_lowbit.qllm.learn_rotation.RotationLearner._train_block", dying(None))
        else:
            patch.setattr(pipeline, "load_group", dying(pipeline.load_group))
        assert run_here("quantize", *settings, f"output_dir={tmp_path / 'killed'}") == 2
    if last:

        def again(*args):
            raise AssertionError("it was learned already")

        monkeypatch.setattr(pipeline, "learn_rotation", again)
    assert checksums(quantize(tmp_path / "killed", *settings)) == checksums(whole)


def test_a_damaged_matrix_is_one_line(tmp_path, monkeypatch, capsys):
    def killed(*args):
        raise LowBitError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_group", killed)
        assert run_here("quantize", f"model={two_blocks()}", *SETTINGS, f"output_dir={tmp_path}") == 2
    path = tmp_path / "resume" / "rotation.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert run_here("quantize", f"model={two_blocks()}", *SETTINGS, f"output_dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert "rotation.safetensors" in message and "to start the run over" in message
    assert len(message.strip().splitlines()) == 1


def test_what_has_nothing_to_learn_is_rotated_all_the_same(tmp_path, capsys):
    """GPT-NeoX: LayerNorms forbid R1, and Q, K and V are one linear; R3 and R4 are no matrices to learn."""
    model = family_models.save("gpt_neox", tmp_path / "model")
    folder = quantize(tmp_path / "artifact", f"model={model}", *SETTINGS, "calibration.samples=2", "comm.tp_sizes=[]")
    about = json.loads((folder / "lowbit.json").read_text())["rotation"]
    assert (about["kind"], about["residual"], about["attention"]) == ("hadamard", False, True) and about["inputs"]
    assert "there is nothing to learn" in capsys.readouterr().out


REFUSED = {
    "needs weights.method=qllm": ["weights.rotation=learned", "weights.method=rtn"],
    "set weights.rotation=learned": ["weights.rotation=hadamard", "rotation.epochs=3"],
    "rotation.batch_size=3 does not divide among dp=2": [
        *("weights.rotation=learned", "rotation.batch_size=3", "dp=2", "correction.mode=none")
    ],
    "rotation has no effect with weights.method=rtn": [
        *("weights.rotation=learned", "rotation.epochs=3", "weights.method=rtn")
    ],
}


@pytest.mark.parametrize("why", REFUSED)
def test_it_is_refused_in_one_line(why, tmp_path, capfd):
    settings = ["model=embedded", "weights.scheme=W4A4", f"calibration.data={CALIBRATION_TEXT}"]
    settings += ["calibration.samples=4", "calibration.sequence_length=64"]
    assert run_here("quantize", *settings, *REFUSED[why], f"output_dir={tmp_path}") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-lowbit:")]
    assert len(lines) == 1 and why in lines[0]  # a rank writes it in a process of its own, beside other code's warnings
