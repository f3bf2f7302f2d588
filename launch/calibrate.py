"""megatron-lowbit calibrate: one pass over text -> CalibrationStats and a CommPlan per tensor-parallel size."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lowbit.adapters.huggingface.apply import check_divides
from megatron_lowbit.comm.build_plan import aggregated_range, build_plan
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import CalibrateConfig, LowBitError
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import calibrate_engine
from megatron_lowbit.launch.groups import start_copies
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.qllm.resume import State
from megatron_lowbit.quant.tp_sizes import default_tp_sizes
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger
from megatron_lowbit.runtime.say import say

CONFIG = CalibrateConfig


def run(config: CalibrateConfig, logger: MetricLogger) -> dict[str, Any]:
    engine = start_copies(config)
    if not engine.full_precision:
        raise LowBitError("calibration needs the full-precision model; set model to its folder or hub id")
    sizes = usable_sizes(engine, config)
    stats = calibrate_engine(engine, config.calibration, sizes, logger, config.comm, resumed=config)
    rows = write_plans(stats, config, config.output_dir, logger)
    on_rank_zero(State("calibrate", config, {}).forget)
    return {"rows": rows}


def usable_sizes(engine: Engine, config: CalibrateConfig) -> list[int]:
    """Return comm.tp_sizes, each of which has to divide the model and to be a multiple of the ranks; where it is not
    given, the model's own sizes that are."""
    given, ranks = config.comm.tp_sizes, config.tp
    if given is None:
        sizes = [size for size in default_tp_sizes(engine.text_config) if size % ranks == 0]
        if not sizes:
            of = "" if ranks == 1 else f", multiples of tp={ranks},"
            raise LowBitError(f"none of 2 to 8 ranks{of} divide this model's heads and MLP; name a comm.tp_sizes")
        return sizes
    for size in given:
        check_divides(engine.text_config, size, "comm.tp_sizes")
        if size % ranks:
            raise LowBitError(f"comm.tp_sizes: {size} is no multiple of the {ranks} ranks that calibrate")
    if not given:
        raise LowBitError("comm.tp_sizes=[] asks for no communication plan; name a size")
    return list(given)


def written(folder: str | Path, *patterns: str) -> list[Path]:
    """Return the files of an artifact, for the logger."""
    return sorted(file for pattern in patterns for file in Path(folder).glob(pattern))


def write_plans(
    stats: CalibrationStats, config: CalibrateConfig, folder: str | Path, logger: MetricLogger
) -> list[dict[str, Any]]:
    """Save the statistics and one plan per size (rank 0); a result row per size."""
    rows = []
    on_rank_zero(lambda: stats.save(folder))
    for size in sorted(size for size in stats.ranges if size > 1):
        plan = build_plan(stats, size, config.comm, config.seed)
        on_rank_zero(partial(plan.save, folder))
        if env_rank() == 0:
            say(f"wrote the plan for tp_size {size}: {len(plan.sites)} sites, {plan.label}")
        table = []
        for name, site in plan.sites.items():
            r = stats.ranges[size][name]
            width = aggregated_range(r.min_vals, r.max_vals, config.comm.symmetric)
            table.append([name, width.max().item(), width.median().item(), len(site.first.bf16_idx)])
        columns = ["site", "widest", "median", "bf16_features"]
        logger.table(f"ranges_tp{size}", columns, table, plot=("site", "widest"))
        rows.append({"name": f"tp{size}", "tp_size": size, "sites": len(plan.sites), "communication": plan.label})
    logger.artifact("plans", written(folder, "calibration.*", "comm_plan_tp*.*"))
    return rows


if __name__ == "__main__":
    sys.exit(run_stage("calibrate", sys.argv[1:]))
