"""megatron-lowbit evaluate --ablation: quantize in every way that the QLLM paper compares, and in those that came after
it, and evaluate each.

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
    rotation                R1 to R4, rounded to nearest; neither of the paper's steps in this row and the next three
    +clipping               ... and weights.clipping=mse
    +gptq                   ... and weights.rounding=gptq
    +learned                ... and weights.rotation=learned: weights.preset=best
    +correction             ... and a merged correction
    all                     ... and adaptive reassembly

A row's artifact stays in <output_dir>/ablation/<row>; a row that is there with the same settings is not made again.
Its seconds are those of its making, and of the pass over the evaluation text, in which rotations run online.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import load_windows, round_weights
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.kept import read_kept, write_kept
from megatron_lowbit.launch.qllm import quantize_qllm
from megatron_lowbit.launch.rows import explained, full_precision_row, low_bit_row, quality_cells
from megatron_lowbit.launch.studies.hierarchical import maps_of, quantize_hierarchical
from megatron_lowbit.launch.tables import number, print_table
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.tp_sizes import default_shard_groups, widths_of
from megatron_lowbit.runtime.metrics import MetricLogger

GAMMAS = (0.01, 0.03, 0.05)


class Variant(NamedTuple):
    """What a row that has an artifact is made with; weights: changed keys of weights.*."""

    weights: dict[str, Any]
    reassembly: ReassemblyConfig
    correction: CorrectionConfig


def run_ablation(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    if config.weights.scheme == "none":
        raise LowBitError("--ablation compares ways to quantize: set weights.scheme to W4A4, W4A8 or W6A6")
    if config.artifact is not None or config.engine != "huggingface" or config.virtual_tp > 1:
        raise LowBitError(
            "--ablation makes its own artifacts in one process; leave artifact, engine and virtual_tp out"
        )
    if config.weights.lm_head_bits:
        raise LowBitError("--ablation compares what becomes of the blocks; leave weights.lm_head_bits out")
    if config.weights.preset == "best":
        raise LowBitError(
            "--ablation has a row for weights.preset=best, +learned; leave weights.preset out, or set it to qllm"
        )
    engine = start_engine(config)
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    calibration = load_windows(engine, config.calibration, "calibration", logger)
    text = hashlib.sha256(calibration.ids.numpy().tobytes()).hexdigest()
    row, reference = full_precision_row(engine, windows, config.evaluation, logger)
    rows = [{**row, "name": "full"}]
    weights = deployed_weights(config, engine)
    for name, shard_groups in (("rtn", 1), ("rtn_grouped", weights.shard_groups)):
        began = time.perf_counter()
        checkpoint = round_weights(
            engine.model, weights.model_copy(update={"shard_groups": shard_groups}), None, config.seed
        )
        took = time.perf_counter() - began
        rows.append(artifact_row(engine, name, checkpoint, took, windows, config, reference, logger))
        engine.remove()
    for name, variant in variants(config).items():
        logger.labels = {"variant": name}
        folder = Path(config.output_dir) / "ablation" / name
        hierarchical = name == "adaptive_hierarchical"
        quantize = quantize_hierarchical if hierarchical else partial(quantize_qllm, plans=False)
        checkpoint, seconds = quantized(config, weights, variant, folder, text, partial(quantize, logger=logger))
        with maps_of(folder, decoder_blocks(engine.model)[1]) if hierarchical else nullcontext():
            rows.append(artifact_row(engine, name, checkpoint, seconds, windows, config, reference, logger))
    logger.labels = {}
    print_ablation(rows, f"{config.model}, {config.weights.scheme}" + _injected(config))
    return {"rows": rows}


def variants(config: EvaluateConfig) -> dict[str, Variant]:
    """Return {row: the given settings with what the row is about}."""
    none, merged, branch = (
        config.correction.model_copy(update={"mode": mode}) for mode in ("none", "merged", "branch")
    )
    base = config.reassembly
    adaptive = base.model_copy(update={"mode": "adaptive", "merge": True})
    whole = base.model_copy(update={"mode": "none"})
    rotated = {"rotation": "hadamard", "clipping": "none", "rounding": "nearest"}
    clipped = {**rotated, "clipping": "mse"}
    gptq = {**clipped, "rounding": "gptq"}
    best = {**gptq, "rotation": "learned"}
    rows: dict[str, Variant] = {}
    for name, merge in (("disassembly", False), ("reassembly", True)):
        for gamma in GAMMAS:
            fixed = base.model_copy(update={"mode": "fixed", "expansion": gamma, "merge": merge})
            rows[f"{name}_{gamma:.2f}"] = Variant({}, fixed, none)
    return rows | {
        "adaptive": Variant({}, adaptive, none),
        "correction": Variant({}, whole, merged),
        "adaptive_correction": Variant({}, adaptive, merged),
        "adaptive_branch": Variant({}, adaptive, branch),
        "adaptive_hierarchical": Variant({}, adaptive, merged),
        "rotation": Variant(rotated, whole, none),
        "+clipping": Variant(clipped, whole, none),
        "+gptq": Variant(gptq, whole, none),
        "+learned": Variant(best, whole, none),
        "+correction": Variant(best, whole, merged),
        "all": Variant(best, adaptive, merged),
    }


def deployed_weights(config: EvaluateConfig, engine: Engine) -> WeightsConfig:
    """Return weights.*, with quantized attention (the paper's W4A4 includes it) unless it is set to false, and with
    the number of shard groups that the model gets."""
    quantizes = Scheme.parse(config.weights.scheme).act_bits < 16
    wanted = quantizes if config.weights.attention is None else config.weights.attention
    widths = widths_of(linear for _, linear in find_linears(engine.model).values())
    groups = config.weights.shard_groups or default_shard_groups(engine.text_config, widths)
    return config.weights.model_copy(update={"method": "qllm", "attention": wanted, "shard_groups": groups})


def quantized(
    config: EvaluateConfig,
    weights: WeightsConfig,
    variant: Variant,
    folder: Path,
    text: str,
    quantize: Callable[[QuantizeConfig], Any],
) -> tuple[LowBitCheckpoint, float]:
    """Return a row's artifact, and the seconds of its making."""
    shared = {name: getattr(config, name) for name in ("model", "dtype", "seed", "inject_outliers", "inject_at")}
    settings = QuantizeConfig(
        **shared,
        output_dir=str(folder),
        calibration=config.calibration,
        weights=weights.model_copy(update=variant.weights),
        reassembly=variant.reassembly,
        correction=variant.correction,
    )
    done, wanted = folder / "row.json", {**settings.model_dump(mode="json"), "text": text}
    found = read_kept(done, wanted) if (folder / "lowbit.json").exists() else None
    if found is None:
        done.unlink(missing_ok=True)
        began = time.perf_counter()
        quantize(settings)
        found = write_kept(done, wanted, {"seconds": time.perf_counter() - began})
    return LowBitCheckpoint.load(folder), found["seconds"]


def artifact_row(
    engine: Engine,
    name: str,
    checkpoint: LowBitCheckpoint,
    seconds: float,
    windows: Any,
    config: EvaluateConfig,
    reference: Any,
    logger: MetricLogger,
) -> dict[str, Any]:
    row = low_bit_row(engine, name, Artifact(checkpoint), CommConfig(), windows, config.evaluation, reference, logger)
    about = {"injected": config.inject_outliers, "linear_bytes": checkpoint.linear_bytes()}
    return {**row, **about, "quantize_seconds": seconds}


def print_ablation(rows: list[dict[str, Any]], title: str) -> None:
    """Print the rows: how good they are, and the seconds that they take."""
    quality = ("perplex-\nity", "s.e.\n(%)", "KL\n(nats)", "s.e.\n(nats)")
    cells = [
        (
            row["name"],
            *quality_cells(row),
            number(row["sqnr_db"], ".1f"),
            number(row.get("quantize_seconds"), ".0f"),
            number(row["evaluate_seconds"], ".1f"),
        )
        for row in rows
    ]
    columns = ("name", *quality, "SQNR\n(dB)", "quan-\ntize (s)", "evalu-\nate (s)")
    print_table(columns, cells, title, explained(rows))


def _injected(config: EvaluateConfig) -> str:
    if config.inject_outliers is None:
        return ""
    return f", injected outliers {config.inject_outliers:g}x at {', '.join(config.inject_at)}"
