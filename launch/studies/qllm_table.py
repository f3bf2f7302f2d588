"""megatron-lowbit evaluate --experiment qllm: the tables of QLLM (arXiv 2310.08041), and what measures best.

    full             full precision
    <scheme> rtn     rounded to nearest, one activation scale per token
    <scheme> qllm    weights.preset=qllm: adaptive reassembly and a merged low-rank correction
    <scheme> best    weights.preset=best: learned rotations, clipping and GPTQ

at W6A6, W4A8 and W4A4, or at weights.scheme alone. Keys of correction.* and reassembly.* change the qllm row. A row's
artifact stays in <output_dir>/qllm/<row>, and is not made again for the same settings; neither are finished tasks.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lowbit.config import CorrectionConfig, EvaluateConfig, LowBitError, ReassemblyConfig, WeightsConfig
from megatron_lowbit.config.presets import PRESETS
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import load_windows, round_weights
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.harness import identity, print_accuracy, suite_of, with_accuracy, with_kept
from megatron_lowbit.launch.qllm import quantize_qllm
from megatron_lowbit.launch.rows import full_precision_row
from megatron_lowbit.launch.studies.ablation import Variant, artifact_row, deployed_weights, print_ablation, quantized
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.runtime.metrics import MetricLogger

SCHEMES = ("W6A6", "W4A8", "W4A4")


def run(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    _check(config)
    suite = suite_of(config, logger)
    engine = start_engine(config)
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    calibration = load_windows(engine, config.calibration, "calibration", logger)
    text = calibration.digest()
    model = identity(engine, config)
    row, reference = full_precision_row(engine, windows, config.evaluation, logger)
    rows = [with_accuracy({**row, "name": "full"}, suite, engine, model)]
    for scheme in SCHEMES if config.weights.scheme == "none" else (config.weights.scheme,):
        weights = config.weights.model_copy(update={"scheme": scheme})
        chosen = config.model_copy(update={"weights": weights})
        weights = deployed_weights(chosen, engine)
        for method in ("rtn", "qllm", "best"):
            name = f"{scheme} {method}"
            logger.labels = {"variant": name}
            folder = Path(config.output_dir) / "qllm" / name.replace(" ", "_")
            checkpoint, seconds = _made(method, chosen, weights, engine, folder, text, logger)
            row = artifact_row(engine, name, checkpoint, seconds, windows, chosen, reference, logger)
            settings = chosen.model_dump(mode="json", include={"weights", "reassembly", "correction", "calibration"})
            rows.append(with_accuracy(row, suite, engine, model, {"name": name, "text": text, **settings}))
            engine.remove()
    logger.labels = {}
    rows = with_kept(rows)
    print_ablation(rows, f"{config.model}")
    print_accuracy(rows)
    return {"rows": rows}


def variants(config: EvaluateConfig) -> dict[str, Variant]:
    """Return what the rows with an artifact are made with: qllm as the config has it, best as its preset alone."""
    best = PRESETS["weights"]["best"]
    return {
        "qllm": Variant({}, config.reassembly, config.correction),
        "best": Variant(
            {key: value for key, value in best["weights"].items() if key != "method"},
            ReassemblyConfig(**best["reassembly"]),
            CorrectionConfig(**best["correction"]),
        ),
    }


def _made(
    method: str,
    config: EvaluateConfig,
    weights: WeightsConfig,
    engine: Engine,
    folder: Path,
    text: str,
    logger: MetricLogger,
) -> tuple[LowBitCheckpoint, float]:
    """Return a row's checkpoint, and the seconds of its making."""
    if method == "rtn":
        began = time.perf_counter()
        plain = WeightsConfig(scheme=weights.scheme, attention=weights.attention, shard_groups=1)
        return round_weights(engine.model, plain, None, config.seed), time.perf_counter() - began
    make = partial(quantize_qllm, plans=False, logger=logger)
    return quantized(config, weights, variants(config)[method], folder, text, make)


def _check(config: EvaluateConfig) -> None:
    if config.artifact is not None or config.engine != "huggingface" or config.virtual_tp > 1 or config.dp > 1:
        raise LowBitError(
            "--experiment qllm makes its own artifacts in one process; leave artifact, engine, virtual_tp and dp out"
        )
    if config.weights.preset != "qllm":
        raise LowBitError("--experiment qllm has rows for both presets; leave weights.preset out")
    if config.weights.scheme not in ("none", *SCHEMES):
        raise LowBitError(
            f"--experiment qllm compares W6A6, W4A8 and W4A4; weights.scheme={config.weights.scheme} is none of them"
        )
    if config.weights.lm_head_bits:
        raise LowBitError("--experiment qllm compares what becomes of the blocks; leave weights.lm_head_bits out")
