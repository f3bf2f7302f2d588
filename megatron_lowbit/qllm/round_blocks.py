"""Reassemble and round a group's blocks, one after the other, each on what the blocks before it put out quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm, rms_gain
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.clip_inputs import best_clip
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.input_range import HeadRange, InputRange
from megatron_lowbit.qllm.input_sums import gram, input_sums, squares
from megatron_lowbit.qllm.low_rank import trains_norms
from megatron_lowbit.qllm.rotation import InputRotation
from megatron_lowbit.qllm.round_experts import round_experts
from megatron_lowbit.qllm.search import Search
from megatron_lowbit.qllm.sharded_linear import PreparedNorm, ShardedLinear
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.gptq import InverseFactor
from megatron_lowbit.quant.input_clipping import HEADS
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress


@dataclass
class ReassemblyReport:
    """Record what reassembly did to the inputs of some blocks, by the fqn of their norm or linear, on this rank.

    reassembled: channels that it adds before as many are merged; layers: search.describe, and without_rotation (see
    BlockRounder). unrotated: the linears whose input is better not rotated.
    """

    reassembled: dict[str, int] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    unrotated: list[str] = field(default_factory=list)


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
        for block, hidden in self._block_by_block(group, inputs, scratch, "reassembling, rounding"):
            self.round_block(block, hidden, report)
        return report

    def round_trained(self, group: BlockGroup, inputs: HiddenStream, scratch: Sequence[HiddenStream]) -> None:
        """Choose the codes of weights that a merged correction may have trained by GPTQ."""
        for block, hidden in self._block_by_block(group, inputs, scratch, "rounding by GPTQ"):
            for input_group in block.input_groups:
                self._round_by_gptq(block, input_group, hidden)

    def _block_by_block(
        self, group: BlockGroup, inputs: HiddenStream, scratch: Sequence[HiddenStream], bar: str
    ) -> Iterator[tuple[Block, HiddenStream]]:
        """Yield (block, the quantized stream before it); a block is run once its successor is asked for. bar: what the
        progress bar says."""
        for number, block in enumerate(progress(group.blocks, len(group.blocks), bar, env_rank())):
            yield block, inputs
            if number + 1 < len(group.blocks):
                outputs = scratch[number % 2]
                BlockGroup([block]).forward_stream(self.share, inputs, outputs)
                inputs = outputs

    @property
    def gptq_after_training(self) -> bool:
        """Tell whether GPTQ waits for the training, which changes the weights of a merged correction."""
        return self.config.weights.rounding == "gptq" and self.config.correction.mode == "merged"

    def _forwards(self, block: Block, inputs: HiddenStream) -> Iterator[tuple[Callable[[], Any], Tensor]]:
        for start, stop, mask in self.share.batches():
            yield partial(block.forward, inputs.read(start, stop, self.share.device)), mask

    def round_block(self, block: Block, inputs: HiddenStream, report: ReassemblyReport) -> None:
        """Reassemble and round one block, input group by input group, in the order they run."""
        share, weights = self.share, self.config.weights
        forwards = partial(self._forwards, block, inputs)
        search = Search(block.module, forwards, self.config, self.attention_bits, self.tp_group, share.dp_group)
        for group in block.input_groups:
            name, plans = f"{block.name}.{group.norm or group.linears[0]}", None
            if self._reassembles(group, block.input_groups[0].owner):
                plans, report.layers[name] = self._choose(search, block, group, report)
                if group.kind == "column" and plans[0].is_identity:
                    plans = None  # on all ranks; a row-parallel linear's shards, and so its ranks, may differ
            if plans is not None:
                report.reassembled[name] = sum(len(plan.src_idx) - plan.in_features for plan in plans)
            self._quantize_linears(block, group, plans)
            if weights.clipping == "mse" and self.scheme.act_bits < 16:
                linears = sharded(block, group)
                linears[0].range.clip = best_clip(block.module, group, linears, forwards(), share.dp_group)
            if group.norm is not None:
                self._quantize_norm_output(block, group, name, None if plans is None else plans[0])
            if weights.clipping == "mse":
                importance = input_sums(block.module, group, forwards(), squares, share.dp_group)
                for linear in sharded(block, group):
                    linear.clip(importance)
            if weights.rounding == "gptq" and not self.gptq_after_training:
                self._round_by_gptq(block, group, inputs)
            for linear in sharded(block, group):
                linear.freeze()
            self._quantize_attention(block, group)
        if weights.experts != "none":
            block.experts = round_experts(
                block.module, block.name, partial(self._forwards, block, inputs), weights, share.dp_group
            )

    def _choose(
        self, search: Search, block: Block, group: InputGroup, report: ReassemblyReport
    ) -> tuple[list[ReassemblyPlan], dict[str, Any]]:
        """Return the plans for a group's input and what is to be said of them: of the input as it is rotated (R4), or,
        where the error is smaller then, as it was before, which ends its rotation.

        without_rotation: the error of the best plans without the rotation, relative to that of the best with it.
        """
        scheme, linear = self._scheme(block, group), sharded(block, group)[0]
        choice, rotation = search.choose(group, scheme), InputRotation.of(linear)
        if rotation is None or choice.error is None:
            return choice.plans, choice.description
        weights = linear.hp_weights
        rotation.undo(linear)
        other = search.choose(group, scheme)
        assert other.error is not None
        ratio = {"without_rotation": other.error / choice.error if choice.error else 1.0}
        if other.error < choice.error:
            report.unrotated.append(linear.name)
            return other.plans, {**other.description, **ratio}
        rotation.redo(linear, weights)
        return choice.plans, {**choice.description, **ratio}

    def _reassembles(self, group: InputGroup, attention_owner: str) -> bool:
        """Tell whether the paper reassembles a group's input: all but the attention's output projection's.

        attention_owner: the owner of the first input group, since attention runs first in every decoder block.
        """
        if self.config.reassembly.mode == "none" or self.scheme.act_bits == 16:
            return False
        attention_output = group.kind == "row" and group.row.startswith(attention_owner + ".")
        return self.config.reassembly.o_proj or not attention_output

    def _quantize_attention(self, block: Block, group: InputGroup) -> None:
        """Have an attention that owns the group quantize Q, K and V; an MLP does not look at that."""
        owner = block.module.get_submodule(group.owner)
        attention.set_bits([owner], self.attention_bits)
        if self.attention_bits < 16 and self.config.weights.clipping == "learned" and attention.takes_part(owner):
            ranges = nn.ModuleList(HeadRange(self.attention_bits, self.tp_group) for _ in HEADS)
            attention.set_quantizers(owner, ranges)

    def _scheme(self, block: Block, group: InputGroup) -> Scheme:
        """Return the bits of an input group, whose linears have the same."""
        bits = self.weight_bits.get(f"{block.name}.{group.linears[0]}", self.scheme.weight_bits)
        return Scheme(bits, self.scheme.act_bits)

    def _quantize_linears(self, block: Block, group: InputGroup, plans: Sequence[ReassemblyPlan] | None) -> None:
        shared = InputRange(self.scheme.act_bits)
        for linear in sharded(block, group):
            if plans is not None:
                linear.set_plans(plans)
            linear.quantize(self._scheme(block, group), self.config.weights, shared)
            linear.prepared = group.norm is not None

    def _round_by_gptq(self, block: Block, group: InputGroup, inputs: HiddenStream) -> None:
        """Choose the codes of a group's linears for their input as the block gives it to them now."""
        hessians = input_sums(block.module, group, self._forwards(block, inputs), gram, self.share.dp_group)
        factors = [InverseFactor.of(hessian) for hessian in hessians]
        for linear in sharded(block, group):
            linear.round_by_gptq(factors)

    def _quantize_norm_output(self, block: Block, group: InputGroup, fqn: str, plan: ReassemblyPlan | None) -> None:
        """Have a norm put out reassembled, quantized activations, for all linears that read it."""
        assert group.norm is not None
        norm = block.module.get_submodule(group.norm)
        if plan is None and trains_norms(self.config.correction) and (rms := rms_gain(norm)) is not None:
            plan = ReassemblyPlan.identity(len(rms[0]))  # its gain is to be a parameter
        if plan is not None:
            norm = ReassembledNorm(norm, plan.to("cpu")).to(self.share.device)
        block.module.set_submodule(group.norm, PreparedNorm(fqn, norm, sharded(block, group)[0].range))


def sharded(block: Block, group: InputGroup) -> list[ShardedLinear]:
    """Return the linears of an input group that are quantized."""
    modules = [block.module.get_submodule(name) for name in group.linears]
    return [module for module in modules if isinstance(module, ShardedLinear)]
