"""QLLM's pipeline (arXiv 2310.08041): group after group of blocks, two streams, one restartable state.

    full-precision stream   h  -> F(h)            what the correction aims at
    quantized stream        h~ -> F~(h~)          what the next group will be given

With weights.rotation=learned, a pass over the model comes first (learn_rotation.py). For every group:
    1. load its blocks from disk                                                    block_group.py, block_source.py
    2. run the full-precision stream through them                                   group_streams.py, hidden_stream.py
    3. reassemble and round block by block                                          round_blocks.py, search.py
    4. train the low-rank correction of the whole group, and keep it where it gains
       something                                    correct_group.py, low_rank.py, correct_before_gptq.py
    5. run the quantized stream through the result, and record the ranges of the
       partial sums for the communication plans                                     record_ranges.py
    6. write the group's part of the checkpoint, and the state                      pack_blocks.py, resume.py

Only the group at hand is in memory; the streams are memory-mapped files. After every group the state is written, so a
killed run continues with the next. When a rank is preempted (preemption.py), all ranks leave at the next batch or
training step: what was done of the group at hand is dropped, and done anew, to the same bits, when the run continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import distributed as dist

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.comm.plan import CalibrationStats, Ranges
from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.io.files import all_or_nothing, complete, writing
from megatron_lowbit.io.fingerprint import fingerprint_fields, fingerprint_of
from megatron_lowbit.qllm.block_group import BlockGroup, load_group
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.calibration_share import CalibrationShare, check_windows
from megatron_lowbit.qllm.correct_before_gptq import correct_before_gptq
from megatron_lowbit.qllm.correct_group import correct_group, judged_loss
from megatron_lowbit.qllm.group_streams import GroupStreams
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.learn_rotation import learn_rotation
from megatron_lowbit.qllm.low_rank import trains_norms
from megatron_lowbit.qllm.pack_blocks import pack_blocks
from megatron_lowbit.qllm.record_ranges import attach_reducers, record_ranges
from megatron_lowbit.qllm.resume import RunState, of_all_ranks
from megatron_lowbit.qllm.round_blocks import BlockRounder
from megatron_lowbit.qllm.search import word
from megatron_lowbit.qllm.trace_blocks import BlockCall
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.checkpoint import CheckpointPart, merge_parts, write_checkpoint
from megatron_lowbit.quant.head import KL_LENGTH, KL_WINDOWS, QuantizedHead, judge
from megatron_lowbit.quant.weight_bits import Allocation
from megatron_lowbit.runtime.distributed import (
    PreemptionCheck,
    all_gather_values,
    group_rank,
    on_every_rank,
    on_rank_zero,
    world_size,
)
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger, peak_memory, progress
from megatron_lowbit.runtime.say import say


@dataclass
class GroupResult:
    """Record of one group: seconds, the process's peak bytes so far, and what correct_group.CorrectionResult holds."""

    blocks: list[int]
    seconds: float
    peak_bytes: int
    losses: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    kept_epoch: int | None = None
    gptq_losses: list[float] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    reassembled: dict[str, int] = field(default_factory=dict)  # {module: channels added, on rank 0}
    layers: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # {module: search.describe, and search.word as "chosen"; rank 0}
    unrotated: list[str] = field(default_factory=list)  # linears whose input R4 leaves as it is


class BlockwiseQuantizer:
    """Run method qllm once, over all blocks of a model.

    windows: the calibration text, the same on all ranks. tp_sizes: tensor-parallel sizes whose ranges are recorded on
    the way. allocation: of scheme auto. results: one per finished group. Raises LowBitError for windows that the ranks
    of dp_group cannot share.
    """

    def __init__(
        self,
        source: BlockSource,
        windows: Windows,
        config: QuantizeConfig,
        tp_sizes: list[int],
        dp_group: dist.ProcessGroup | None,
        logger: MetricLogger,
        allocation: Allocation | None = None,
    ):
        self.allocation = allocation
        self.source, self.config, self.logger = source, config, logger
        names = [source.fqn(index, name) for index, kinds in enumerate(source.kinds) for name in kinds]
        self.attention_bits = attention.possible_bits(source.model, names, attention_bits(config))
        check_windows(windows, config, world_size(dp_group), source.text_config)
        self.results: list[GroupResult] = []
        count = -(-len(source.blocks) // config.correction.blocks_per_group)
        # Not a method of this object: the cycle would keep the streams' files mapped until Python collects garbage.
        check = partial(check_preemption, PreemptionCheck(), self.results, count)
        self.share = CalibrationShare(windows, config.calibration.batch_size, source.device, dp_group, check)
        bits = None if allocation is None else allocation.bits
        self.rounder = BlockRounder(config, self.attention_bits, self.share, source.tp_group, bits)
        self.folder = Path(config.output_dir)
        inputs = {"calibration.data's tokens": windows.digest(), "model's weights": source.weights.digest()}
        if allocation is not None:
            inputs["the bits of the linears"] = json.dumps(allocation.bits, sort_keys=True)
        self.state = RunState(config, inputs)
        self.parts: list[dict[str, Any]] = []
        self.bit_sums: dict[str, int] = {}
        self.ranges: Ranges = {size: {} for size in (1, *tp_sizes)}
        self.checksums: dict[str, str] = {}  # {stream that the run continues from: its SHA-256}
        self.rotation: str | None = None  # the checksum of matrices that are learned

    def run(self, save_beside: Callable[[Path], Any]) -> CalibrationStats:
        """Quantize, resuming where an earlier run of the same settings stopped, and write the checkpoint to output_dir.

        save_beside(folder) adds the model's config and tokenizer. Returns the ranges of the quantized model's
        partial sums. Raises LowBitError for a damaged state or NaN or Inf in the model, and Preempted.
        """
        done = self._resume()
        count, size = len(self.source.blocks), self.config.correction.blocks_per_group
        groups = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        calls = self._start_streams(done)
        for number in progress(range(done, len(groups)), len(groups) - done, "block groups", env_rank()):
            self._quantize_group(number, groups[number], calls)
        sums = {name: self.bit_sums[name] for name in sorted(self.bit_sums)}
        fingerprint = {**fingerprint_fields(self.source.text_config), "weights": sums}
        of_artifact, head = fingerprint, None
        if self.config.weights.lm_head_bits:
            head, bit_sum = self._quantize_head(self.config.weights.lm_head_bits)
            of_artifact = {**fingerprint, "weights": {**sums, head.name: bit_sum}}
        on_rank_zero(partial(self._finish, of_artifact, save_beside, head))
        return CalibrationStats(self.ranges, fingerprint)

    def _start_streams(self, done: int) -> dict[int, list[BlockCall]]:
        """Open the streams before group `done`, or fill them with the embeddings; return how the blocks are called."""
        ids, size = self.share.ids, self.share.batch_size
        self.source.trace(ids)
        self.source.rotate(ids, self.attention_bits)
        if self.config.weights.rotation == "learned":
            self._learn_rotation()
        for result in self.results:
            self._leave(result.unrotated)
        calls = {}
        for windows in self.share.batch_sizes:
            hidden, calls[windows] = self.source.embed(ids[:windows])
        shape = (*ids.shape, hidden.shape[-1])
        checksums = self.checksums if done else None
        self.streams = GroupStreams(self.state.folder, shape, self.source.dtype, done, checksums)
        if done == 0:
            for start in range(0, len(ids), size):
                hidden, _ = self.source.embed(ids[start : start + size])
                self.streams.full_precision.write(start, hidden)
                self.streams.quantized.write(start, hidden)
        self.source.free_rest()
        return calls

    def _learn_rotation(self) -> None:
        """Learn the rotation, or read what an unfinished run has learned, and rotate by it from here on."""
        assert self.source.rotator is not None
        if not self.source.rotator.learnable:
            if env_rank() == 0:
                say("rotation: neither the residual stream nor V is rotated, so there is nothing to learn")
            return
        if (checksum := self.rotation) is None:
            arguments = (self.source, self.share, self.state.folder, self.config, self.attention_bits, self.logger.log)
            matrices = learn_rotation(*arguments, self.rounder.weight_bits)
            self.rotation = on_rank_zero(lambda: self.state.save_rotation(matrices))
        else:
            matrices = on_every_rank(lambda: self.state.rotation(checksum))
        self.source.rotator.learned(matrices)

    def _leave(self, linears: Sequence[str]) -> None:
        """Leave the inputs of some linears without rotation."""
        if self.source.rotator is not None:
            self.source.rotator.leave(linears)

    def _quantize_group(self, number: int, indices: list[int], calls: dict[int, list[BlockCall]]) -> None:
        """Run the steps listed at the top of this file for blocks `indices`."""
        began = time.perf_counter()
        group = self.load_group(indices, calls)
        share, inputs = self.share, self.streams.quantized
        target = self.streams.create_full_precision()
        group.forward_stream(share, self.streams.full_precision, target)
        scratch = self.streams.create_scratch()
        report = self.rounder.round_group(group, inputs, scratch)
        self._leave(report.unrotated)
        through_communication = self.config.correction.through_communication
        if through_communication:
            self._record_ranges(group, None)
            attach_reducers(group, self.ranges, self.config)
        stored_dtype = self.source.stored_dtype or self.source.dtype
        log = partial(self.logger.log, group=number)
        correct = partial(correct_group, group, share, inputs, target, self.config, stored_dtype, log)
        if self.rounder.gptq_after_training:
            choose_codes = partial(self.rounder.round_trained, group, inputs, scratch)
            loss = partial(judged_loss, group, share, inputs, target, self.config.correction.holdout)
            correction = correct_before_gptq(group.linears(), correct, choose_codes, loss)
        else:
            correction, _ = correct()
        for linear in group.linears():
            linear.freeze()
        outputs = self.streams.create_quantized()
        if through_communication:
            group.forward_stream(share, inputs, outputs)
        else:
            self._record_ranges(group, outputs)
        part = pack_blocks(group, trains_norms(self.config.correction))
        sums = {linear.name: self.source.bit_sums[linear.name] for linear in group.linears()}
        weights = fingerprint_of(sums, self.source.text_config, self.source.tp_group)["weights"]
        weights |= {name: self.source.expert_sums[name] for name in part.experts}  # every rank has all experts
        result = GroupResult(
            indices,
            time.perf_counter() - began,
            peak_memory(),
            reassembled=report.reassembled,
            layers=self._with_words(indices, report.layers),
            unrotated=report.unrotated,
            **vars(correction),
        )
        self.results.append(result)
        # Before the state: a kill between the two would leave the group unlogged.
        log(group_seconds=result.seconds, peak_bytes=result.peak_bytes)
        self._save_state(number + 1, part, weights, [target, outputs])
        self.streams.advance(target, outputs)

    def _with_words(self, indices: Sequence[int], layers: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return what was done to the inputs that reassembly was a candidate for, with what rotation did beside it."""
        rotator = self.source.rotator
        rotated = set[str]().union(*(rotator.rotated_inputs(index) for index in indices)) if rotator else set()
        return {name: {**about, "chosen": word(name in rotated, about["added"] > 0)} for name, about in layers.items()}

    def load_group(self, indices: Sequence[int], calls: Mapping[int, Sequence[BlockCall]]) -> BlockGroup:
        """Load blocks `indices` from disk; calls: how each block is called."""
        return load_group(self.source, indices, calls)

    def _record_ranges(self, group: BlockGroup, outputs: HiddenStream | None) -> None:
        """Run the quantized stream through the group and add its ranges to those of the groups before."""
        found = record_ranges(group, self.share, self.streams.quantized, outputs, self.ranges, self.config)
        for size, by_linear in found.items():
            self.ranges[size] |= by_linear

    def _resume(self) -> int:
        """Return how many groups an unfinished run of the same settings has done, and take over what it has found."""
        found = on_rank_zero(self.state.find)
        self.rotation = found.get("rotation")
        if found["done"]:
            with complete(self.state.folder / "state.json"):
                self.results += [GroupResult(**result) for result in found["results"]]
            self.parts, self.bit_sums, self.checksums = found["parts"], found["bit_sums"], found["files"]
            self.ranges = on_every_rank(lambda: self.state.ranges(found))
            if env_rank() == 0:
                say(f"continuing after {found['done']} of the block groups")
        return found["done"]

    def _save_state(self, done: int, part: CheckpointPart, sums: dict[str, int], streams: list[HiddenStream]) -> None:
        """Write the group's part and the state, once the streams of all ranks are written."""
        files = of_all_ranks({stream.path.name: stream.checksum() for stream in streams})  # all have written
        self.bit_sums |= sums
        values: dict[str, Any] = {"files": files, "bit_sums": self.bit_sums}
        values["results"] = [asdict(result) for result in self.results]
        if self.rotation is not None:
            values["rotation"] = self.rotation
        self.parts = on_rank_zero(partial(self.state.save, done, part, self.parts, self.ranges, **values))

    def _finish(
        self, fingerprint: dict[str, Any], save_beside: Callable[[Path], Any], head: QuantizedHead | None
    ) -> None:
        """Write the tensors outside the blocks, then lowbit.json, with which the artifact is the new one."""
        weights = self.config.weights
        name = "rest" if head is None else f"rest-head{head.weight.num_bits}"
        tensors = self.source.rest(head.replaced if head else ())
        rest = CheckpointPart(tensors=tensors, head=head).save(self.state.part_path(name))
        merged = merge_parts([*self.parts, rest])
        rotation = None if self.source.rotator is None else self.source.rotator.online()
        about = (weights.scheme, self.source.shard_groups, self.attention_bits, fingerprint, rotation, self.allocation)
        with all_or_nothing(self.folder):
            with writing(self.folder):
                save_beside(self.folder)
            write_checkpoint(self.folder, merged, *about, weights.experts if "experts" in merged else None)

    def _quantize_head(self, bits: int) -> tuple[QuantizedHead, int]:
        """Round the output projection, and measure its KL on the full-precision stream, now after the last block.

        A collective call: each rank measures its own of the first windows. Returns the head and its weight's bit_sum.
        """
        group, place = self.share.dp_group, self.source.head
        assert place is not None, "the config asks for it"
        count = len(range(group_rank(group), KL_WINDOWS, world_size(group)))
        ids, mask = self.share.ids[:count, :KL_LENGTH], self.share.mask[:count, :KL_LENGTH]
        hidden = self.streams.full_precision.read(0, len(ids), self.source.device)[:, :KL_LENGTH]
        weight, mine, bit_sum = on_every_rank(lambda: self.source.measure_head(bits, ids, mask, hidden))
        every = zip_longest(*all_gather_values(mine, group))
        # In the order of the windows: the sum, which lowbit.json holds, is the same for any number of ranks.
        parts = [part for row in every for part in row if part is not None]
        head = on_every_rank(lambda: judge(weight, place.name, place.embedding, parts))
        self.logger.log(lm_head_kl=head.kl, lm_head_tokens=head.tokens)
        return head, bit_sum


def check_preemption(watch: PreemptionCheck, results: list[GroupResult], groups: int) -> None:
    """Raise Preempted on all ranks once one of them is to stop. results: of the groups done, out of `groups`."""
    watch.check(f"after {len(results)} of {groups} groups of blocks; the same command continues there")


def attention_bits(config: QuantizeConfig) -> int:
    """Return the bits of Q, K and V: those of the activations, unless weights.attention says no."""
    return 16 if config.weights.attention is False else Scheme.parse(config.weights.scheme).act_bits
