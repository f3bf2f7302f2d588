"""Orthogonal matrices that rows are multiplied by: Hadamard's, dense ones, and those that are being trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.qllm.shard_groups import replicate


class Turn(ABC):
    """Multiply rows by an orthogonal matrix Q [width, width]."""

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """Return x Q, [..., width]; float64 unless Q is being trained."""

    def turn_each(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return x Q of every x: the shards, or the heads, of a weight that this rank holds."""
        return [self.turn(piece) for piece in pieces]


class Hadamard(Turn):
    """Q = H, of any width (kernels/hadamard.py)."""

    def turn(self, x: Tensor) -> Tensor:
        return hadamard(x.double(), 1)


class ResidualRotation(Turn):
    """Q = diag(signs) H of the residual stream. width: its channels; the signs are those of the seed."""

    def __init__(self, width: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1

    def turn(self, x: Tensor) -> Tensor:
        return hadamard(x.double() * self.signs.to(x.device), 1)


class Dense(Turn):
    """Q = matrix, float64 [width, width]."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix.double()

    def turn(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix.to(x.device)


class Trained(Turn):
    """Q = matrix, float32 [width, width], which takes a gradient; for one forward and backward.

    What shards or heads add to the gradient is summed in their order over the ranks of tp_group, so it has the same
    bits at every tensor-parallel size.
    """

    def __init__(self, matrix: Tensor, tp_group: dist.ProcessGroup | None):
        self.matrix, self.tp_group = matrix, tp_group
        self._copies: dict[int, tuple[Tensor, ...]] = {}  # shared by all weights of as many pieces: one sum for all

    def turn(self, x: Tensor) -> Tensor:
        return x.float() @ self.matrix

    def turn_each(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        count = len(pieces)
        if count not in self._copies:
            self._copies[count] = replicate(self.matrix, count, self.tp_group)
        return [piece.float() @ matrix for piece, matrix in zip(pieces, self._copies[count], strict=True)]
