"""A group of blocks: consecutive decoder blocks that are quantized and corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.input_range import InputRange
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.qllm.trace_blocks import BlockCall
from megatron_lowbit.quant.affine import QuantizedWeight


@dataclass
class Block:
    """Hold one decoder block: this rank's shards of it, and what is known of it.

    index: its number; name: its fqn in the model. input_groups: its linears by what they read, in the order they run.
    unquantized: {name in the model: tensor on the CPU} of what is stored as it is (norms, biases). calls: {windows at
    once: how the model calls the block for as many}. experts: {name in the model: codes of all experts}, once they are
    rounded.
    """

    index: int
    name: str
    module: nn.Module
    input_groups: list[InputGroup]
    unquantized: dict[str, Tensor]
    calls: Mapping[int, BlockCall]
    experts: dict[str, QuantizedWeight] = field(default_factory=dict)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [windows, length, hidden] after the block, of those before it."""
        return self.calls[len(hidden)].run(self.module, hidden)


class BlockGroup:
    """Run several blocks one after the other."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = list(blocks)

    @property
    def modules(self) -> list[nn.Module]:
        """Return the blocks themselves."""
        return [block.module for block in self.blocks]

    def linears(self) -> list[ShardedLinear]:
        """Return the linears of all blocks, in the order in which the blocks define them."""
        return [module for block in self.modules for module in block.modules() if isinstance(module, ShardedLinear)]

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what the correction trains beside the linears' factors: nothing, of blocks one after the other."""
        return []

    def row_parallel_linears(self) -> list[ShardedLinear]:
        """Return the linears whose outputs are partial sums."""
        return [linear for linear in self.linears() if linear.kind == "row"]

    def input_ranges(self) -> list[InputRange]:
        """Return the quantizers of the blocks' activations, each once, in the order in which the blocks define them."""
        found = {id(m): m for block in self.modules for m in block.modules() if isinstance(m, InputRange)}
        return [quantizer for quantizer in found.values() if quantizer.act_bits < 16]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [windows, length, hidden] after all blocks, of those before them."""
        for block in self.blocks:
            hidden = block.forward(hidden)
        return hidden

    @torch.no_grad()
    def forward_stream(self, share: CalibrationShare, inputs: HiddenStream, outputs: HiddenStream) -> None:
        """Run all windows of `inputs` through the blocks, into `outputs`."""
        for start, stop, _ in share.batches():
            outputs.write(start, self.forward(inputs.read(start, stop, share.device)))


def load_group(source: BlockSource, indices: Sequence[int], calls: Mapping[int, Sequence[BlockCall]]) -> BlockGroup:
    """Load blocks `indices` from disk, in full precision.

    calls: {windows at once: how the model calls each of its blocks for as many}. Raises LowBitError for weights that
    are missing, damaged or not finite.
    """
    modules = [source.block(index) for index in indices]
    blocks = []
    for index, module in zip(indices, modules, strict=True):
        called = {windows: by_block[index] for windows, by_block in calls.items()}
        tensors = source.block_tensors(index, module)
        blocks.append(Block(index, source.block_name(index), module, source.groups[index], tensors, called))
    return BlockGroup(blocks)
