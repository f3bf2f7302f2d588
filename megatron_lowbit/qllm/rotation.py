"""Orthogonal rotations of a decoder's activations, folded into its weights: the function stays, outliers are spread out
over all channels before anything is rounded (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

    H                     orthogonal and symmetric, so its own inverse, of nearly any width (kernels/hadamard.py)
    Q = diag(s) H         s: random signs of the residual stream's channels, by the run's seed

    R1  the residual stream, h' = h Q; an RMSNorm commutes with Q once its gain g is in the linears that read it
          embedding            E' = E Q
          column-parallel      W' = W diag(g) Q              norm: g' = 1
          row-parallel         W' = Q^T W,  b' = b Q
          output projection    W' = W diag(g) Q              final norm: g' = 1; no longer tied to the embedding
    R2  V and what O reads, head by head
          v                    W' = H W,    b' = b H         of each KV head's outputs
          o                    W' = W H                      of each query head's inputs
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

_ROWS = 2**14  # of an embedding that are in float64 at once


class ResidualRotation:
    """Q = diag(signs) H of the residual stream. width: its channels; the signs are those of the seed."""

    def __init__(self, width: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1

    def turn(self, x: Tensor) -> Tensor:
        """Return x Q, float64 [..., width]."""
        return hadamard(x.double() * self.signs.to(x.device), 1)


@dataclass(frozen=True)
class BlockRotation:
    """What of one block is rotated; all names are those of modules within it.

    readers, writers: R1's column-parallel linears, each with the norm it reads, and row-parallel linears. value,
    output: R2's V and O; None: without. head_dim: of V. inputs: R4's row-parallel linears. owner: of the attention, for
    R3; None: without.
    """

    readers: Mapping[str, str] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    value: str | None = None
    output: str | None = None
    head_dim: int = 1
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
class Rotation:
    """What of a model is rotated. residual, rest: R1; None: without. shard_groups: of R4."""

    blocks: Sequence[BlockRotation]
    residual: ResidualRotation | None
    rest: RestRotation | None
    shard_groups: int

    @torch.no_grad()
    def rotate_block(self, index: int, block: nn.Module, kinds: Mapping[str, tuple[Kind, Any]]) -> None:
        """Rotate block `index` in place, its linears as torch's or as ShardedLinears; what runs online is added to it.

        kinds: {name within the block: (kind, anything)} of its linears.
        """
        about = self.blocks[index]
        gains = {name: gain_of(block.get_submodule(name)) for name in set(about.readers.values())}
        for name, (kind, _) in kinds.items():
            linear, gain = block.get_submodule(name), gains.get(about.readers.get(name, ""))
            pieces = self._rotated(about, name, pieces_of(linear, kind, self.shard_groups), gain)
            put_pieces(linear, kind, pieces)
            bias: Any = linear.bias
            if bias is not None:
                bias.data = self.bias(index, name, bias.data)
        for name in gains:
            reset_gain(block.get_submodule(name))
        for name in about.inputs:
            linear = block.get_submodule(name)
            linear.register_forward_pre_hook(InputRotation(len(pieces_of(linear, "row", self.shard_groups))))
        if about.owner is not None:
            attention.set_rotated([block.get_submodule(about.owner)], True)

    def rotated_inputs(self, index: int) -> set[str]:
        """Return the linears of block `index` whose input is rotated, and the norms that such linears read."""
        about = self.blocks[index]
        names = {*about.inputs, *(() if about.output is None else (about.output,))}
        return names if self.residual is None else {*names, *about.readers, *about.readers.values()}

    def bias(self, index: int, name: str, bias: Tensor) -> Tensor:
        """Return the rotated bias of a linear of block `index`: of whole heads, and whole for a row-parallel linear."""
        about = self.blocks[index]
        if name == about.value:
            return hadamard(bias.double(), len(bias) // about.head_dim).to(bias.dtype)
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
        dtype, turned = pieces[0].dtype, [piece.double() for piece in pieces]
        if name in about.readers and self.residual is not None:
            assert gain is not None
            turned = [self.residual.turn(piece * gain) for piece in turned]
        if name == about.value:
            turned = _by_heads(turned, 0, about.head_dim)
        if name == about.output:
            turned = _by_heads(turned, 1, about.head_dim)
        if name in about.inputs:
            turned = [hadamard(piece, 1) for piece in turned]
        if name in about.writers and self.residual is not None:
            turned = [self.residual.turn(piece.T).T for piece in turned]
        return [piece.to(dtype).contiguous() for piece in turned]


class InputRotation:
    """A forward pre-hook of a row-parallel linear: x H of each of this rank's `groups` slices of its input."""

    def __init__(self, groups: int):
        self.groups = groups

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


def _by_heads(pieces: Sequence[Tensor], dim: int, head_dim: int) -> list[Tensor]:
    """Multiply with H, head by head, the outputs (dim 0) or inputs (dim 1) of a weight that is cut along them."""
    heads = torch.cat(list(pieces), dim).split(head_dim, dim)
    turned = [hadamard(head.T, 1).T if dim == 0 else hadamard(head, 1) for head in heads]
    return list(torch.cat(turned, dim).chunk(len(pieces), dim))
