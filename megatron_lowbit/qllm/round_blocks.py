"""Reassemble and round a group's blocks, one after the other, each on what the blocks before it put out quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm, rms_gain
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.low_rank import trains_norms
from megatron_lowbit.qllm.search import Search
from megatron_lowbit.qllm.sharded_linear import PreparedNorm, ShardedLinear
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan


@dataclass
class ReassemblyReport:
    """Record what reassembly did to the inputs of some blocks, by the fqn of their norm or linear, on this rank.

    reassembled: channels that it adds before as many are merged; layers: search.describe.
    """

    reassembled: dict[str, int] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


class BlockRounder:
    """Round blocks in place, as `config` says.

    attention_bits: of Q, K and V; share: the windows that reassembly is chosen on; tp_group: whose ranks hold the
    blocks' shards; weight_bits: {linear: bits} of scheme auto.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        attention_bits: int,
        share: CalibrationShare,
        tp_group: dist.ProcessGroup | None,
        weight_bits: Mapping[str, int] | None = None,
    ):
        self.weight_bits = weight_bits or {}
        self.config, self.attention_bits, self.share, self.tp_group = config, attention_bits, share, tp_group
        self.scheme = Scheme.parse(config.weights.scheme)

    def round_group(self, group: BlockGroup, inputs: HiddenStream, scratch: Sequence[HiddenStream]) -> ReassemblyReport:
        """Round all blocks of a group. inputs: the quantized stream before it; scratch: two more, to be overwritten."""
        report = ReassemblyReport()
        for number, block in enumerate(group.blocks):
            self.round_block(block, inputs, report)
            if number + 1 < len(group.blocks):
                outputs = scratch[number % 2]
                BlockGroup([block]).forward_stream(self.share, inputs, outputs)
                inputs = outputs
        return report

    def round_block(self, block: Block, inputs: HiddenStream, report: ReassemblyReport) -> None:
        """Reassemble and round one block, input group by input group, in the order they run."""
        share = self.share

        def forwards() -> Iterator[tuple[Callable[[], Any], Tensor]]:
            for start, stop, mask in share.batches():
                yield partial(block.forward, inputs.read(start, stop, share.device)), mask

        search = Search(block.module, forwards, self.config, self.attention_bits, self.tp_group, share.dp_group)
        for group in block.input_groups:
            name, plans = f"{block.name}.{group.norm or group.linears[0]}", None
            if self._reassembles(group, block.input_groups[0].owner):
                plans, report.layers[name] = search.choose(group, self._scheme(block, group))
                if group.kind == "column" and plans[0].is_identity:
                    plans = None  # on all ranks; a row-parallel linear's shards, and so its ranks, may differ
            if plans is not None:
                report.reassembled[name] = sum(len(plan.src_idx) - plan.in_features for plan in plans)
            self._round_linears(block, group, plans)
            if group.norm is not None:
                self._quantize_norm_output(block, group.norm, name, None if plans is None else plans[0])
            attention.set_bits([block.module.get_submodule(group.owner)], self.attention_bits)

    def _reassembles(self, group: InputGroup, attention_owner: str) -> bool:
        """Tell whether the paper reassembles a group's input: all but the attention's output projection's.

        attention_owner: the owner of the first input group, since attention runs first in every decoder block.
        """
        if self.config.reassembly.mode == "none" or self.scheme.act_bits == 16:
            return False
        attention_output = group.kind == "row" and group.row.startswith(attention_owner + ".")
        return self.config.reassembly.o_proj or not attention_output

    def _scheme(self, block: Block, group: InputGroup) -> Scheme:
        """Return the bits of an input group, whose linears have the same."""
        bits = self.weight_bits.get(f"{block.name}.{group.linears[0]}", self.scheme.weight_bits)
        return Scheme(bits, self.scheme.act_bits)

    def _round_linears(self, block: Block, group: InputGroup, plans: Sequence[ReassemblyPlan] | None) -> None:
        for name in group.linears:
            linear = block.module.get_submodule(name)
            if isinstance(linear, ShardedLinear):
                if plans is not None:
                    linear.set_plans(plans)
                linear.quantize(self._scheme(block, group), self.config.weights)
                linear.prepared = group.norm is not None
                linear.freeze()

    def _quantize_norm_output(self, block: Block, norm_name: str, fqn: str, plan: ReassemblyPlan | None) -> None:
        """Have a norm put out reassembled, quantized activations, for all linears that read it."""
        norm = block.module.get_submodule(norm_name)
        if plan is None and trains_norms(self.config.correction) and (rms := rms_gain(norm)) is not None:
            plan = ReassemblyPlan.identity(len(rms[0]))  # its gain is to be a parameter
        if plan is not None:
            norm = ReassembledNorm(norm, plan.to("cpu")).to(self.share.device)
        block.module.set_submodule(norm_name, PreparedNorm(fqn, norm, self.scheme.act_bits))
