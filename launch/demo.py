"""megatron-lowbit demo: calibrate, quantize, and compare full precision with low-bit weights and communication.

On the embedded model by default: two ranks through DeepSpeed, no network, minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.plan import CommPlan
from megatron_lowbit.config import CommConfig, DemoConfig, LowBitError, SchemeName, WeightsConfig
from megatron_lowbit.io.files import ensure_writable
from megatron_lowbit.launch.engines.prepare import calibrate_engine, load_windows
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.generate import continue_text
from megatron_lowbit.launch.quantize import save_checkpoint
from megatron_lowbit.launch.rows import full_precision_row, low_bit_row, print_rows
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger

CONFIG = DemoConfig
BF16 = CommConfig(mode="bf16")
INT4 = CommConfig(preset="paper", mode="one_shot", bf16_fraction=0.0)
RANDOM = CommConfig(preset="paper", mode="one_shot", selection="random")
HYBRID = CommConfig(preset="paper", mode="one_shot")
TIERED = CommConfig(mode="one_shot")
ROWS: list[tuple[str, SchemeName, CommConfig]] = [
    ("W4A16", "W4A16", BF16),
    ("W8A8", "W8A8", BF16),
    ("W4A4", "W4A4", BF16),
    ("int4 communication", "none", INT4),
    ("random bf16", "none", RANDOM),
    ("hybrid", "none", HYBRID),
    ("tiered", "none", TIERED),
    ("W4A8 + tiered", "W4A8", TIERED),
]


def run(config: DemoConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.artifact is not None:
        raise LowBitError("the demo makes its own artifact; leave artifact out")
    if max(config.tp, config.virtual_tp) == 1:
        raise LowBitError("the demo compares ways to communicate: set tp=2 (or engine=huggingface tp=1 virtual_tp=2)")
    schemes = {scheme for _, scheme, _ in ROWS}
    engine = start_engine(config, [WeightsConfig(scheme=scheme) for scheme in sorted(schemes)])
    size = engine.tp_size
    stats = calibrate_engine(engine, config.calibration, [size], logger, TIERED)
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    row, reference = full_precision_row(engine, windows, config.evaluation, logger)
    rows = [row]
    text = {"prompt": config.prompt, "full precision": continue_text(engine, config.prompt, config.max_new_tokens)}
    for name, scheme, comm in ROWS:
        plans: dict[int, CommPlan] = {}
        if comm.mode == "one_shot":
            plans[size] = build_plan(stats, size, comm, config.seed)
        artifact = Artifact(engine.checkpoints.get(scheme), plans)
        rows.append(low_bit_row(engine, name, artifact, comm, windows, config.evaluation, reference, logger))
    text[name] = continue_text(engine, config.prompt, config.max_new_tokens)  # the last row: W4A8 + tiered
    folder = ensure_writable(Path(config.output_dir) / "artifact")
    on_rank_zero(lambda: stats.save(folder))
    on_rank_zero(lambda: artifact.plan(size).save(folder))
    on_rank_zero(lambda: save_checkpoint(engine, engine.checkpoints["W4A8"], folder))
    if env_rank() == 0:
        print_rows(rows, f"{config.model}, {config.engine}, tp={size}")
        for title in ("full precision", name):
            print(f"\n--- {title} ---\n{config.prompt}{text[title]}")
    return {"rows": rows, "text": text}


if __name__ == "__main__":
    sys.exit(run_stage("demo", sys.argv[1:]))
