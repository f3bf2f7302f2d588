"""What ranks of a RankPool run for test_allocate_ranks.py: a small rounded block, its spectra and the ranks chosen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sharding_cases import group_of, mine
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import CorrectionConfig, WeightsConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.qllm.allocate_ranks import choose_ranks, error_spectra
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import Scheme

HIDDEN, INNER, SHARDS = 16, 32, 8
WINDOWS, LENGTH = 4, 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Return the weights of q and k [INNER, HIDDEN] and o [HIDDEN, INNER]; rows of unequal size, so that errors are."""
    sizes = torch.linspace(0.1, 2, INNER)
    return {
        "q": normal(INNER, HIDDEN, seed=1) * sizes[:, None],
        "k": normal(INNER, HIDDEN, seed=2),
        "o": normal(HIDDEN, INNER, seed=3) * sizes,
    }


def hidden_states() -> tuple[Tensor, Tensor]:
    """[WINDOWS, LENGTH, HIDDEN] with channels of unequal size, and bool [WINDOWS, LENGTH]."""
    mask = torch.ones(WINDOWS, LENGTH, dtype=torch.bool)
    mask[1, 4:] = mask[3, 2:] = False
    return normal(WINDOWS, LENGTH, HIDDEN, seed=4) * torch.linspace(0.2, 3, HIDDEN), mask


class ToyBlock(nn.Module):
    """Put out h + o(q(h) k(h)), the linears in W4A4."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        for name, weight in weights().items():
            kind, dim = ("row", 1) if name == "o" else ("column", 0)
            shards = mine([part.contiguous() for part in weight.chunk(SHARDS, dim)], rank, size)
            linear = ShardedLinear(name, kind, shards, None, group_of(size))  # type: ignore[arg-type]
            linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
            linear.freeze()
            self.add_module(name, linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.o(self.q(hidden) * self.k(hidden))


GROUPS = [InputGroup("column", ("q", "k"), "", None, "o"), InputGroup("row", ("o",), "", None, "o")]


def chosen(rank: int, size: int, parallel: str, budget: int) -> dict[str, Any]:
    """The spectra and ranks of the block, its shards (tp) or its windows (dp) among the ranks."""
    module = ToyBlock(rank, size) if parallel == "tp" else ToyBlock(0, 1)
    call: Any = SimpleNamespace(run=lambda module, hidden: module(hidden))
    group = BlockGroup([Block(0, "block", module, GROUPS, {}, {1: call})])
    values, mask = hidden_states()
    windows = Windows(torch.zeros(mask.shape, dtype=torch.int64), mask)
    dp_group = group_of(size) if parallel == "dp" else None
    share = CalibrationShare(windows, 4, torch.device("cpu"), dp_group, lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        own = values[rank::size] if parallel == "dp" else values
        inputs = HiddenStream(Path(folder) / "inputs", own.shape, torch.float32)  # type: ignore[arg-type]
        inputs.write(0, own)
        section = CorrectionConfig(rank="auto", rank_budget=budget)
        spectra = error_spectra(group, share, inputs)
        return {"spectra": spectra, "ranks": choose_ranks(group, share, inputs, section)}
