"""megatron-lowbit evaluate --experiment lowbit_comm: the tables of the paper on communication (arXiv 2411.07942), and
our default beside them.

    full precision      nothing is sent in fewer bits
    int4                static ranges, 4 bits for every feature
    random 1/64         ... and any 1/64 of the features in bf16: the paper's control
    hybrid <share>      ... and the share of widest aggregated range in bf16; 1/64 is the paper's choice
    ours                bits by feature and per-token scales, at the bits of hybrid 1/64

All at each of comm.tp_sizes ranks, which are virtual, in one process; with dp copies of the model each scores a share
of the tasks' documents. One calibration serves all rows. A row that is done stays in <output_dir>/lowbit_comm.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megatron_lowbit.adapters.huggingface.apply import check_divides
from megatron_lowbit.config import CommConfig, EvaluateConfig, LowBitError, WeightsConfig
from megatron_lowbit.launch.engines.prepare import calibrate_engine, load_windows
from megatron_lowbit.launch.groups import start_copies
from megatron_lowbit.launch.harness import identity, print_accuracy, suite_of, with_accuracy, with_kept
from megatron_lowbit.launch.kept import file_name, read_kept, write_kept
from megatron_lowbit.launch.rows import applied_row, check_unused, explained, full_precision_row, quality_cells
from megatron_lowbit.launch.studies.comm_ablation import PAPER, PER_TOKEN, apply_reducers, completed, makers
from megatron_lowbit.launch.tables import Justify, number, print_table
from megatron_lowbit.quant.tp_sizes import default_tp_sizes
from megatron_lowbit.runtime.distributed import on_rank_zero
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import MetricLogger

SHARES = {"1/256": 1 / 256, "1/128": 1 / 128, "1/64": 1 / 64, "1/32": 1 / 32, "1/16": 1 / 16}
VARIANTS: dict[str, CommConfig] = {
    "int4": PAPER.model_copy(update={"bf16_fraction": 0.0}),
    "random 1/64": PAPER.model_copy(update={"selection": "random"}),
    **{f"hybrid {name}": PAPER.model_copy(update={"bf16_fraction": share}) for name, share in SHARES.items()},
    "ours": PER_TOKEN,
}


def run(config: EvaluateConfig, logger: MetricLogger) -> dict[str, Any]:
    _check(config)
    suite = suite_of(config, logger)
    engine = start_copies(config)
    sizes = config.comm.tp_sizes or default_tp_sizes(engine.text_config)
    for size in sizes:
        check_divides(engine.text_config, size, "comm.tp_sizes")
    if not sizes:
        raise LowBitError("none of 2 to 8 ranks divide this model's heads and MLP; name a comm.tp_sizes")
    windows = load_windows(engine, config.evaluation, "evaluation", logger)
    calibration = load_windows(engine, config.calibration, "calibration", logger)
    model = identity(engine, config)
    ranges = {"calibration": calibration.digest(), "ema_gamma": config.calibration.ema_gamma}
    shared = {
        "model": model,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "text": windows.digest(),
        "questions": None if suite is None else suite.digests(),
        **ranges,
    }
    folder = Path(config.output_dir) / "lowbit_comm"
    wanted: dict[tuple[int, str], tuple[Path, dict[str, Any]]] = {
        (size, name): (
            folder / f"tp{size}" / f"{file_name(name)}.json",
            {**shared, "tp_size": size, "comm": comm.model_dump(mode="json")},
        )
        for size in sizes
        for name, comm in VARIANTS.items()
    }
    wanted = {(1, "full precision"): (folder / "full.json", shared), **wanted}
    rows = on_rank_zero(lambda: [read_kept(file, settings) for file, settings in wanted.values()])
    found = dict(zip(wanted, rows, strict=True))
    if None in found.values():
        row, reference = full_precision_row(engine, windows, config.evaluation, logger)
        if found[1, "full precision"] is None:
            row = with_accuracy(row, suite, engine, model)
            found[1, "full precision"] = _keep(*wanted[1, "full precision"], completed(row, row["perplexity"]))
        stats = calibrate_engine(engine, config.calibration, [*sizes], logger, PAPER, windows=calibration)
        for size in sizes:
            engine.tp_size = size
            for name, make in makers(VARIANTS, stats, size, config.seed).items():
                if found[size, name] is not None:
                    continue
                logger.labels = {"ranks": size}
                apply_reducers(engine, make)
                about = {"weights": "none", "communication": name}
                row = applied_row(engine, name, about, windows, config.evaluation, reference, logger)
                settings = {"tp_size": size, "comm": VARIANTS[name].model_dump(mode="json"), **ranges}
                row = with_accuracy({**row, "tp": size}, suite, engine, {**model, **settings}, label=f"tp{size} {name}")
                full = found[1, "full precision"]["perplexity"]
                found[size, name] = _keep(*wanted[size, name], completed(row, full))
        logger.labels = {}
        engine.remove()
    rows = with_kept([{**row, "injected": config.inject_outliers} for row in found.values()])
    if env_rank() == 0:
        _print(rows, config)
    return {"rows": rows}


def _keep(file: Path, settings: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return on_rank_zero(partial(write_kept, file, settings, row))


def _check(config: EvaluateConfig) -> None:
    check_unused(config)
    if config.engine != "huggingface" or config.virtual_tp > 1:
        raise LowBitError(
            "--experiment lowbit_comm simulates its ranks in one process: leave engine and virtual_tp out, and name "
            "the numbers of ranks as comm.tp_sizes"
        )
    comm = config.comm.model_copy(update={"tp_sizes": None})
    for key, given in (
        ("artifact", config.artifact is not None),
        ("weights.*", config.weights != WeightsConfig()),
        ("comm.* but comm.tp_sizes", comm != CommConfig()),
    ):
        if given:
            raise LowBitError(
                f"--experiment lowbit_comm compares communication of the full-precision model; leave {key} out"
            )


def _print(rows: list[dict[str, Any]], config: EvaluateConfig) -> None:
    cells = [
        (
            row["name"],
            str(row["tp"]),
            number(row["bits_per_value"], ".3f"),
            *quality_cells(row),
            number(row["perplexity_change_percent"], "+.2f"),
            number(row["sqnr_db"], ".1f"),
            number(None if row.get("accuracy") is None else 100 * row["accuracy"], ".2f"),
            number(row.get("accuracy_kept_percent"), ".1f"),
        )
        for row in rows
    ]
    quality = ("perplex-\nity", "s.e.\n(%)", "KL\n(nats)", "s.e.\n(nats)", "change\n(%)", "SQNR\n(dB)")
    tasks = ("accu-\nracy", "kept\n(%)")
    columns: dict[str, Justify] = {"name": "left", **dict.fromkeys(("tp", "bits", *quality, *tasks), "right")}
    injected = "" if config.inject_outliers is None else f", injected outliers {config.inject_outliers:g}x"
    print_table(columns, cells, f"{config.model}, virtual ranks{injected}", explained(rows))
    print_accuracy([row for row in rows if row["tp"] == 1])
