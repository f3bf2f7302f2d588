"""megatron-lowbit quantize: a full-precision model -> LowBitCheckpoint, and CommPlans given calibration.data."""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lowbit.adapters.compressed_tensors import check_settings
from megatron_lowbit.adapters.megatron_recipe import write_recipe
from megatron_lowbit.config import ExportConfig, LowBitError, QuantizeConfig
from megatron_lowbit.io.files import all_or_nothing, writing
from megatron_lowbit.io.hf_names import untie
from megatron_lowbit.launch.allocate import allocate, tell_bits
from megatron_lowbit.launch.calibrate import usable_sizes, write_plans, written
from megatron_lowbit.launch.dry_run.report import dry_run
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import (
    calibrate_engine,
    check_head,
    load_windows,
    refuse_rotated,
    round_weights,
    with_head,
)
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.export import export
from megatron_lowbit.launch.full_precision import tell_full_precision
from megatron_lowbit.launch.generation import copy_generation_config
from megatron_lowbit.launch.layout import quantize_method
from megatron_lowbit.launch.qllm import fitting_sizes, quantize_qllm
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger
from megatron_lowbit.runtime.say import say

CONFIG = QuantizeConfig


def run(config: QuantizeConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.dry_run:
        return dry_run(config)
    if config.weights.scheme == "none":
        raise LowBitError("weights.scheme=none quantizes nothing; choose W4A16, W4A8, W4A4, W6A6 or W8A8")
    qllm = quantize_method(config) == "qllm"
    if config.export == "compressed-tensors":
        check_settings(config, qllm)
    rows = run_qllm(config, logger) if qllm else run_rtn(config, logger)
    if config.export is None:
        return {"rows": rows}
    return {"rows": rows, "exported": on_rank_zero(lambda: export_artifact(config))}


def export_artifact(config: QuantizeConfig) -> dict[str, Any]:
    """Export what was written; returns the row of the export."""
    folder = Path(config.output_dir)
    keys: dict[str, Any] = {"artifact": str(folder), "format": config.export, "dtype": config.dtype}
    try:
        return export(ExportConfig(output_dir=str(folder / str(config.export)), **keys))
    except LowBitError as error:
        raise LowBitError(f"the artifact is written, but not its export: {error}") from None


def run_rtn(config: QuantizeConfig, logger: MetricLogger) -> list[dict[str, Any]]:
    for key in ("reassembly", "correction", "rotation", "dp"):
        if key == "dp" and config.engine == "megatron":
            continue
        if getattr(config, key) != getattr(QuantizeConfig(), key):
            raise LowBitError(
                f"{key} has no effect with weights.method=rtn; set weights.method=qllm and calibration.data"
            )
    check_head(config)
    engine, windows = start_engine(config, [] if config.weights.chooses_bits else [config.weights]), None
    if config.weights.chooses_bits and engine.checkpoint is None:
        windows = load_windows(engine, config.calibration, "calibration", logger)
        allocation = allocate(config, windows, lambda: engine.model, logger)
        made = round_weights(engine.model, config.weights, engine.hf_config.dtype, config.seed, allocation)
        engine.checkpoints[made.scheme_name] = made
        tell_full_precision(engine.model, config.weights.experts)
    checkpoint = engine.checkpoint
    if checkpoint is None or not engine.full_precision:
        raise LowBitError("quantization needs the full-precision model; set model to its folder or hub id")
    if config.artifact is not None and checkpoint.scheme_name != config.weights.scheme:
        raise LowBitError(
            f"artifact {config.artifact!r} is quantized to {checkpoint.scheme_name} already; leave artifact out"
        )
    if config.weights.lm_head_bits:
        windows = windows or load_windows(engine, config.calibration, "calibration", logger)
        checkpoint = with_head(engine, checkpoint, config.weights.lm_head_bits, windows, logger)
    rows: list[dict[str, Any]] = []
    sizes = usable_sizes(engine, config) if config.calibration.data is not None else []
    sizes = check_shard_groups(engine, checkpoint, sizes, given=config.comm.tp_sizes is not None)
    with all_or_nothing(config.output_dir):
        if sizes:
            stats = calibrate_engine(engine, config.calibration, sizes, logger, config.comm, windows=windows)
            rows = write_plans(stats, config, config.output_dir, logger)
        else:
            if engine.plans:
                refuse_rotated(engine)
            for plan in engine.plans.values():
                on_rank_zero(partial(plan.save, config.output_dir))
        on_rank_zero(lambda: save_checkpoint(engine, checkpoint, config.output_dir))
        on_rank_zero(lambda: write_recipe(checkpoint, config.weights, config.output_dir))
    return [size_row(checkpoint, config.output_dir, logger), *rows]


def run_qllm(config: QuantizeConfig, logger: MetricLogger) -> list[dict[str, Any]]:
    rows, groups = quantize_qllm(config, logger)
    if env_rank() != 0:
        return []
    checkpoint = LowBitCheckpoint.load(config.output_dir)
    write_recipe(checkpoint, config.weights, config.output_dir)
    row = {**size_row(checkpoint, config.output_dir, logger), "peak_bytes": max(group.peak_bytes for group in groups)}
    return [{**row, "groups": [asdict(group) for group in groups]}, *rows]


def size_row(checkpoint: LowBitCheckpoint, folder: str, logger: MetricLogger) -> dict[str, Any]:
    """Return the sizes: ideal_bytes is bits * parameters / 8 of the quantized linears, linear_bytes what they really
    take."""
    if env_rank() == 0:
        linears = checkpoint.linear_bytes()
        more = linears / checkpoint.ideal_bytes() - 1
        attention = "" if checkpoint.attention_bits == 16 else f", Q, K and V in {checkpoint.attention_bits} bits"
        head = "" if checkpoint.head is None else f", {checkpoint.head}"
        experts = "" if checkpoint.experts is None else f", experts in {checkpoint.experts.scheme}"
        say(
            f"wrote {len(checkpoint.linears)} linears in {checkpoint.scheme_name}{attention}{head}{experts}, "
            f"{checkpoint.nbytes():,} bytes (linears {linears:,}: codes, and {more:.1%} more for scales and the like)"
        )
        if checkpoint.allocation is not None:
            tell_bits(checkpoint)
    logger.log(bytes=checkpoint.nbytes())
    logger.artifact("checkpoint", written(folder, "lowbit*"))
    return {
        "name": checkpoint.scheme_name,
        "linears": len(checkpoint.linears),
        "attention_bits": checkpoint.attention_bits,
        "bytes": checkpoint.nbytes(),
        "linear_bytes": checkpoint.linear_bytes(),
        "ideal_bytes": checkpoint.ideal_bytes(),
        "weight_bits": None if checkpoint.allocation is None else checkpoint.allocation.describe(),
        "lm_head": None if checkpoint.head is None else checkpoint.head.describe(),
    }


def check_shard_groups(engine: Engine, checkpoint: LowBitCheckpoint, sizes: list[int], given: bool) -> list[int]:
    """Return the tensor-parallel sizes that divide the shard groups; refuse others that are given, and leave them out
    where they are not.

    Say where a row-parallel input has fewer groups than weights.shard_groups.
    """
    if checkpoint.scheme.act_bits == 16:
        return sizes
    widths = sorted({checkpoint.linears[name].in_features for name in engine.sites()})
    shards = {width: activation_groups(width, checkpoint.shard_groups) for width in widths}
    for width, groups in shards.items():
        if groups != checkpoint.shard_groups and env_rank() == 0:
            say(f"inputs of width {width} get {groups} shard groups, not {checkpoint.shard_groups}: it divides them")
    return fitting_sizes(sizes, shards, given)


def save_checkpoint(engine: Engine, checkpoint: LowBitCheckpoint, folder: str | Path) -> None:
    """Save the checkpoint, and the model's config, generation config and tokenizer, so that the folder loads by
    itself."""
    with writing(folder):
        saved = copy.deepcopy(engine.hf_config)
        if checkpoint.rotation is not None and checkpoint.rotation.residual:
            untie(saved)
        saved.save_pretrained(folder)
        engine.tokenizer.save_pretrained(folder)
        copy_generation_config(engine.hf_config.name_or_path, folder)
    checkpoint.save(folder)  # last: its JSON says that the artifact is whole


if __name__ == "__main__":
    sys.exit(run_stage("quantize", sys.argv[1:]))
