"""QLLM's walk over a model (arXiv 2310.08041): group after group of blocks, two streams, one restartable state.

    full-precision stream   h  -> F(h)            what the correction aims at
    quantized stream        h~ -> F~(h~)          what the next group will be given

For every group: load its blocks from disk; run the full-precision stream through them; reassemble and round block by
block; train the low-rank correction of the whole group; run the quantized stream through the result, which also
records the ranges of the partial sums for the communication plans; write the group's part of the checkpoint. Only
the group at hand is in memory; the streams are memory-mapped files. After every group the state is written, so a
killed run continues with the next. Told to stop (preemption.py), all ranks leave at the next batch or training step:
what was done of the group at hand is dropped, and done again, to the same bits, when the run continues.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.observers import RangeObserver, SharedSteps
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import LowBitError, QuantizeConfig, one_line
from megatron_lowbit.io.data import Windows
from megatron_lowbit.io.files import complete
from megatron_lowbit.io.fingerprint import fingerprint_fields, fingerprint_of
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm, rms_gain
from megatron_lowbit.qllm.block_source import BlockSource, Call
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.low_rank import add_low_rank, train, trainable_norms
from megatron_lowbit.qllm.resume import RunState, of_all_ranks
from megatron_lowbit.qllm.search import Search
from megatron_lowbit.qllm.shard_groups import ordered_sum
from megatron_lowbit.qllm.sharded_linear import PreparedNorm, ShardedLinear
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.checkpoint import CheckpointPart, merge_parts, write_checkpoint
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import PreemptionCheck, group_rank, on_every_rank, on_rank_zero, world_size
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger, peak_memory, progress


@dataclass
class GroupResult:
    """What one group left behind: seconds, the process's peak bytes so far, the training's mean loss per epoch."""

    blocks: list[int]
    seconds: float
    peak_bytes: int
    losses: list[float] = field(default_factory=list)
    loss_before: float | None = None  # of the correction, over all windows
    loss_after: float | None = None
    reassembled: dict[str, int] = field(default_factory=dict)  # {module: channels added, on rank 0}
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # {module: search.describe, on rank 0}


class Walk:
    """One run of method qllm. tp_sizes: tensor-parallel sizes whose ranges are recorded on the way."""

    def __init__(
        self,
        source: BlockSource,
        windows: Windows,
        config: QuantizeConfig,
        tp_sizes: list[int],
        dp_group: dist.ProcessGroup | None,
        logger: MetricLogger,
    ):
        self.source, self.config, self.logger = source, config, logger
        self.tp_group, self.dp_group, self.tp_sizes = source.tp_group, dp_group, tp_sizes
        self.scheme = Scheme.parse(config.weights.scheme)
        names = [source.fqn(index, name) for index, kinds in enumerate(source.kinds) for name in kinds]
        self.attention_bits = attention.possible_bits(source.model, names, attention_bits(config))
        ranks, rank = world_size(dp_group), group_rank(dp_group)
        check_windows(windows, config, ranks, source.text_config)
        self.all_mask = windows.mask
        self.ids, self.mask = windows.ids[rank::ranks], windows.mask[rank::ranks]
        self.folder = Path(config.output_dir)
        inputs = {"calibration.data's tokens": windows.digest(), "model's weights": source.weights.digest()}
        self.state = RunState(config, inputs)
        self.results: list[GroupResult] = []
        self.parts: list[dict[str, Any]] = []
        self.bit_sums: dict[str, int] = {}
        self.ranges: dict[int, dict[str, FeatureRange]] = {size: {} for size in (1, *tp_sizes)}
        self.files: dict[str, str] = {}  # {stream that the run continues from: its checksum}
        self.calls: dict[int, list[Call]] = {}  # of every block, for so many windows
        self.watch = PreemptionCheck()

    def run(self, save_beside: Callable[[Path], Any]) -> CalibrationStats:
        """Quantize, resuming where an earlier run of the same settings stopped, and write the checkpoint to output_dir.

        save_beside(folder) adds the model's config and tokenizer. Returns the ranges of the quantized model's
        partial sums.
        """
        done = self._resume()
        count = len(self.source.blocks)
        size = self.config.correction.blocks_per_group
        groups = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        self._start_streams(done)
        for number in progress(range(done, len(groups)), len(groups) - done, "block groups", env_rank()):
            self._group(number, groups[number])
        sums = {name: self.bit_sums[name] for name in sorted(self.bit_sums)}
        fingerprint = {**fingerprint_fields(self.source.text_config), "weights": sums}
        on_rank_zero(partial(self._finish, fingerprint, save_beside))
        return CalibrationStats(self.ranges, fingerprint)

    def _start_streams(self, done: int) -> None:
        """Open the streams before group `done`, or fill them with the embeddings."""
        ids = self.ids
        self.source.trace(ids)
        batch = self.config.calibration.batch_size
        for windows in {1, min(batch, len(ids)), len(ids) % batch or batch}:
            hidden, self.calls[windows] = self.source.embed(ids[:windows])
        self.shape = (len(ids), ids.shape[1], hidden.shape[-1])
        self.hp_stream, self.stream = (self._stream(name, done, existing=done > 0) for name in ("hp", "lowbit"))
        if done == 0:
            for start in range(0, len(ids), batch):
                hidden, _ = self.source.embed(ids[start : start + batch])
                self.hp_stream.write(start, hidden)
                self.stream.write(start, hidden)
        self.source.free_rest()

    def _stream(self, name: str, number: int | str, existing: bool = False) -> HiddenStream:
        path = self.state.folder / f"{name}-{number}-rank{env_rank()}.bin"
        arguments = (self.shape, self.source.dtype, existing, self.files.get(path.name), name != "scratch")
        return on_every_rank(lambda: HiddenStream(path, *arguments))

    def _group(self, number: int, indices: list[int]) -> None:
        began = time.perf_counter()
        blocks = [self.source.block(index) for index in indices]
        tensors = [self.source.block_tensors(i, block) for i, block in zip(indices, blocks, strict=True)]
        target = self._stream("hp", number + 1)
        self._forward(blocks, indices, self.hp_stream, target)
        result = GroupResult(indices, 0.0, 0)
        here, scratch = self.stream, [self._stream("scratch", side) for side in (0, 1)]
        for i, (index, block) in enumerate(zip(indices, blocks, strict=True)):
            self._quantize_block(index, block, here, result)
            if i + 1 < len(blocks):
                self._forward([block], [index], here, scratch[i % 2])
                here = scratch[i % 2]
        linears = [module for block in blocks for module in block.modules() if isinstance(module, ShardedLinear)]
        through = self.config.correction.through_communication
        if through:
            self._record_ranges(blocks, indices)
            self._attach_reducers(linears)
        self._correct(blocks, indices, linears, target, result)
        for linear in linears:
            linear.freeze()
        following = self._stream("lowbit", number + 1)
        if through:
            self._forward(blocks, indices, self.stream, following)
        else:
            self._record_ranges(blocks, indices, following)
        part = self._pack(blocks, tensors)
        sums = {linear.name: self.source.bit_sums[linear.name] for linear in linears}
        weights = fingerprint_of(sums, self.source.text_config, self.tp_group)["weights"]
        result.seconds, result.peak_bytes = time.perf_counter() - began, peak_memory()
        self.results.append(result)
        told = {"group_seconds": result.seconds, "peak_bytes": result.peak_bytes}
        self.logger.log(group=number, **told)  # before the state, or a kill between them would leave it untold
        self._save_state(number + 1, part, weights, [target, following])
        for stream in (self.hp_stream, self.stream, *scratch):
            stream.delete()
        self.hp_stream, self.stream = target, following

    def _batches(self) -> Iterator[tuple[int, int, Tensor]]:
        size = self.config.calibration.batch_size
        for start in range(0, len(self.ids), size):
            self._may_go_on()
            stop = min(start + size, len(self.ids))
            yield start, stop, self.mask[start:stop].to(self.source.device)

    def _may_go_on(self) -> None:
        done, size = len(self.results), self.config.correction.blocks_per_group
        count = -(-len(self.source.blocks) // size)
        self.watch.check(f"after {done} of {count} groups of blocks; the same command continues there")

    def _call(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        return self.calls[len(hidden)][index].run(block, hidden)

    @torch.no_grad()
    def _forward(self, blocks: list[nn.Module], indices: list[int], source: HiddenStream, to: HiddenStream) -> None:
        for start, stop, _ in self._batches():
            hidden = source.read(start, stop, self.source.device)
            for block, index in zip(blocks, indices, strict=True):
                hidden = self._call(block, index, hidden)
            to.write(start, hidden)

    def _quantize_block(self, index: int, block: nn.Module, stream: HiddenStream, result: GroupResult) -> None:
        """Reassemble and round one block in place, input group by input group, in the order they run."""

        def run() -> Iterator[tuple[Callable[[], Any], Tensor]]:
            for start, stop, mask in self._batches():
                hidden = stream.read(start, stop, self.source.device)
                yield partial(self._call, block, index, hidden), mask

        search = Search(block, run, self.config, self.attention_bits, self.tp_group, self.dp_group)
        for group in self.source.groups[index]:
            linears = [
                module for name in group.linears if isinstance(module := block.get_submodule(name), ShardedLinear)
            ]
            plans, name = None, self.source.fqn(index, group.norm or group.linears[0])
            if self._reassembles(index, group.row, group.kind):
                plans, result.layers[name] = search.choose_and_describe(group)
            if plans is not None and group.kind == "column" and plans[0].is_identity:
                plans = None  # on all ranks; a row-parallel linear's shards, and so its ranks, may differ
            if plans is not None:
                added = sum(len(plan.src_idx) - plan.in_features for plan in plans)
                result.reassembled[name] = added
            for linear in linears:
                if plans is not None:
                    linear.set_plans(plans)
                linear.quantize(self.scheme, self.config.weights)
                linear.prepared = group.norm is not None
                linear.freeze()
            if group.norm is not None:
                norm = block.get_submodule(group.norm)
                if plans is not None or (self._trains_norms() and rms_gain(norm) is not None):
                    plan = plans[0] if plans is not None else ReassemblyPlan.identity(self.shape[-1])
                    norm = ReassembledNorm(norm, plan.to("cpu")).to(self.source.device)
                block.set_submodule(group.norm, PreparedNorm(name, norm, self.scheme.act_bits))
            attention.set_bits([block.get_submodule(group.owner)], self.attention_bits)

    def _trains_norms(self) -> bool:
        return self.config.correction.train_norms and self.config.correction.mode != "none"

    def _reassembles(self, index: int, row: str, kind: str) -> bool:
        """Everything but the attention's output projection, which the paper leaves (reassembly.o_proj)."""
        if self.config.reassembly.mode == "none" or self.scheme.act_bits == 16:
            return False
        first_owner = self.source.groups[index][0].owner  # attention runs first in every decoder block
        return kind == "column" or self.config.reassembly.o_proj or not row.startswith(first_owner + ".")

    def _correct(
        self,
        blocks: list[nn.Module],
        indices: list[int],
        linears: list[ShardedLinear],
        target: HiddenStream,
        result: GroupResult,
    ) -> None:
        section = self.config.correction
        if section.mode == "none":
            return
        parameters = add_low_rank(linears, section, self.config.seed)
        norms = trainable_norms(blocks) if section.train_norms else []
        before = [norm.gain.detach().clone() for norm in norms]
        parameters += [norm.gain for norm in norms]
        untrained = self._loss(blocks, indices, target)
        for linear in linears if section.mode == "merged" else ():  # beside a branch the weights stay
            linear.unfreeze()
        ranks, hidden_size = world_size(self.dp_group), self.shape[-1]
        each = section.batch_size // ranks
        counts = self.all_mask.sum(1)

        def step(number: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
            self._may_go_on()
            tokens = int(counts[number * section.batch_size : (number + 1) * section.batch_size].sum())
            for window in range(number * each, min((number + 1) * each, len(self.ids))):
                hidden = self.stream.read(window, window + 1, self.source.device)
                for block, index in zip(blocks, indices, strict=True):
                    hidden = self._call(block, index, hidden)
                wanted = target.read(window, window + 1, self.source.device)
                yield hidden, wanted, self.mask[window : window + 1].to(hidden.device), tokens * hidden_size

        epochs = itertools.count()

        def log(loss: float) -> None:
            self.logger.log(group=len(self.results), epoch=next(epochs), correction_loss=loss)

        steps = -(-len(self.ids) // each)
        seed = self.config.seed * 1_000_003 + indices[0]
        result.losses = train(parameters, step, steps, section, seed % 2**63, self.dp_group, log)
        stored = self.source.stored_dtype or self.source.dtype
        for norm in norms:
            norm.gain.data = (norm.gain.data - norm.offset).to(stored).float() + norm.offset  # as it will be deployed
        for linear in linears:
            linear.freeze()
        result.loss_before, result.loss_after = untrained, self._loss(blocks, indices, target)
        if not result.loss_after < untrained:  # never worse than without
            for linear in linears:
                linear.drop_low_rank()
            for norm, gain in zip(norms, before, strict=True):
                norm.gain.data = gain

    @torch.no_grad()
    def _loss(self, blocks: list[nn.Module], indices: list[int], target: HiddenStream) -> float:
        """The group's mean squared error over all windows of all ranks, as it is now."""
        total = torch.zeros(1, dtype=torch.float64, device=self.source.device)
        for start, stop, mask in self._batches():
            hidden = self.stream.read(start, stop, self.source.device)
            for block, index in zip(blocks, indices, strict=True):
                hidden = self._call(block, index, hidden)
            wanted = target.read(start, stop, self.source.device)
            total += (hidden.float() - wanted.float())[mask].square().sum(dtype=torch.float64)
        if self.dp_group is not None:
            dist.all_reduce(total, group=self.dp_group)
        return total.item() / (int(self.all_mask.sum()) * self.shape[-1])

    @torch.no_grad()
    def _record_ranges(self, blocks: list[nn.Module], indices: list[int], to: HiddenStream | None = None) -> None:
        """Run the quantized stream through the group, observing the partial sums of every row-parallel linear."""
        gamma, histograms = self.config.calibration.ema_gamma, self.config.comm.clipping == "histogram"
        observers: dict[str, dict[int, RangeObserver]] = {}
        shared = SharedSteps(self.dp_group, interleaved=True)
        current = torch.empty(0, dtype=torch.bool)

        def observe(linear: ShardedLinear) -> Callable[[Any], None]:
            def observer(parts: Any) -> None:
                ranges, sums = observers.setdefault(linear.name, {}), []
                for size in self.ranges:
                    each = len(parts) // size
                    if size not in ranges:
                        ranges[size] = RangeObserver(size, parts[0].shape[-1], gamma, parts[0].device, histograms)
                    sums.append([ordered_sum(parts[rank * each : (rank + 1) * each], None) for rank in range(size)])
                shared.observe(f"{linear.name} puts out", list(ranges.values()), sums, current)

            return observer

        rows = [m for block in blocks for m in block.modules() if isinstance(m, ShardedLinear) and m.kind == "row"]
        for linear in rows:
            linear.observer = observe(linear)
        for start, stop, mask in self._batches():
            current = mask
            hidden = self.stream.read(start, stop, self.source.device)
            for block, index in zip(blocks, indices, strict=True):
                hidden = self._call(block, index, hidden)
            if to is not None:
                to.write(start, hidden)
        shared.finish()
        for linear in rows:
            linear.observer = None
            for size, ranges in observers[linear.name].items():
                self.ranges[size][linear.name] = ranges.feature_range(dp_group=self.dp_group)

    def _attach_reducers(self, linears: list[ShardedLinear]) -> None:
        size = max(self.config.virtual_tp, self.config.tp)
        fingerprint: dict[str, Any] = {"weights": {}}
        plan = build_plan(CalibrationStats(self.ranges, fingerprint), size, self.config.comm, self.config.seed)
        for linear in linears:
            if linear.kind == "row":
                linear.reducer = VirtualReducer(plan.sites[linear.name])

    @torch.no_grad()
    def _pack(self, blocks: list[nn.Module], tensors: list[dict[str, Tensor]]) -> CheckpointPart:
        part = CheckpointPart()
        for block, own in zip(blocks, tensors, strict=True):
            part.tensors.update(own)
            for module in block.modules():
                if isinstance(module, ShardedLinear):
                    part.linears[module.name] = module.packed()
                    if (low_rank := module.low_rank()) is not None:
                        part.low_rank[module.name] = low_rank
                    plan = module.whole_plan() if not module.prepared else None
                    if plan is not None and not plan.is_identity:
                        part.reassembly[module.name] = plan
                if isinstance(module, PreparedNorm) and isinstance(norm := module.norm, ReassembledNorm):
                    if not (plan := norm.reassembly.plan().to("cpu")).is_identity:
                        part.reassembly[module.name] = plan
                    if self._trains_norms() and norm.gain is not None:
                        before = own[f"{module.name}.weight"]
                        trained = norm.gain.detach().cpu() - norm.offset
                        part.tensors[f"{module.name}.weight"] = trained.to(before.dtype)
        return part

    def _resume(self) -> int:
        """Groups that an unfinished run of the same settings has done."""
        found = on_rank_zero(self.state.find)
        if found["done"]:
            with complete(self.state.folder / "state.json"):
                self.results = [GroupResult(**result) for result in found["results"]]
            self.parts, self.bit_sums, self.files = found["parts"], found["bit_sums"], found["files"]
            self.ranges = on_every_rank(lambda: self.state.ranges(found))
            if env_rank() == 0:
                print(f"continuing after {found['done']} of the block groups")
        return found["done"]

    def _save_state(self, done: int, part: CheckpointPart, sums: dict[str, int], streams: list[HiddenStream]) -> None:
        """Write the group's part and the state, once the streams of all ranks are written."""
        files = of_all_ranks({stream.path.name: stream.checksum() for stream in streams})  # all have written
        self.bit_sums |= sums
        values = {"files": files, "bit_sums": self.bit_sums, "results": [asdict(result) for result in self.results]}
        self.parts = on_rank_zero(partial(self.state.save, done, part, self.parts, self.ranges, **values))

    def _finish(self, fingerprint: dict[str, Any], save_beside: Callable[[Path], Any]) -> None:
        """The tensors outside the blocks, and lowbit.json over all parts: from here on the artifact is the new one."""
        rest = CheckpointPart(tensors=self.source.rest()).save(self.state.part_path("rest"))
        weights = self.config.weights
        merged = merge_parts([*self.parts, rest])
        try:
            save_beside(self.folder)
        except OSError as error:
            raise LowBitError(f"cannot write to {str(self.folder)!r}: {one_line(error)}") from None
        write_checkpoint(self.folder, merged, weights.scheme, weights.shard_groups, self.attention_bits, fingerprint)


def attention_bits(config: QuantizeConfig) -> int:
    """Bits of Q, K and V: those of the activations, unless weights.attention says no."""
    return 16 if config.weights.attention is False else Scheme.parse(config.weights.scheme).act_bits


def check_windows(windows: Windows, config: QuantizeConfig, ranks: int, text_config: Any) -> None:
    """Raise LowBitError for calibration text that the ranks cannot share, or that cannot tell the channels apart."""
    count, tokens = len(windows.ids), int(windows.mask.sum())
    if tokens < text_config.hidden_size:
        raise LowBitError(
            f"calibration.data gives {tokens} tokens, fewer than the model's {text_config.hidden_size} channels; "
            "raise calibration.samples or calibration.sequence_length, or give more text"
        )
    if count % ranks:
        raise LowBitError(
            f"{count} calibration windows do not divide among dp={ranks}; set calibration.samples to a multiple"
        )
    section = config.correction
    if section.mode != "none" and section.batch_size % ranks:
        raise LowBitError(
            f"correction.batch_size={section.batch_size} does not divide among dp={ranks}; set a multiple"
        )
    if section.mode != "none" and section.batch_size > count:
        raise LowBitError(f"correction.batch_size={section.batch_size} is above the {count} calibration windows")
