"""Find out which rotations a model allows: candidates by structure, each proved by running it.

    R1   every column-parallel linear reads an RMSNorm that nothing else reads; F'(h Q) = F(h) Q for the first block,
         and the like for what comes before and after the blocks
    R2   a linear as wide as all KV heads whose heads can be turned together with those that O reads: F'(h) = F(h)
    R3   attention that goes through transformers' interface, where Q and K are quantized
    R4   every row-parallel linear but the attention's; those whose input is better reassembled are left out later
         (round_blocks.py)

A wrong fold differs by as much as the block itself does, a right one by rounding; so names of models play no part. What
a model does not allow is left out, with one line that says why. Every other block is proved when it is rotated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from megatron_lowbit.adapters import readers, rotated
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup, Kind
from megatron_lowbit.adapters.huggingface.experts import looped_experts
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import hadamard_obstacle
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.qllm.rotation import BlockRotation, RestRotation, Rotation, norm_offset
from megatron_lowbit.qllm.trace_blocks import BlockCall
from megatron_lowbit.qllm.turns import Dense, ResidualRotation, Turn
from megatron_lowbit.quant.online_rotation import OnlineRotation, RotationKind
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.say import say

# Relative to what a block adds to its input, or to the logits. Blocks compute in float64 with weights of float32 here,
# what surrounds them in float32, norms in float32 everywhere: rounding makes some 1e-6 of it.
TOLERANCE = 1e-3


class Host(Protocol):
    """A model whose blocks are loaded one by one: a BlockSource, or a model in memory."""

    model: Any
    text_config: Any
    groups: list[list[InputGroup]]
    kinds: list[dict[str, tuple[Kind, nn.Linear]]]

    def fqn(self, index: int, name: str) -> str: ...
    def load(self, index: int) -> nn.Module: ...
    def embed(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]: ...
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor: ...
    def rotate_rest(self, rotation: Rotation | None, exact: bool = False) -> None: ...


class Rotator:
    """Rotate a model's blocks, and prove each.

    host: the model; ids: int64 [1, tokens], what it is proved on; attention_bits: of Q and K. Raises LowBitError where
    nothing can be rotated. Collective calls over the host's tensor-parallel group.
    """

    def __init__(self, host: Host, ids: Tensor, seed: int, shard_groups: int, attention_bits: int):
        self.host, self.shard_groups, self._ids = host, shard_groups, ids
        self.hidden, self.calls = host.embed(ids)
        self.hidden = self.hidden.double()
        self._left_out: list[str] = []
        self._unfit: dict[str, list[str]] = {}  # {why: inputs that R4 leaves as they are}
        self.kind: RotationKind = "hadamard"
        blocks = [self._online(index, attention_bits) for index in range(len(host.kinds))]
        for why, names in self._unfit.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._left_out.append(f"the input of {names[0]}{more} stays as it is: {why}")
        blocks = self._with_values(blocks)
        residual, rest = self._residual(ids, seed)
        if rest is not None:
            blocks = [replace(b, **self._folded(index)) for index, b in enumerate(blocks)]
        self.rotation = Rotation(blocks, residual, rest, shard_groups)
        host.rotate_rest(self.rotation)
        if env_rank() == 0:
            for line in self._left_out:
                say(f"rotation: {line}")
        if rest is None and not any(b.value or b.inputs or b.owner for b in blocks):
            raise LowBitError("weights.rotation finds nothing in this model to rotate; set weights.rotation=none")

    @property
    def learnable(self) -> bool:
        """Tell whether anything is rotated by matrices that can be learned: the residual stream, or V."""
        return self.rotation.residual is not None or any(about.value is not None for about in self.rotation.blocks)

    def learned(self, matrices: Mapping[str, Tensor]) -> None:
        """Rotate by other matrices from here on. matrices: what learn_rotation has returned. Raises LowBitError where
        the model's function does not stay."""
        blocks, old = list(self.rotation.blocks), self.rotation
        for index, about in enumerate(blocks):
            if about.value is not None:
                blocks[index] = replace(about, heads=Dense(matrices[f"heads.{index}"]))
        residual = None if old.residual is None else Dense(matrices["residual"])
        self.rotation, self.kind = replace(old, blocks=blocks, residual=residual), "learned"
        if residual is not None and old.rest is not None:
            try:
                self._prove_rest(self._ids, residual, old.rest)
            except _Forbidden as why:
                raise LowBitError(f"weights.rotation=learned: {why}; use weights.rotation=hadamard") from None
        self.host.rotate_rest(self.rotation)

    def online(self) -> OnlineRotation:
        """Return what the artifact says of it."""
        blocks = self.rotation.blocks
        inputs = {self.host.fqn(index, name) for index, about in enumerate(blocks) for name in about.inputs}
        attends = any(about.owner is not None for about in blocks)
        return OnlineRotation(self.rotation.rest is not None, attends, frozenset(inputs), self.kind)

    def leave(self, linears: Collection[str]) -> None:
        """Leave the inputs of some linears, by their names in the model, without R4 from here on."""
        blocks = list(self.rotation.blocks)
        for index, about in enumerate(blocks):
            kept = tuple(name for name in about.inputs if self.host.fqn(index, name) not in linears)
            blocks[index] = replace(about, inputs=kept)
        self.rotation = replace(self.rotation, blocks=blocks)

    def rotated_inputs(self, index: int) -> set[str]:
        """Return Rotation.rotated_inputs of a block, as names in the model."""
        return {self.host.fqn(index, name) for name in self.rotation.rotated_inputs(index)}

    def rotate(self, index: int, block: nn.Module) -> None:
        """Rotate block `index` in place. Raises LowBitError where its function does not stay."""
        kinds, residual = self.host.kinds[index], self.rotation.residual
        before = run(block, self.calls[index], self.hidden)
        self.rotation.rotate_block(index, block, kinds)
        if not self._agrees(index, block, before, residual):
            raise LowBitError(
                f"{self.host.fqn(index, '')[:-1]} computes something else once it is rotated, unlike the first block; "
                "set weights.rotation=none"
            )

    def _agrees(self, index: int, block: nn.Module, before: Tensor, residual: Turn | None) -> bool:
        """Tell whether a rotated block puts out `before`, what it put out as it was, rotated."""
        turn = (lambda h: h) if residual is None else residual.turn
        after = run(block, self.calls[index], turn(self.hidden))
        return close(after, turn(before), turn(self.hidden))

    def _online(self, index: int, attention_bits: int) -> BlockRotation:
        """Return R3 and R4 of a block."""
        groups, host = self.host.groups[index], self.host
        owner = groups[0].owner  # attention runs first in every decoder block
        rows = [g.row for g in groups if g.kind == "row" and g.owner != owner]
        obstacles = {row: self._obstacle(host.kinds[index][row][1].in_features) for row in rows}
        for row, why in obstacles.items():
            if why is not None:
                self._unfit.setdefault(why, []).append(host.fqn(index, row))
        rows = [row for row, why in obstacles.items() if why is None]
        path = host.fqn(index, owner) if owner else host.fqn(index, "")[:-1]
        attends = attention_bits < 16 and attention.takes_part(host.model.get_submodule(path))
        return BlockRotation(inputs=tuple(rows), owner=owner if attends else None)

    def _obstacle(self, width: int) -> str | None:
        """Return why R4 cannot turn an input of this width."""
        return hadamard_obstacle(width, activation_groups(width, self.shard_groups))

    def _with_values(self, blocks: Sequence[BlockRotation]) -> list[BlockRotation]:
        """Return the blocks with R2, where one of the first block's linears proves to be V."""
        config, host = self.host.text_config, self.host
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads

        def place(index: int, name: str) -> dict[str, Any] | None:
            """Return R2 of a block whose V is `name`, if the shapes fit."""
            kinds, groups = host.kinds[index], host.groups[index]
            row = next((g.row for g in groups if g.owner == groups[0].owner), None)
            if name not in kinds or row is None or kinds[name][0] != "column":
                return None
            fits = (kinds[name][1].out_features, kinds[row][1].in_features) == (kv_heads * head_dim, heads * head_dim)
            return {"value": name, "output": row, "head_dim": head_dim} if fits else None

        first = host.groups[0]
        before = run(host.load(0), self.calls[0], self.hidden)
        names = [name for group in first if group.owner == first[0].owner for name in group.linears]
        for name in reversed(names):
            if (how := place(0, name)) is not None and self._proves(BlockRotation(**how), before, None):
                placed = [place(index, name) for index in range(len(blocks))]
                missing = [index for index, found in enumerate(placed) if found is None]
                if missing:
                    self._left_out.append(
                        f"V of {len(missing)} blocks (first: {missing[0]}) stays: no {name} of its width"
                    )
                return [b if how is None else replace(b, **how) for b, how in zip(blocks, placed, strict=True)]
        self._left_out.append(f"V stays as it is: {host.fqn(0, first[0].owner)} has no linear of its own for it")
        return list(blocks)

    def _residual(self, ids: Tensor, seed: int) -> tuple[Turn | None, RestRotation | None]:
        """Return R1, or why not, in a line."""
        try:
            if (obstacle := hadamard_obstacle(self.hidden.shape[-1])) is not None:
                raise _Forbidden(obstacle)
            rest = self._rest()
            for index in range(len(self.host.kinds)):
                self._check_readers(index)
            residual = ResidualRotation(self.hidden.shape[-1], seed)
            before = run(self.host.load(0), self.calls[0], self.hidden)
            if not self._proves(BlockRotation(**self._folded(0)), before, residual):
                raise _Forbidden(f"{self.host.fqn(0, '')[:-1]} computes something else then{self._perhaps(0)}")
            self._prove_rest(ids, residual, rest)
        except _Forbidden as why:
            self._left_out.append(f"the residual stream stays as it is: {why}")
            return None, None
        return residual, rest

    def _folded(self, index: int) -> dict[str, Any]:
        """Return R1 of a block."""
        groups = self.host.groups[index]
        reads = {name: g.norm for g in groups if g.kind == "column" for name in g.linears}
        return {"readers": reads, "writers": tuple(g.row for g in groups if g.kind == "row")}

    def _check_readers(self, index: int) -> None:
        """Raise _Forbidden where a column-parallel linear does not read an RMSNorm of its own."""
        block, path = self.host.model.get_submodule(self.host.fqn(index, "")[:-1]), self.host.fqn(index, "")
        for group in self.host.groups[index]:
            if group.kind == "column":
                if group.norm is None:
                    raise _Forbidden(f"{path}{group.linears[0]} does not alone read the output of a norm")
                _offset(block.get_submodule(group.norm), path + group.norm)

    def _rest(self) -> RestRotation:
        """Return R1's tensors outside the blocks."""
        model, hidden = self.host.model, self.hidden.shape[-1]
        names = {id(module): name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise _Forbidden("its embedding or output projection is not torch's")
        if (embedding.weight.shape[1], head.in_features) != (hidden, hidden):
            raise _Forbidden("its embeddings are not as wide as its hidden states")
        blocks = self.host.fqn(0, "")[:-2]
        norms = [
            name
            for name, module in model.named_modules()
            if readers.is_norm(module) and not name.startswith(blocks) and module.weight.shape[0] == hidden
        ]
        if len(norms) != 1:
            raise _Forbidden(f"it has {len(norms)} norms outside its blocks, not one")
        offset = _offset(model.get_submodule(norms[0]), norms[0])
        places = (f"{names[id(embedding)]}.weight", f"{norms[0]}.weight", f"{names[id(head)]}.weight")
        return RestRotation(*places, offset)

    def _proves(self, about: BlockRotation, before: Tensor, residual: Turn | None) -> bool:
        """Tell whether the first block, rotated as `about` says, computes what it did: `before`."""
        block = self.host.load(0)
        Rotation([about], residual, None, self.shard_groups).rotate_block(0, block, self.host.kinds[0])
        return self._agrees(0, block, before, residual)

    def _prove_rest(self, ids: Tensor, residual: Turn, rest: RestRotation) -> None:
        """Raise _Forbidden where the model turns its embeddings, or its logits change."""
        host, zero = self.host, torch.zeros(())
        try:
            host.rotate_rest(None, exact=True)
            hidden = host.embed(ids)[0]
            logits = host.logits(ids, hidden)
            host.rotate_rest(Rotation([], residual, rest, self.shard_groups), exact=True)
            turned = host.embed(ids)[0]
            if not close(turned, residual.turn(hidden), zero):
                raise _Forbidden("between its embedding and its blocks it does more than to look up and to scale")
            if not close(host.logits(ids, turned), logits, zero):
                raise _Forbidden("between its blocks and its logits it does more than a norm and a projection")
        finally:
            host.rotate_rest(None)

    def _perhaps(self, index: int) -> str:
        """Return the norms of a block that no linear reads directly, as a probable cause."""
        block = self.host.model.get_submodule(self.host.fqn(index, "")[:-1])
        read, hidden = {group.norm for group in self.host.groups[index]}, self.hidden.shape[-1]
        others = [
            name
            for name, module in block.named_modules()
            if readers.is_norm(module) and name not in read and module.weight.shape[0] == hidden
        ]
        return f" (its {', '.join(others)} multiply channel by channel)" if others else ""


class _Forbidden(Exception):
    """Say why a rotation would change the function of a model."""


def _offset(norm: nn.Module, name: str) -> int:
    """Return norm_offset of a norm whose weights need not be loaded. Raises _Forbidden for one that is no RMSNorm."""
    weight: Any = norm.weight
    probe = rotated.shallow_copy(norm)
    probe.weight = nn.Parameter(torch.linspace(-1, 1, len(weight)))
    try:
        return norm_offset(probe)
    except ValueError:
        raise _Forbidden(f"{name} ({type(norm).__name__}) is no RMSNorm") from None


@torch.no_grad()
def run(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """Return a block's output on `hidden`, float64 [windows, length, hidden], computed in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(double, (call.args, call.kwargs))
    with _in_float64(block), looped_experts(block):
        return BlockCall(args, kwargs).run(block, hidden)


def close(a: Tensor, b: Tensor, base: Tensor) -> bool:
    """Tell whether a and b differ by less than TOLERANCE of what b adds to `base`."""
    a, b, base = (tensor.to(b.device, torch.float64) for tensor in (a, b, base))
    return bool((a - b).norm() <= TOLERANCE * (b - base).norm())


@contextmanager
def _in_float64(block: nn.Module) -> Iterator[None]:
    """Have a block compute in float64 within the context; its tensors are as before afterwards, to the bit."""
    tensors = [t for t in chain(block.parameters(), block.buffers()) if t.is_floating_point()]
    before = [t.data for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.double()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
