"""Rows of an evaluation: perplexity, KL divergence, SQNR and bytes on the wire of a model as it is, or patched."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from megatron_lowbit.adapters.patching import site_traffic
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, EvaluateConfig, EvaluationConfig, LowBitError
from megatron_lowbit.io.data import Windows
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.perplexity import measure_perplexity
from megatron_lowbit.launch.saturation import logged, measure_saturation, print_saturation
from megatron_lowbit.launch.tables import number, print_table
from megatron_lowbit.quality import SiteTraffic, measure_sqnr
from megatron_lowbit.runtime.distributed import all_gather_values
from megatron_lowbit.runtime.metrics import MetricLogger

SQNR_TOKENS = 4096  # sites are compared with what they replaced on this many tokens


def check_unused(config: EvaluateConfig) -> None:
    """Raise LowBitError for settings of method qllm, which evaluate itself does not run."""
    if config.weights.method == "qllm":
        raise LowBitError("weights.method=qllm: write an artifact with quantize, then evaluate artifact=FOLDER")
    for section in ("reassembly", "correction"):
        if getattr(config, section) != type(getattr(config, section))():
            raise LowBitError(f"{section}.* has no effect here: it belongs to quantize, and to evaluate --ablation")


def row_name(engine: Engine, artifact: Artifact, mode: CommMode | None) -> str:
    """Return a row's name: W4A8 + hybrid int4/bf16, and the like."""
    weights = artifact.checkpoint.scheme_name if artifact.checkpoint else "full precision"
    return weights if engine.tp_size == 1 else f"{weights} + {communication(engine, artifact, mode)}"


def communication(engine: Engine, artifact: Artifact, mode: CommMode | None) -> str:
    """Return what the partial sums travel as."""
    if engine.tp_size == 1:
        return "none"
    if mode not in ("native", "bf16") and engine.tp_size in artifact.plans:
        label = artifact.plans[engine.tp_size].label
        return label if mode in (None, "one_shot") else f"{mode} {label}"
    return "bf16" if mode == "bf16" else _dtype(engine)


def _dtype(engine: Engine) -> str:
    return str(next(engine.module.parameters()).dtype).removeprefix("torch.")


def full_precision_row(
    engine: Engine, windows: Windows, section: EvaluationConfig, logger: MetricLogger
) -> tuple[dict[str, Any], Tensor]:
    """Measure the unpatched engine with its own all-reduce: (result row, log-probabilities that KL is measured
    against)."""
    engine.remove()
    real_ranks = engine.group is not None
    began = time.perf_counter()
    with SiteTraffic(engine.sites() if real_ranks else {}) as traffic:
        quality = measure_perplexity(engine, windows, section, "full precision")
    seconds, dtype = time.perf_counter() - began, _dtype(engine)
    row: dict[str, Any] = {
        "name": "full precision",
        "tp": engine.tp_size,
        "weights": dtype,
        "communication": dtype if real_ranks else "none",
        "perplexity": quality.perplexity,
        "perplexity_stderr": quality.perplexity_stderr,
        "kl": 0.0,
        "kl_stderr": 0.0,
        **_wire(engine, traffic.bytes, traffic.values, windows, section),
        "sqnr_db": None,
        "tokens": quality.tokens,
        "evaluate_seconds": seconds,
    }
    logger.log(row=row["name"], perplexity=quality.perplexity)
    return row, quality.log_probs


def low_bit_row(
    engine: Engine,
    name: str,
    artifact: Artifact,
    comm: CommConfig,
    windows: Windows,
    section: EvaluationConfig,
    reference: Tensor | None,
    logger: MetricLogger,
) -> dict[str, Any]:
    """Apply the artifact, measure, and leave it applied. kl is None where there is no full-precision reference."""
    engine.apply(artifact, comm)
    about = {
        "weights": artifact.checkpoint.scheme_name if artifact.checkpoint else "none",
        "communication": communication(engine, artifact, comm.mode),
    }
    compared = artifact.checkpoint is None or artifact.checkpoint.rotation is None
    return applied_row(engine, name, about, windows, section, reference, logger, compared)


def applied_row(
    engine: Engine,
    name: str,
    about: dict[str, str],
    windows: Windows,
    section: EvaluationConfig,
    reference: Tensor | None,
    logger: MetricLogger,
    compared: bool = True,
) -> dict[str, Any]:
    """Measure the engine with the low-bit modules that are in place; about: what the row says of them.

    compared: whether sites are to be compared with what they replaced, which those of a rotated model cannot be.
    """
    began = time.perf_counter()
    quality = measure_perplexity(engine, windows, section, name, reference)
    seconds = time.perf_counter() - began
    traffic = site_traffic(engine.model).values()
    wire = _wire(engine, sum(t.bytes for t in traffic), sum(t.values for t in traffic), windows, section)
    saturation = measure_saturation(engine)
    sites: dict[str, float] = {}
    if compared and engine.full_precision:  # or there is nothing to compare with
        batches = sqnr_windows(windows).batches(section.batch_size)
        sites = engine.all_stages(measure_sqnr(engine, engine.site_pairs(), batches))
    mean_sqnr = sum(sites.values()) / len(sites) if sites else None
    row = {
        "name": name,
        "tp": engine.tp_size,
        **about,
        "perplexity": quality.perplexity,
        "perplexity_stderr": quality.perplexity_stderr,
        "kl": quality.kl,
        "kl_stderr": quality.kl_stderr,
        **wire,
        **saturation,
        "sqnr_db": mean_sqnr,
        "tokens": quality.tokens,
        "evaluate_seconds": seconds,
        "sites": sites,
    }
    known = {"kl": quality.kl, "sqnr_db": mean_sqnr, **logged(row)}
    logger.log(row=name, perplexity=quality.perplexity, **{k: value for k, value in known.items() if value is not None})
    if sites:
        logger.table(f"sqnr/{name}", ["site", "sqnr_db"], [*map(list, sites.items())], ("site", "sqnr_db"))
    return row


def sqnr_windows(windows: Windows) -> Windows:
    """Return the first of them, of about SQNR_TOKENS tokens."""
    few = max(1, SQNR_TOKENS // windows.ids.shape[1])
    return Windows(windows.ids[:few], windows.mask[:few])


def print_rows(rows: list[dict[str, Any]], title: str | None = None) -> None:
    quality = ("perplex-\nity", "s.e.\n(%)", "KL\n(nats)", "s.e.\n(nats)")
    columns = ("name", "tp", *quality, "SQNR\n(dB)", "bits/\nvalue", "bytes/\ntoken")
    cells = [
        (
            row["name"],
            str(row["tp"]),
            *quality_cells(row),
            number(row["sqnr_db"], ".1f"),
            number(row["bits_per_value"], ".4f"),
            number(row["bytes_per_token"], ",.0f"),
        )
        for row in rows
    ]
    print_table(columns, cells, title, explained(rows))
    print_saturation(rows)


def quality_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return the cells of perplexity and KL, each with its standard error."""
    return (
        number(row["perplexity"], ".3f"),
        number(_percent(row["perplexity_stderr"], row["perplexity"]), ".1f"),
        number(row["kl"], ".5f"),
        number(row["kl_stderr"], ".1g"),
    )


def _percent(error: float | None, value: float) -> float | None:
    return None if error is None else 100 * error / value


def explained(rows: list[dict[str, Any]]) -> str | None:
    """Return what the columns of errors, of SQNR and of bits and bytes hold, where they hold anything."""
    notes = []
    if all(row["kl"] is None for row in rows):
        notes.append("KL: none without full precision to compare with; model=MODEL beside the artifact adds it.")
    if any(row.get("perplexity_stderr") is not None for row in rows):
        notes.append("s.e.: standard error over the windows.")
    if any(row["sqnr_db"] is not None for row in rows):
        notes.append(f"SQNR: mean of the sites, on the first {SQNR_TOKENS:,} tokens.")
    if any(row["bits_per_value"] is not None for row in rows):
        notes.append(
            "bits/value, bytes/token: what a rank hands over, each message once; in one_shot every one of the other "
            "N - 1 ranks gets a copy."
        )
    return " ".join(notes) or None


def _wire(
    engine: Engine, sent: int, values: int, windows: Windows, section: EvaluationConfig
) -> dict[str, float | None]:
    """Return what one rank handed to torch.distributed at the row-parallel sites; None where nothing is
    communicated."""
    sent, values = (sum(of) for of in zip(*all_gather_values([sent, values], engine.dp_group), strict=True))
    positions = sum(ids.numel() for ids, _ in windows.batches(section.batch_size))
    return {
        "bits_per_value": 8 * sent / values if values else None,
        "bytes_per_token": sent / positions if values else None,
    }
