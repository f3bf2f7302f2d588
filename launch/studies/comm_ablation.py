"""megatron-lowbit evaluate --comm-ablation: send the partial sums in every way we know, and evaluate each.

    full precision                      one rank, nothing is sent
    bf16                                a stock all-reduce of bf16 values
    paper                               static ranges, 1/64 of the features in bf16, one_shot (arXiv 2411.07942)
    paper clipped                       ... with ranges of least squared error (clipping.py)
    paper without bf16                  ... with no feature in bf16
    static adaptive                     ... with bits by feature (bit_allocation.py)
    per-token uniform                   the token's own size is sent
    per-token adaptive                  ... with bits by feature: the default
    per-token adaptive two_shot <b>     ... and the sums travel back in b bits
    exact_sum <b>                       an all-reduce of b-bit integers
    group-32, group-32 two hops         what other systems send: dynamic groups of 32 in Int4 (peers.py)

All ranks are virtual, in one process. One calibration serves all rows, and all are measured on the same windows:
perplexity and its change against full precision, KL, bits per value of all hops together, SQNR of the sites. Rows of
synthetic partial sums follow (synthetic.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lowbit.adapters import patching
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import CommConfig, EvaluateConfig, LowBitError, WeightsConfig
from megatron_lowbit.launch.bench.peers import VirtualGroupInt4
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.engines.prepare import calibrate_engine, load_windows
from megatron_lowbit.launch.engines.start import start_engine
from megatron_lowbit.launch.rows import applied_row, check_unused, explained, full_precision_row
from megatron_lowbit.launch.saturation import print_saturation
from megatron_lowbit.launch.studies.synthetic import MakeReducer, synthetic_rows
from megatron_lowbit.launch.tables import Justify, number, print_table
from megatron_lowbit.runtime.metrics import MetricLogger

# Falling back to bf16 would hide what a row is about.
PAPER = CommConfig(preset="paper", mode="one_shot", drift_threshold=None)
CLIPPED = CommConfig(preset="paper", mode="one_shot", drift_threshold=None, clipping="histogram")
PER_TOKEN = CommConfig(mode="one_shot", drift_threshold=None)
VARIANTS: dict[str, CommConfig | int] = {  # an int: hops of dynamic groups
    "bf16": CommConfig(mode="bf16"),
    "paper": PAPER,
    "paper clipped": CLIPPED,
    "paper without bf16": PAPER.model_copy(update={"bf16_fraction": 0.0}),
    "static adaptive": PAPER.model_copy(update={"allocation": "adaptive"}),
    "per-token uniform": PER_TOKEN.model_copy(update={"allocation": "uniform"}),
    "per-token adaptive": PER_TOKEN,
    **{
        f"per-token adaptive two_shot {bits}": PER_TOKEN.model_copy(update={"mode": "two_shot", "second_bits": bits})
        for bits in (4, 5, 6, 8)
    },
    **{f"exact_sum {bits}": PAPER.model_copy(update={"mode": "exact_sum", "carrier_bits": bits}) for bits in (8, 16)},
    "group-32": 1,
    "group-32 two hops": 2,
}
ON_SYNTHETIC = ("paper", "per-token adaptive", "group-32", "group-32 two hops")


def run_comm_ablation(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    _check(config)
    engine = start_engine(config)
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    ranks = [config.virtual_tp]
    stats = calibrate_engine(engine, config.calibration, ranks, logger, CLIPPED)
    row, reference = full_precision_row(engine, windows, config.evaluation, logger)
    rows = [completed(row, row["perplexity"])]
    for name, make in makers(VARIANTS, stats, config.virtual_tp, config.seed).items():
        apply_reducers(engine, make)
        about = {"weights": "none", "communication": name}
        measured = applied_row(engine, name, about, windows, config.evaluation, reference, logger)
        rows.append(completed(measured, rows[0]["perplexity"]))
    engine.remove()

    def make_synthetic(observed: CalibrationStats) -> dict[str, MakeReducer]:
        chosen = {name: VARIANTS[name] for name in ON_SYNTHETIC}
        return makers(chosen, observed, config.virtual_tp, config.seed)

    for row in synthetic_rows(engine, make_synthetic, windows, config, logger):
        rows.append(completed(row, rows[0]["perplexity"]))
    rows = [{**row, "injected": config.inject_outliers} for row in rows]
    _print(rows, config)
    return {"rows": rows}


def apply_reducers(engine: Engine, make: MakeReducer) -> None:
    """Patch the full-precision engine so that each site's partial sums travel as its reducer has them."""
    engine.apply(Artifact(), "bf16")
    for site, module in patching.row_parallel_modules(engine.model).items():
        module.reducer = make(site)
        module.reducer.set_site(site)


def makers(
    variants: Mapping[str, CommConfig | int], stats: CalibrationStats, tp_size: int, seed: int
) -> dict[str, MakeReducer]:
    """Return {variant: makes the reducer of a site} for tp_size virtual ranks."""
    reducers: dict[str, MakeReducer] = {}
    for name, comm in variants.items():
        if isinstance(comm, int):
            reducers[name] = lambda site, hops=comm: VirtualGroupInt4(hops)  # type: ignore[misc]
            continue
        plans = {}
        if comm.mode != "bf16":
            plans[tp_size] = build_plan(stats, tp_size, comm, seed)
        reducers[name] = patching.Reducers.of(Artifact(None, plans), tp_size, comm).virtual
    return reducers


def _check(config: EvaluateConfig) -> None:
    check_unused(config)
    if config.engine != "huggingface" or config.virtual_tp < 2:
        raise LowBitError(
            f"--comm-ablation simulates its ranks: set engine=huggingface and virtual_tp to 2 or more, "
            f"not engine={config.engine} virtual_tp={config.virtual_tp}"
        )
    for key, given in (
        ("artifact", config.artifact is not None),
        ("weights.*", config.weights != WeightsConfig()),
        ("comm.*", config.comm != CommConfig()),
    ):
        if given:
            raise LowBitError(f"--comm-ablation compares communication of the full-precision model; leave {key} out")


def completed(row: dict[str, Any], perplexity: float) -> dict[str, Any]:
    """Return the row with the worst site and the change against the full-precision perplexity, in percent."""
    sites = row.get("sites") or {}
    worst = min(sites, key=sites.__getitem__, default=None)
    change = None if row["perplexity"] is None else 100 * (row["perplexity"] / perplexity - 1)
    return {
        **row,
        "perplexity_change_percent": change,
        "worst_sqnr_db": None if worst is None else sites[worst],
        "worst_site": worst,
    }


def _print(rows: list[dict[str, Any]], config: EvaluateConfig) -> None:
    injected = "" if config.inject_outliers is None else f", injected outliers {config.inject_outliers:g}x"
    columns = {
        "bits/\nvalue": ("bits_per_value", ".3f"),
        "perplex-\nity": ("perplexity", ".3f"),
        "change\n%": ("perplexity_change_percent", "+.2f"),
        "KL\n(nats)": ("kl", ".5f"),
        "SQNR\n(dB)": ("sqnr_db", ".1f"),
        "worst": ("worst_sqnr_db", ".1f"),
        "un-\nscaled": ("unscaled_sqnr_db", ".1f"),
    }
    cells = [
        (row["name"], *(number(row.get(key), form) for key, form in columns.values()), _short(row["worst_site"]))
        for row in rows
    ]
    named: dict[str, Justify] = {"name": "left", **dict.fromkeys(columns, "right"), "worst\nsite": "left"}
    print_table(named, cells, f"{config.model}, virtual_tp={config.virtual_tp}{injected}", explained(rows))
    print_saturation(rows)


def _short(site: str | None) -> str:
    """Shorten a site's name: model.layers.5.self_attn.o_proj -> 5.o_proj; - for None."""
    if site is None:
        return "-"
    layer, _, rest = site.removeprefix("model.layers.").partition(".")
    return f"{layer}.{rest.rpartition('.')[2]}" if rest else site
