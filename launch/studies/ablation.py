"""megatron-lowbit evaluate --ablation: quantize in every way that the QLLM paper compares, and evaluate each.

    full                    full precision
    rtn                     round to nearest as the paper does it: one activation scale per token
    rtn_grouped             with weights.shard_groups scales on row-parallel inputs, as all rows below
    disassembly_<gamma>     outlier channels split, gamma of the width added          tables 2 and D
    reassembly_<gamma>      ... and as many channels merged                           table 2
    adaptive                the expansion with the smallest error of the block's output
    correction              low-rank correction alone                                 table F
    adaptive_correction     both, merged into the weights
    adaptive_branch         both, the correction beside the weights                   table K
    adaptive_hierarchical   adaptive_correction with a low-rank map over every group  hierarchical.py; not deployable

A row's artifact stays in <output_dir>/ablation/<row>; a row that is there with the same settings is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lowbit.adapters.huggingface.apply import decoder_blocks, find_linears
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import (
    CommConfig,
    CorrectionConfig,
    EvaluateConfig,
    LowBitError,
    QuantizeConfig,
    ReassemblyConfig,
    WeightsConfig,
)
from megatron_lowbit.io.files import read_json, write_json
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import load_windows, round_weights
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.qllm import quantize_qllm
from megatron_lowbit.launch.rows import full_precision_row, low_bit_row, print_rows
from megatron_lowbit.launch.studies.hierarchical import maps_of, quantize_hierarchical
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.tp_sizes import default_shard_groups, widths_of
from megatron_lowbit.runtime.metrics import MetricLogger

GAMMAS = (0.01, 0.03, 0.05)
_UNUSED = {
    "weights": {"lm_head_bits", "budget"}
}  # refused here, so that a row's settings are what they were before there was one


def run_ablation(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.weights.scheme == "none":
        raise LowBitError("--ablation compares ways to quantize: set weights.scheme to W4A4, W4A8 or W6A6")
    if config.artifact is not None or config.engine != "huggingface" or config.virtual_tp > 1:
        raise LowBitError(
            "--ablation makes its own artifacts in one process; leave artifact, engine and virtual_tp out"
        )
    if config.weights.lm_head_bits:
        raise LowBitError("--ablation compares what becomes of the blocks; leave weights.lm_head_bits out")
    engine = start_engine(config)
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    calibration = load_windows(engine, config.calibration, "calibration", logger)
    text = hashlib.sha256(calibration.ids.numpy().tobytes()).hexdigest()
    row, reference = full_precision_row(engine, windows, config.evaluation, logger)
    rows = [{**row, "name": "full"}]
    weights = _weights(config, engine)
    for name, shard_groups in (("rtn", 1), ("rtn_grouped", weights.shard_groups)):
        checkpoint = round_weights(
            engine.model, weights.model_copy(update={"shard_groups": shard_groups}), None, config.seed
        )
        rows.append(_row(engine, name, checkpoint, windows, config, reference, logger))
        engine.remove()
    for name, (reassembly, correction) in variants(config).items():
        logger.labels = {"variant": name}
        folder = Path(config.output_dir) / "ablation" / name
        hierarchical = name == "adaptive_hierarchical"
        quantize = quantize_hierarchical if hierarchical else partial(quantize_qllm, plans=False)
        checkpoint = _quantized(config, weights, reassembly, correction, folder, text, partial(quantize, logger=logger))
        with maps_of(folder, decoder_blocks(engine.model)[1]) if hierarchical else nullcontext():
            rows.append(_row(engine, name, checkpoint, windows, config, reference, logger))
    logger.labels = {}
    print_rows(rows, f"{config.model}, {config.weights.scheme}" + _injected(config))
    return {"rows": rows}


def variants(config: EvaluateConfig) -> dict[str, tuple[ReassemblyConfig, CorrectionConfig]]:
    """Return {row: (reassembly, correction)}, the given settings with what the row is about."""
    none, merged, branch = (
        config.correction.model_copy(update={"mode": mode}) for mode in ("none", "merged", "branch")
    )
    base = config.reassembly
    adaptive = base.model_copy(update={"mode": "adaptive", "merge": True})
    rows = {}
    for name, merge in (("disassembly", False), ("reassembly", True)):
        for gamma in GAMMAS:
            fixed = base.model_copy(update={"mode": "fixed", "expansion": gamma, "merge": merge})
            rows[f"{name}_{gamma:.2f}"] = (fixed, none)
    return rows | {
        "adaptive": (adaptive, none),
        "correction": (base.model_copy(update={"mode": "none"}), merged),
        "adaptive_correction": (adaptive, merged),
        "adaptive_branch": (adaptive, branch),
        "adaptive_hierarchical": (adaptive, merged),
    }


def _weights(config: EvaluateConfig, engine: Engine) -> WeightsConfig:
    """Return weights.*, with quantized attention (the paper's W4A4 includes it) unless it is set to false, and with
    the number of shard groups that the model gets."""
    quantizes = Scheme.parse(config.weights.scheme).act_bits < 16
    wanted = quantizes if config.weights.attention is None else config.weights.attention
    widths = widths_of(linear for _, linear in find_linears(engine.model).values())
    groups = config.weights.shard_groups or default_shard_groups(engine.text_config, widths)
    return config.weights.model_copy(update={"method": "qllm", "attention": wanted, "shard_groups": groups})


def _quantized(
    config: EvaluateConfig,
    weights: WeightsConfig,
    reassembly: ReassemblyConfig,
    correction: CorrectionConfig,
    folder: Path,
    text: str,
    quantize: Callable[[QuantizeConfig], Any],
) -> LowBitCheckpoint:
    shared = {name: getattr(config, name) for name in ("model", "dtype", "seed", "inject_outliers", "inject_at")}
    settings = QuantizeConfig(
        **shared,
        output_dir=str(folder),
        calibration=config.calibration,
        weights=weights,
        reassembly=reassembly,
        correction=correction,
    )
    done = folder / "row.json"
    wanted = json.loads(json.dumps({"settings": settings.model_dump(mode="json", exclude=_UNUSED), "text": text}))
    del wanted["settings"]["rotation"]  # of learned rotations, which the rows that only round refuse
    if weights.rotation == "none":
        del wanted["settings"]["weights"]["rotation"]  # as before there was one
    if not ((folder / "lowbit.json").exists() and _is(done, wanted)):
        done.unlink(missing_ok=True)
        quantize(settings)
        write_json(done, wanted)
    return LowBitCheckpoint.load(folder)


def _is(file: Path, wanted: dict[str, Any]) -> bool:
    """Return whether the file holds this; one that is damaged is as if it were not there."""
    try:
        return file.exists() and read_json(file) == wanted
    except LowBitError:
        return False


def _row(
    engine: Engine,
    name: str,
    checkpoint: LowBitCheckpoint,
    windows: Any,
    config: EvaluateConfig,
    reference: Any,
    logger: MetricLogger,
) -> dict[str, Any]:
    row = low_bit_row(engine, name, Artifact(checkpoint), CommConfig(), windows, config.evaluation, reference, logger)
    return {**row, "injected": config.inject_outliers, "linear_bytes": checkpoint.linear_bytes()}


def _injected(config: EvaluateConfig) -> str:
    if config.inject_outliers is None:
        return ""
    return f", injected outliers {config.inject_outliers:g}x at {', '.join(config.inject_at)}"
