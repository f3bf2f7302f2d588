"""Orthogonal rotations of a decoder's activations, folded into its weights: the function stays, outliers are spread out
over all channels before anything is rounded (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

    H                     orthogonal and symmetric, so its own inverse, of nearly any width (kernels/hadamard.py)
    Q = diag(s) H         s: random signs of the residual stream's channels, by the run's seed
    Q, R                  any orthogonal matrices where they are learned (learn_rotation.py); else R = H

    R1  the residual stream, h' = h Q; an RMSNorm commutes with Q once its gain g is in the linears that read it
          embedding            E' = E Q
          column-parallel      W' = W diag(g) Q              norm: g' = 1
          row-parallel         W' = Q^T W,  b' = b Q
          output projection    W' = W diag(g) Q              final norm: g' = 1; no longer tied to the embedding
    R2  V and what O reads, head by head
          v                    W' = R^T W,  b' = b R         of each KV head's outputs
          o                    W' = W R                      of each query head's inputs
    R3  Q and K after RoPE     q' = q H, k' = k H            online, of each head: q' k'^T = q k^T
    R4  the input of an MLP's row-parallel linear
          down                 x' = x H, W' = W H            x' online, of each shard group

R4 mixes the channels of one shard group (layers.linear.activation_groups) alone, so it needs no communication and is
the same at every tensor-parallel size. Scalars that a model multiplies its residual stream with commute with Q.

Weights are turned in float64 and rounded once to the dtype they are in, in pieces whose shapes do not depend on which
rank holds them: shard by shard, and head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.layers.reassembled_norm import rms_gain
from megatron_lowbit.qllm.sharded_linear import Kind, ShardedLinear
from megatron_lowbit.qllm.turns import Hadamard, Turn

_ROWS = 2**14  # of an embedding that are in float64 at once


@dataclass(frozen=True)
class BlockRotation:
    """What of one block is rotated; all names are those of modules within it.

    readers, writers: R1's column-parallel linears, each with the norm it reads, and row-parallel linears. value,
    output: R2's V and O; None: without. head_dim: of V; heads: what its heads are multiplied by. inputs: R4's
    row-parallel linears. owner: of the attention, for R3; None: without.
    """

    readers: Mapping[str, str] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    value: str | None = None
    output: str | None = None
    head_dim: int = 1
    heads: Turn = field(default_factory=Hadamard)
    inputs: tuple[str, ...] = ()
    owner: str | None = None


@dataclass(frozen=True)
class RestRotation:
    """R1 outside the blocks: names of the tensors, and what the final norm adds to its weight (Gemma: 1)."""

    embedding: str
    norm: str
    head: str
    norm_offset: int


@dataclass(frozen=True)
class Unfolded:
    """The linears of a block before they are rotated: {name: weight in pieces}, {name: bias}, and the gains that their
    norms had, {name of the norm: float64 [hidden]}."""

    weights: Mapping[str, list[Tensor]]
    biases: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rotation:
    """What of a model is rotated. residual, rest: R1; None: without. shard_groups: of R4. dtype: of the products."""

    blocks: Sequence[BlockRotation]
    residual: Turn | None
    rest: RestRotation | None
    shard_groups: int
    dtype: torch.dtype = torch.float64

    @torch.no_grad()
    def rotate_block(self, index: int, block: nn.Module, kinds: Mapping[str, tuple[Kind, Any]]) -> None:
        """Rotate block `index` in place, its linears as torch's or as ShardedLinears; what runs online is added to it.

        kinds: {name within the block: (kind, anything)} of its linears.
        """
        self.fold(index, block, kinds, self.unfold(index, block, kinds))

    def unfold(self, index: int, block: nn.Module, kinds: Mapping[str, tuple[Kind, Any]]) -> Unfolded:
        """Take the gains out of a block's norms and add what runs online; `fold` has to follow."""
        about = self.blocks[index]
        linears: dict[str, Any] = {name: block.get_submodule(name) for name in kinds}
        weights = {name: pieces_of(linears[name], kind, self.shard_groups) for name, (kind, _) in kinds.items()}
        biases = {name: linear.bias.detach() for name, linear in linears.items() if linear.bias is not None}
        gains = {name: gain_of(block.get_submodule(name)) for name in set(about.readers.values())}
        for name in gains:
            reset_gain(block.get_submodule(name))
        for name in about.inputs:
            InputRotation(linears[name], len(weights[name]))
        if about.owner is not None:
            attention.set_rotated([block.get_submodule(about.owner)], True)
        return Unfolded(weights, biases, gains)

    def fold(self, index: int, block: nn.Module, kinds: Mapping[str, tuple[Kind, Any]], unfolded: Unfolded) -> None:
        """Give the linears of a block their rotated weights and biases, made from `unfolded`; differentiable in
        matrices that are trained where the linears are ShardedLinears."""
        about = self.blocks[index]
        for name, (kind, _) in kinds.items():
            linear: Any = block.get_submodule(name)
            gain = unfolded.gains.get(about.readers.get(name, ""))
            put_pieces(linear, kind, self._rotated(about, name, unfolded.weights[name], gain))
            if name in unfolded.biases:
                put_bias(linear, self.bias(index, name, unfolded.biases[name]))

    def rotated_inputs(self, index: int) -> set[str]:
        """Return the linears of block `index` whose input is rotated, and the norms that such linears read."""
        about = self.blocks[index]
        names = {*about.inputs, *(() if about.output is None else (about.output,))}
        return names if self.residual is None else {*names, *about.readers, *about.readers.values()}

    def bias(self, index: int, name: str, bias: Tensor) -> Tensor:
        """Return the rotated bias of a linear of block `index`: of whole heads, and whole for a row-parallel linear."""
        about = self.blocks[index]
        if name == about.value:
            return torch.cat(about.heads.turn_each(bias.split(about.head_dim))).to(bias.dtype)
        if name in about.writers and self.residual is not None:
            return self.residual.turn(bias).to(bias.dtype)
        return bias

    def rest_tensor(self, name: str, tensor: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return the rotated tensor `name` outside the blocks, in the dtype of `tensor`.

        gain: the final norm's weight, for the output projection.
        """
        rest = self.rest
        if rest is None or self.residual is None or name not in (rest.embedding, rest.norm, rest.head):
            return tensor
        if name == rest.norm:
            return torch.full_like(tensor, 1 - rest.norm_offset)
        scale = 1.0 if name == rest.embedding or gain is None else gain.double() + rest.norm_offset
        turned = [self.residual.turn(rows.double() * scale).to(tensor.dtype) for rows in tensor.split(_ROWS)]
        return torch.cat(turned)

    def _rotated(self, about: BlockRotation, name: str, pieces: Sequence[Tensor], gain: Tensor | None) -> list[Tensor]:
        """Return the rotated pieces of a weight: [out / G, in] of a column-parallel one, [out, in / G] of another."""
        dtype, turned = pieces[0].dtype, [piece.to(self.dtype) for piece in pieces]
        if name in about.readers and self.residual is not None:
            assert gain is not None
            turned = self.residual.turn_each([piece * gain.to(self.dtype) for piece in turned])
        if name == about.value:
            turned = _by_heads(turned, 0, about)
        if name == about.output:
            turned = _by_heads(turned, 1, about)
        if name in about.inputs:
            turned = [hadamard(piece, 1) for piece in turned]
        if name in about.writers and self.residual is not None:
            turned = [piece.T for piece in self.residual.turn_each([piece.T for piece in turned])]
        return [piece.to(dtype).contiguous() for piece in turned]


class InputRotation:
    """A forward pre-hook of a row-parallel linear: x H of each of this rank's `groups` slices of its input (R4)."""

    def __init__(self, linear: Any, groups: int):
        self.groups = groups
        self._attach(linear)

    @staticmethod
    def of(linear: nn.Module) -> InputRotation | None:
        """Return the rotation of a linear's input; None: it is not rotated."""
        return getattr(linear, "input_rotation", None)

    def undo(self, linear: ShardedLinear) -> None:
        """Have the linear read its input as it is: (x H) (W H)^T = x W^T."""
        self._handle.remove()
        linear.input_rotation = None
        linear.hp_weights = [hadamard(w.double(), 1).to(w.dtype) for w in linear.hp_weights]

    def redo(self, linear: ShardedLinear, weights: list[Tensor]) -> None:
        """Take an `undo` back; weights: what the linear had before it."""
        self._attach(linear)
        linear.hp_weights = weights

    def _attach(self, linear: Any) -> None:
        self._handle = linear.register_forward_pre_hook(self)
        linear.input_rotation = self

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (hadamard(args[0], self.groups),)


def pieces_of(linear: Any, kind: Kind, shard_groups: int) -> list[Tensor]:
    """Return a linear's weight in shards: all of them, or a ShardedLinear's own."""
    if isinstance(linear, ShardedLinear):
        return linear.hp_weights
    dim = 0 if kind == "column" else 1
    return list(linear.weight.data.chunk(activation_groups(linear.weight.shape[dim], shard_groups), dim))


def put_pieces(linear: Any, kind: Kind, pieces: list[Tensor]) -> None:
    """Give a linear the weight that `pieces_of` has cut."""
    if isinstance(linear, ShardedLinear):
        linear.hp_weights = pieces
    else:
        linear.weight.data = torch.cat(pieces, 0 if kind == "column" else 1)


def put_bias(linear: Any, bias: Tensor) -> None:
    """Give a linear another bias."""
    if isinstance(linear, ShardedLinear):
        linear.bias = bias
    else:
        linear.bias.data = bias


def gain_of(norm: nn.Module) -> Tensor:
    """Return what an RMSNorm multiplies with, float64 [hidden]."""
    weight: Any = norm.weight
    return weight.detach().double() + norm_offset(norm)


def reset_gain(norm: nn.Module) -> None:
    """Have an RMSNorm multiply with 1."""
    weight: Any = norm.weight
    weight.data.fill_(1 - norm_offset(norm))


def norm_offset(norm: nn.Module) -> int:
    """Return what an RMSNorm adds to its weight: 0, or 1 (Gemma). Raises ValueError for any other norm."""
    rms, weight = rms_gain(norm), getattr(norm, "weight", None)
    if rms is None or weight is None:
        raise ValueError(f"{type(norm).__name__} is no RMSNorm")
    return round((rms[0] - weight.detach().float()).mean().item())


def _by_heads(pieces: Sequence[Tensor], dim: int, about: BlockRotation) -> list[Tensor]:
    """Turn, head by head, the outputs (dim 0) or inputs (dim 1) of a weight that is cut along them."""
    heads = torch.cat(list(pieces), dim).split(about.head_dim, dim)
    if dim == 0:
        turned = [head.T for head in about.heads.turn_each([head.T for head in heads])]
    else:
        turned = about.heads.turn_each(heads)
    return list(torch.cat(turned, dim).chunk(len(pieces), dim))
