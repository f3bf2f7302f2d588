"""Learn R1 and R2 before anything is quantized (weights.rotation=learned; after SpinQuant, arXiv 2405.16406).

    min over Q, R_b    sum over blocks b, mean over tokens    |F_b(h) Q - F~_b(h Q; Q, R_b)|^2 / |F_b(h)|^2

F_b is block b on the full-precision stream h, F~_b the block rotated by Q and R_b, its weights, activations, Q, K and V
rounded to nearest. Gradients pass the rounding and reach the ranges (quant/range_gradient.py), which a better rotation
makes smaller. SpinQuant trains on the loss of the whole model; this is each block's own error, so only one block is in
memory. It is relative to a token's size, because the norms that read the residual stream divide by it.

Q (hidden x hidden) is shared by all blocks, R_b (head_dim x head_dim) by the heads of one. They begin with the matrices
of weights.rotation=hadamard and are stepped batch by batch (orthogonal.py), block after block, rotation.epochs times
through the model. Data-parallel ranks share the windows, tensor-parallel ranks the shards; sums have a fixed order
(low_rank.gradients, shard_groups.replicate), so the matrices are the same on all ranks, and at every number of ranks.

Nothing of it is saved until the end: a run that is killed in this pass begins it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.low_rank import Windows, gradients
from megatron_lowbit.qllm.orthogonal import OrthogonalMatrix
from megatron_lowbit.qllm.rotation import Rotation, Unfolded
from megatron_lowbit.qllm.round_blocks import BlockRounder, ReassemblyReport
from megatron_lowbit.qllm.trace_blocks import BlockCall
from megatron_lowbit.qllm.turns import Trained
from megatron_lowbit.quant.range_gradient import gradients_through_ranges
from megatron_lowbit.runtime.distributed import on_every_rank
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress


def learn_rotation(
    source: BlockSource,
    share: CalibrationShare,
    folder: Path,
    config: QuantizeConfig,
    attention_bits: int,
    log: Callable[..., Any],
    weight_bits: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return the matrices that Rotator.learned takes, float64 on the CPU.

    source: after `rotate`. folder: for two streams of hidden states, which are gone afterwards. log: called with
    epoch=, block=, rotation_loss= of every block in every epoch. weight_bits: {linear: bits} of scheme auto. Raises
    LowBitError where a loss is not finite, and Preempted.
    """
    learner = RotationLearner(source, share, config, attention_bits, log, weight_bits)
    assert source.rotator is not None, "the config asks for it"
    source.rotate_rest(None)
    hidden, _ = source.embed(share.ids[:1])
    shape = (*share.ids.shape, hidden.shape[-1])
    paths = [folder / f"learn-{side}-rank{env_rank()}.bin" for side in (0, 1)]
    streams = [on_every_rank(partial(HiddenStream, path, shape, source.dtype, hashed=False)) for path in paths]
    try:
        for epoch in range(config.rotation.epochs):
            learner.run_epoch(epoch, streams)
    finally:
        for stream in streams:
            stream.delete()
    source.rotate_rest(source.rotator.rotation)
    return learner.matrices()


class RotationLearner:
    """Train the matrices of a model's rotation, block by block."""

    def __init__(
        self,
        source: BlockSource,
        share: CalibrationShare,
        config: QuantizeConfig,
        attention_bits: int,
        log: Callable[..., Any],
        weight_bits: Mapping[str, int] | None,
    ):
        assert source.rotator is not None, "the config asks for it"
        self.source, self.share, self.config, self.log = source, share, config, log
        self.rotation: Rotation = source.rotator.rotation
        without = {
            "reassembly": config.reassembly.model_copy(update={"mode": "none"}),
            "correction": config.correction.model_copy(update={"mode": "none"}),
            "weights": config.weights.model_copy(update={"clipping": "none", "rounding": "nearest"}),
        }
        config = config.model_copy(update=without)
        self.rounder = BlockRounder(config, attention_bits, share, source.tp_group, weight_bits)
        self.batches = -(-len(share.all_mask) // config.rotation.batch_size)
        self.steps = self.batches * len(source.blocks) * config.rotation.epochs
        self.done = 0

        def start(turn: Any, width: int) -> OrthogonalMatrix:
            return OrthogonalMatrix(turn.turn(torch.eye(width, dtype=torch.float64)).to(source.device))

        width = source.text_config.hidden_size
        self.residual = None if self.rotation.residual is None else start(self.rotation.residual, width)
        self.heads = [None if b.value is None else start(b.heads, b.head_dim) for b in self.rotation.blocks]

    def matrices(self) -> dict[str, Tensor]:
        """Return {"residual": Q, "heads.<block>": R} of what is rotated."""
        every = {"residual": self.residual, **{f"heads.{index}": heads for index, heads in enumerate(self.heads)}}
        return {name: matrix.value.cpu() for name, matrix in every.items() if matrix is not None}

    def run_epoch(self, epoch: int, streams: Sequence[HiddenStream]) -> None:
        """Step through all blocks once. streams: two, to be overwritten."""
        share, calls = self.share, {}
        inputs, outputs = streams
        for windows in share.batch_sizes:
            _, calls[windows] = self.source.embed(share.ids[:windows])
        for start, stop, _ in share.batches():
            inputs.write(start, self.source.embed(share.ids[start:stop])[0])
        self.source.free_rest()
        count = len(self.source.blocks)
        name = f"learning the rotation, epoch {epoch + 1} of {self.config.rotation.epochs}"
        for index in progress(range(count), count, name, env_rank()):
            block = self._load(index, calls)
            BlockGroup([block]).forward_stream(share, inputs, outputs)
            loss = self._train_block(block, inputs, outputs)
            self.log(epoch=epoch, block=index, rotation_loss=loss)
            inputs, outputs = outputs, inputs

    def _load(self, index: int, calls: Mapping[int, Sequence[BlockCall]]) -> Block:
        source = self.source
        called = {windows: by_block[index] for windows, by_block in calls.items()}
        return Block(index, source.block_name(index), source.load(index), source.groups[index], {}, called)

    def _train_block(self, block: Block, inputs: HiddenStream, targets: HiddenStream) -> float:
        """Step Q and the block's R through all batches; return the mean of their losses before each step."""
        share, section, kinds = self.share, self.config.rotation, self.source.kinds[block.index]
        unfolded = self.rotation.unfold(block.index, block.module, kinds)
        self.rounder.round_block(block, inputs, ReassemblyReport())
        matrices = [m for m in (self.residual, self.heads[block.index]) if m is not None]
        per_rank, total = section.batch_size // share.ranks, 0.0
        for number in range(self.batches):
            share.raise_if_preempted()
            parameters = [nn.Parameter(matrix.value.float()) for matrix in matrices]
            windows = self._windows(number, block, unfolded, parameters, inputs, targets)
            with gradients_through_ranges():
                loss = gradients(parameters, windows, per_rank, share.dp_group)
            if not math.isfinite(loss):
                raise LowBitError(f"{block.name}: the loss of weights.rotation=learned is {loss}; use hadamard")
            angle = section.learning_rate * (1 - self.done / self.steps)
            for matrix, parameter in zip(matrices, parameters, strict=True):
                assert parameter.grad is not None
                matrix.step(parameter.grad, angle)
            self.done += 1
            total += loss / self.batches
        return total

    def _windows(
        self,
        number: int,
        block: Block,
        unfolded: Unfolded,
        parameters: Sequence[nn.Parameter],
        inputs: HiddenStream,
        targets: HiddenStream,
    ) -> Windows:
        """Yield this rank's windows of batch `number` as low_rank.gradients takes them: the rotated, rounded block's
        output and what it should be, each divided by the size of the token."""
        share, size = self.share, self.config.rotation.batch_size
        tokens = int(share.all_mask[number * size : (number + 1) * size].sum())
        per_rank = size // share.ranks
        for window in range(number * per_rank, min((number + 1) * per_rank, len(share.ids))):
            rotation = self._rotation(block.index, parameters)
            rotation.fold(0, block.module, self.source.kinds[block.index], unfolded)
            for linear in BlockGroup([block]).linears():
                linear.unfreeze()
            turn = (lambda x: x) if rotation.residual is None else rotation.residual.turn
            hidden, wanted = (s.read(window, window + 1, share.device) for s in (inputs, targets))
            scale = 1 / wanted.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            output = block.forward(turn(hidden).to(hidden.dtype))
            yield (
                output.float() * scale,
                turn(wanted) * scale,
                share.mask[window : window + 1].to(output.device),
                tokens,
            )

    def _rotation(self, index: int, parameters: Sequence[nn.Parameter]) -> Rotation:
        """Return the rotation of one block, as its number 0, by the matrices as they are."""
        remaining, about, group = list(parameters), self.rotation.blocks[index], self.source.tp_group
        residual = None if self.residual is None else Trained(remaining.pop(0), group)
        if self.heads[index] is not None:
            about = replace(about, heads=Trained(remaining.pop(0), group))
        return Rotation([about], residual, None, self.rotation.shard_groups, torch.float32)
