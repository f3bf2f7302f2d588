"""megatron-lowbit benchmark: seconds to the first token, patched against unpatched engine, measured in pairs.

That is one forward over the prompt which, as in generation, makes the last token's logits only. With `rate` the ranks
are behind links of that rate (netlab.py).

Each pair runs the unpatched and the patched engine one after the other on the same tokens, so a machine whose speed
drifts moves both; the figure to read is the median of the pairs' ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch import distributed as dist

from megatron_lowbit.adapters import patching
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan, describe
from megatron_lowbit.comm.plan import label_of
from megatron_lowbit.config import CommConfig, LowBitError, WeightsConfig
from megatron_lowbit.launch.bench.config import BenchmarkConfig
from megatron_lowbit.launch.bench.netlab import on_a_host
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import calibrate_engine
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.runner import run_stage
from megatron_lowbit.launch.saturation import logged, measure_saturation, print_saturation
from megatron_lowbit.launch.tables import print_table
from megatron_lowbit.runtime.distributed import PreemptionCheck, device
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger, progress

CONFIG = BenchmarkConfig


def run(config: BenchmarkConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.rate is not None and not on_a_host():
        raise LowBitError(f"rate={config.rate} makes hosts for its own ranks: run benchmark without a launcher")
    engine = start_engine(config, [WeightsConfig(scheme="W4A16"), WeightsConfig(scheme="W4A8")])
    size = engine.tp_size
    if size == 1:
        raise LowBitError("the benchmark compares collectives: set tp=2 (or engine=huggingface tp=1 virtual_tp=2)")
    stats = calibrate_engine(engine, config.calibration, [size], logger, config.comm)
    plan = build_plan(stats, size, config.comm, config.seed)
    low_bit = f"{config.comm.mode or 'one_shot'} {label_of(describe(config.comm))}"
    artifacts: dict[str, tuple[Artifact, CommConfig | None]] = {
        "patched, nothing quantized": (Artifact(), None),
        low_bit: (Artifact(None, {size: plan}), config.comm),
    }
    *alone, (scheme, checkpoint) = engine.checkpoints.items()  # an artifact's, or W4A16 and W4A8
    artifacts |= {name: (Artifact(other), None) for name, other in alone}
    artifacts[f"{scheme} + {low_bit}"] = Artifact(checkpoint, {size: plan}), config.comm
    length = min(engine.context, config.tokens)
    vocab = engine.text_config.vocab_size
    ids = torch.randint(
        vocab, (max(1, config.tokens // length), length), generator=torch.Generator().manual_seed(config.seed)
    )
    rows: list[dict[str, Any]] = []
    for name, (artifact, comm) in artifacts.items():
        pairs, saturation = time_pairs(engine, artifact, comm, ids, config.repeats, name)
        ratios = sorted(patched / unpatched for unpatched, patched in pairs)
        row: dict[str, Any] = {
            "name": name,
            "tp": size,
            "tokens": ids.numel(),
            "unpatched_seconds": statistics.median(a for a, _ in pairs),
            "patched_seconds": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "pairs": pairs,
            **saturation,
        }
        rows.append(row)
        logger.log(row=name, ratio=row["ratio"], **logged(row))
    if env_rank() == 0:
        where = "loopback" if config.rate is None else f"links of {config.rate}"
        title = f"{config.model}, {config.engine}, tp={size}, {ids.numel()} tokens, {config.dtype}, {where}"
        print_rows(rows, title)
        print_saturation(rows)
    return {"rows": rows}


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    cells = []
    for row in rows:
        low, high = row["ratio_quartiles"]
        milliseconds = (f"{1e3 * row[key]:.1f}" for key in ("unpatched_seconds", "patched_seconds"))
        cells.append((row["name"], *milliseconds, f"{row['ratio']:.3f}", f"{low:.3f} .. {high:.3f}"))
    print_table(("name", "unpatched\n(ms)", "patched\n(ms)", "ratio", "quartiles"), cells, title)


def time_pairs(
    engine: Engine, artifact: Artifact, comm: CommConfig | None, ids: torch.Tensor, repeats: int, name: str
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Measure ((unpatched, patched) seconds of `repeats` pairs, their order alternating; how the plan's ranges held).

    Leaves the engine unpatched.
    """
    engine.apply(artifact, comm)
    patched = patching.replacing_modules(engine.model)
    seconds = {True: 0.0, False: 0.0}
    pairs = []
    numbers = PreemptionCheck().each(range(-3, repeats))
    for number in progress(numbers, repeats + 3, f"timing {name}", env_rank()):
        for with_patch in (True, False) if number % 2 else (False, True):
            engine.remove()
            if with_patch:
                patching.swap(engine.module, patched)
            seconds[with_patch] = _forward_seconds(engine, ids)
        if number >= 0:  # the first three pairs warm up
            pairs.append((seconds[False], seconds[True]))
    engine.remove()
    patching.swap(engine.module, patched)
    saturation = measure_saturation(engine)
    engine.remove()
    return pairs, saturation


@torch.inference_mode()
def _forward_seconds(engine: Engine, ids: torch.Tensor) -> float:
    if engine.group is not None:
        dist.barrier(engine.group)
    start = time.perf_counter()
    engine(input_ids=ids, logits_to_keep=1)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(run_stage("benchmark", sys.argv[1:]))
