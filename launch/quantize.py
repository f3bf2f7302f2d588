"""megatron-lowbit quantize: a full-precision model -> LowBitCheckpoint, and CommPlans given calibration.data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_lowbit.artifacts import LowBitCheckpoint
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.distributed import env_rank
from megatron_lowbit.launch.calibrate import usable_sizes, write_plans
from megatron_lowbit.launch.engine import Engine, calibrate_engine, start_engine
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.metrics import MetricLogger

CONFIG = QuantizeConfig


def run(config: QuantizeConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.weights.scheme == "none":
        raise LowBitError("weights.scheme=none quantizes nothing; choose W4A16, W4A8, W4A4, W6A6 or W8A8")
    engine = start_engine(config, [config.weights])
    checkpoint = engine.checkpoint
    if checkpoint is None or not engine.full_precision:
        raise LowBitError("quantization needs the full-precision model; set model to its folder or hub id")
    if config.artifact is not None and checkpoint.scheme_name != config.weights.scheme:
        raise LowBitError(
            f"artifact {config.artifact!r} is quantized to {checkpoint.scheme_name} already; leave artifact out"
        )
    rows: list[dict[str, Any]] = []
    if config.calibration.data is not None:
        stats = calibrate_engine(engine, config.calibration, usable_sizes(engine, config), logger)
        rows = write_plans(stats, config, config.output_dir, logger)
    elif env_rank() == 0:
        for plan in engine.plans.values():
            plan.save(config.output_dir)
    if env_rank() == 0:
        save_checkpoint(engine, checkpoint, config.output_dir)
        print(f"wrote {len(checkpoint.linears)} linears in {checkpoint.scheme_name}, {checkpoint.nbytes():,} bytes")
    row = {
        "name": checkpoint.scheme_name,
        "linears": len(checkpoint.linears),
        "bytes": checkpoint.nbytes(),
        "linear_bytes": sum(
            w.packed_weight.nbytes + w.scale.nbytes + w.zero_point.nbytes for w in checkpoint.linears.values()
        ),
    }
    logger.log(bytes=row["bytes"])
    return {"rows": [row, *rows]}


def save_checkpoint(engine: Engine, checkpoint: LowBitCheckpoint, folder: str | Path) -> None:
    """The checkpoint with the model's config and tokenizer beside it, so that the folder loads by itself."""
    checkpoint.save(folder)
    engine.module.config.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(run_stage("quantize", sys.argv[1:]))
