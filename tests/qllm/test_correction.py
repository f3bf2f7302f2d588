"""The correction of a group of blocks: what is trained on, which epoch is kept, and the optimizer's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lowbit.config import QuantizeConfig, WeightsConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare, held_out_windows
from megatron_lowbit.qllm.correct_group import CorrectionResult, correct_group
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.low_rank import Batches, ParameterGroup, train
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import Scheme

WIDTH, LENGTH, WINDOWS = 16, 6, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        *((32, 1 / 8, 4), (128, 1 / 8, 16), (9, 1 / 8, 1), (32, 0.0, 0)),
        *((4, 1 / 8, 1), (2, 1 / 8, 1)),  # at least one
        *((1, 1 / 8, 0), (1, 0.9, 0)),  # and one to train on
        *((2, 0.99, 1), (100, 0.999, 99)),
    ],
)
def test_held_out_windows(count, share, expected):
    assert held_out_windows(count, share) == expected


class Toy:
    """One linear as a group of one block, in W4A16; `noise` is what the targets hold beside what it put out."""

    def __init__(self, folder: Path, noise: float, held_out_target: float = 0.0):
        folder.mkdir()
        weight = normal(WIDTH, WIDTH, seed=1)
        self.linear = ShardedLinear("some_proj", "column", [weight.clone()], None, None)
        self.linear.quantize(Scheme(4, 16), WeightsConfig(scheme="W4A16"))
        self.linear.freeze()
        call: Any = SimpleNamespace(run=lambda module, hidden: module(hidden))
        self.group = BlockGroup([Block(0, "block", nn.Sequential(self.linear), [], {}, {1: call})])
        mask = torch.ones(WINDOWS, LENGTH, dtype=torch.bool)
        mask[:, -1] = False
        windows = Windows(torch.zeros(WINDOWS, LENGTH, dtype=torch.int64), mask)
        self.share = CalibrationShare(windows, 4, torch.device("cpu"), None, lambda: None)
        self.x = normal(WINDOWS, LENGTH, WIDTH, seed=2)
        self.y = self.x @ weight.T + noise * normal(WINDOWS, LENGTH, WIDTH, seed=3)
        self.y[-1] += held_out_target
        self.y[:, -1] = math.inf  # no token is there
        self.streams = []
        for name, values in (("inputs", self.x), ("target", self.y)):
            stream = HiddenStream(folder / name, (WINDOWS, LENGTH, WIDTH), torch.float32)
            stream.write(0, values)
            self.streams.append(stream)
        self.factors: list[list[Tensor]] = []  # after every epoch

    def correct(self, **correction: Any) -> CorrectionResult:
        config = QuantizeConfig(model="some", correction=correction)
        result, _ = correct_group(self.group, self.share, *self.streams, config, torch.float32, self._log)
        return result

    def _log(self, **values: Any) -> None:
        self.factors.append(self.now())

    def now(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.linear.parameters()]

    def loss(self, first: int, stop: int) -> float:
        """In float64, of the windows first, ..., stop - 1 and the weight that would be packed."""
        weight = self.linear.packed().dequantize().double()
        error = (self.x.double() @ weight.T - self.y.double())[first:stop, :-1]
        return error.square().mean().item()


def test_the_epoch_of_the_smallest_held_out_loss_is_kept(tmp_path):
    """Targets with noise: after some epochs only the loss of the training windows still falls."""
    toy = Toy(tmp_path / "toy", 0.5)
    before = toy.loss(7, 8)
    result = toy.correct(epochs=12, learning_rate=0.02, rank=8)
    losses, held_out = result.losses, result.held_out_losses
    best = held_out.index(min(held_out))
    assert len(losses) == len(held_out) == 12
    assert 0 < best < 11 and result.kept_epoch == best and min(losses[best + 1 :]) < losses[best]
    assert result.loss_after == held_out[best] < result.loss_before
    assert all(map(torch.equal, toy.now(), toy.factors[best]))
    assert not all(map(torch.equal, toy.now(), toy.factors[-1]))
    # Sums of 80 squares of float32 products of 16 terms: within a few hundred roundings of 2^-24.
    assert result.loss_before == pytest.approx(before, rel=1e-5)
    assert result.loss_after == pytest.approx(toy.loss(7, 8), rel=1e-5)


def test_without_held_out_windows_the_last_epoch_is_kept(tmp_path):
    toy = Toy(tmp_path / "toy", 0.5)
    result = toy.correct(epochs=12, learning_rate=0.02, rank=8, holdout=0)
    assert result.held_out_losses == [] and result.kept_epoch == 11
    assert all(map(torch.equal, toy.now(), toy.factors[-1]))
    assert result.loss_after == pytest.approx(toy.loss(0, 8), rel=1e-5)


def test_held_out_windows_are_not_trained_on(tmp_path):
    """Another target of theirs: the same training, another judgement. Of a trained one, another training."""
    plain = Toy(tmp_path / "plain", 0.1).correct(epochs=2)
    moved = Toy(tmp_path / "moved", 0.1, held_out_target=1.0).correct(epochs=2)
    assert moved.losses == plain.losses and moved.held_out_losses != plain.held_out_losses
    trained = [Toy(tmp_path / f"trained{t}", 0.1, held_out_target=t).correct(epochs=2, holdout=0) for t in (0.0, 1.0)]
    assert trained[0].losses != trained[1].losses


def test_what_does_not_lower_the_held_out_loss_is_dropped(tmp_path):
    toy = Toy(tmp_path / "toy", 0.1)
    packed = toy.linear.packed()
    result = toy.correct(epochs=3, learning_rate=5.0)
    assert result.loss_before is not None and result.loss_after == min(result.held_out_losses) > result.loss_before
    assert result.kept_epoch is None and toy.linear.lora_shared is None
    assert torch.equal(toy.linear.packed().packed_weight, packed.packed_weight)


def test_the_optimizer_is_adamw():
    """Two groups with a learning rate and a decay each, both falling linearly, against AdamW written down in float64
    (arXiv 1711.05101, algorithm 2)."""
    targets = [normal(3, seed=seed).double() for seed in range(4)]
    start = [normal(3, seed=5).double(), normal(3, seed=6).double()]
    settings = [(0.1, 0.5), (0.02, 0.0)]
    groups = [
        ParameterGroup([nn.Parameter(value.float())], rate, decay)
        for value, (rate, decay) in zip(start, settings, strict=True)
    ]
    order: list[int] = []

    def read(number: int):
        order.append(number)
        a, b = (group.parameters[0] for group in groups)
        yield (a * b).view(1, 1, 3), targets[number].float().view(1, 1, 3), torch.ones(1, 1, dtype=torch.bool), 3

    train(groups, Batches(read, 4, 1), 3, 7, None, lambda epoch, loss: None)
    assert len(order) == 12 and order[:4] != order[4:8] and set(order[:4]) == set(range(4))
    values, moments = [value.clone() for value in start], [[torch.zeros(3).double()] * 2 for _ in start]
    for done, number in enumerate(order):
        a, b = values
        error = 2 * (a * b - targets[number]) / 3
        for which, (grad, (rate, decay)) in enumerate(zip((error * b, error * a), settings, strict=True)):
            step, rate = done + 1, rate * (1 - done / 12)
            first, second = moments[which]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            moments[which] = [first, second]
            decayed = values[which] * (1 - rate * decay)
            values[which] = decayed - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    # Twelve steps, each of some ten float32 roundings of values near 1.
    for group, value in zip(groups, values, strict=True):
        torch.testing.assert_close(group.parameters[0].detach().double(), value, rtol=0, atol=12 * 10 * 2.0**-24 * 4)
