"""Method qllm of `quantize`: what the pipeline over the blocks needs around it (model folder, text, ranks)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.adapters.huggingface.apply import check_divides, model_config
from megatron_lowbit.comm.plan import remove_plans
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.io.data import Windows, token_windows
from megatron_lowbit.io.hf_names import untie
from megatron_lowbit.launch.allocate import allocate, load_whole
from megatron_lowbit.launch.calibrate import write_plans
from megatron_lowbit.launch.choices import tell_shard_groups, with_choices
from megatron_lowbit.launch.full_precision import tell_full_precision
from megatron_lowbit.launch.generation import copy_generation_config
from megatron_lowbit.launch.groups import start_groups
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import compute_dtype, read_config, read_tokenizer
from megatron_lowbit.launch.model_folder import download
from megatron_lowbit.launch.tokenizer import check_tokenizer
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.qllm.block_source import BlockSource
from megatron_lowbit.qllm.pipeline import BlockwiseQuantizer, GroupResult
from megatron_lowbit.quant.tp_sizes import groups_for
from megatron_lowbit.runtime.distributed import device, on_rank_zero, seed_everything
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger
from megatron_lowbit.runtime.say import say


def quantize_qllm(
    config: QuantizeConfig,
    logger: MetricLogger,
    plans: bool = True,
    quantizer: type[BlockwiseQuantizer] | None = None,
) -> tuple[list[dict[str, Any]], list[GroupResult]]:
    """Write the LowBitCheckpoint (and CommPlans) to output_dir; returns a row per plan and a record of every group.

    plans: whether ranges are wanted for comm.tp_sizes; without, only those of the full sums are recorded. quantizer:
    a study's, in place of BlockwiseQuantizer.
    """
    if config.calibration.data is None:
        raise LowBitError("weights.method=qllm needs calibration.data; name a text, or set weights.method=rtn")
    if config.model is None:
        raise LowBitError("quantization needs the full-precision model; set model to its folder or hub id")
    if config.pp > 1 or config.sequence_parallel:
        key = "pp" if config.pp > 1 else "sequence_parallel"
        raise LowBitError(f"weights.method=qllm streams block by block on tp x dp ranks; leave {key} out")
    if config.comm.gather:
        raise LowBitError("comm.gather has no effect with weights.method=qllm; run calibrate with it afterwards")
    if config.artifact is not None:
        raise LowBitError("weights.method=qllm makes a new artifact; leave artifact out")
    if config.weights.clipping == "learned" and config.correction.mode != "merged":
        raise LowBitError(
            "weights.clipping=learned is trained with a merged correction; set correction.mode=merged, or "
            "weights.clipping=mse"
        )
    seed_everything(config.seed)
    tp_group, dp_group = start_groups(config)
    folder = Path(on_rank_zero(lambda: download(model_name(config.model or ""))))
    hf_config, tokenizer = read_config(folder), read_tokenizer(folder)
    text_config = getattr(hf_config, "text_config", None) or hf_config
    check_divides(text_config, config.tp, "tp")
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    section = config.calibration
    arguments = (section.samples, section.sequence_length, context, "calibration", section.text_column)
    check_tokenizer(tokenizer)
    tell = partial(logger.read, "calibration")
    read = on_rank_zero(lambda: vars(token_windows(tokenizer, section.data or "", *arguments, tell=tell)))
    windows = _aligned(Windows(**read))
    source = BlockSource(folder, hf_config, config, compute_dtype(config), device(), tp_group)
    source.check_widths()
    source.check_rest()
    tell_full_precision(source.model, config.weights.experts)
    if config.weights.shard_groups is None:
        tell_shard_groups(source.shard_groups)
    given = config.comm.tp_sizes is not None
    config = with_choices(config, source.text_config, source.widths)
    tp_sizes = plan_sizes(source, config, given) if plans else []
    allocation = None
    if config.weights.chooses_bits:
        allocation = allocate(config, windows, lambda: load_whole(config, read_config(folder)), logger)
    about = (source, windows, config, tp_sizes, dp_group, logger, allocation)
    pipeline = (quantizer or BlockwiseQuantizer)(*about)

    def save_beside(output: Path) -> None:
        saved = read_config(folder)
        if source.rotator is not None and source.rotator.online().residual:
            untie(saved)
        saved.save_pretrained(output)
        tokenizer.save_pretrained(output)
        copy_generation_config(folder, output)

    stats, rows = pipeline.run(save_beside), []
    tell_layers(pipeline.results, logger)
    measured = plans and len(stats.ranges) > 1
    if measured or source.rotator is not None:  # plans that were there are of a model that was not rotated
        on_rank_zero(lambda: remove_plans(config.output_dir))
    if measured:
        rows = write_plans(stats, config, config.output_dir, logger)
    on_rank_zero(pipeline.state.forget)
    return rows, pipeline.results


def tell_layers(groups: list[GroupResult], logger: MetricLogger) -> None:
    """Write tables of what reassembly did to every layer's input, and of the correction's loss in every group."""
    columns = ["threshold", "splits", "added", "expansion", "error", "chosen"]
    layers = [[name, *(of.get(key) for key in columns)] for group in groups for name, of in group.layers.items()]
    if layers:
        logger.table("reassembly", ["layer", *columns], layers, plot=("layer", "expansion"))
    losses = [[g, epoch, loss] for g, group in enumerate(groups) for epoch, loss in enumerate(group.losses)]
    if losses:
        logger.table("correction", ["group", "epoch", "loss"], losses, plot=("epoch", "loss", "group"))


def plan_sizes(source: BlockSource, config: QuantizeConfig, given: bool) -> list[int]:
    """Return comm.tp_sizes (and the size that the correction trains through), whose partial sums the shard groups make
    up. given: they are not chosen for the model, so one that does not fit is refused."""
    rows = [linear for kinds in source.kinds for kind, linear in kinds.values() if kind == "row"]
    shards = {width: activation_groups(width, source.shard_groups) for width in {r.in_features for r in rows}}
    wanted = config.comm.tp_sizes or ()
    if given:
        for size in wanted:
            check_divides(model_config(source.model), size, "comm.tp_sizes")
    sizes = set(fitting_sizes(wanted, shards, given))
    if config.correction.through_communication:
        if config.comm.selection == "random":
            raise LowBitError("correction.through_communication trains for one plan: set comm.selection=top")
        if config.comm.allocation == "adaptive":
            raise LowBitError(
                "correction.through_communication trains a block before the bits of later ones are known: "
                "set comm.allocation=uniform"
            )
        size = max(config.virtual_tp, config.tp)
        if size == 1:
            raise LowBitError("correction.through_communication needs ranks that communicate: set virtual_tp, or tp")
        _check_shards(size, shards, "virtual_tp")
        sizes.add(size)
    elif config.virtual_tp > 1:
        raise LowBitError(f"virtual_tp={config.virtual_tp} needs correction.through_communication=true here")
    return sorted(sizes)


def fitting_sizes(sizes: Iterable[int], shards: dict[int, int], given: bool) -> list[int]:
    """Return the tensor-parallel sizes that the shard groups serve; others are refused where they are given, and left
    out, with a line, where they are not. shards: {width of a row-parallel input: its shard groups}."""
    fitting = []
    for size in sizes:
        try:
            _check_shards(size, shards, "comm.tp_sizes")
            fitting.append(size)
        except LowBitError as error:
            if given:
                raise
            if env_rank() == 0:
                say(f"left out: {error}")
    return fitting


def _check_shards(size: int, shards: dict[int, int], key: str) -> None:
    for width, groups in shards.items():
        if groups % size:
            raise LowBitError(
                f"{key}: {size} does not divide the {groups} shard groups of inputs of width {width}; "
                f"set weights.shard_groups={groups_for(size, shards)}, or leave {size} out"
            )


def _aligned(windows: Windows) -> Windows:
    """Return windows padded to a multiple of 64 tokens, so that vectorised kernels end at the same places on every
    number of ranks."""
    extra = -windows.ids.shape[1] % 64
    pad = torch.nn.functional.pad
    return Windows(pad(windows.ids, (0, extra)), pad(windows.mask, (0, extra)))
