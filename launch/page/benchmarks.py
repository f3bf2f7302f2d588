"""Section of the benchmarks: each kind's table, with what the machine could do at best where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_lowbit.launch.bench.collectives_rank import size_text
from megatron_lowbit.launch.page import plots
from megatron_lowbit.launch.page.figure import Figure, Section
from megatron_lowbit.launch.page.quality import LINES
from megatron_lowbit.launch.page.runs import Run, figure_of


class Kind(NamedTuple):
    """A kind of benchmark: the keys that all its rows have, the columns of its table, and what one sees."""

    has: str
    columns: str
    says: str


KINDS = {
    "All-reduce": Kind(
        "algorithm ranks",
        "algorithm ranks bytes rate mode seconds ideal_seconds bits_per_value link_bytes sqnr_db",
        "Seconds of one all-reduce by the size of the tensor. A dashed line is what the link allows for the bytes of "
        "that way, and is drawn where the rate of the link is known: no way can be faster than its own.",
    ),
    "Linears": Kind(
        "way tokens outputs",
        "outputs inputs tokens threads way median_seconds ratio packed_ratio gops peak_share gb_per_second",
        "Each way's speed beside the roofline of this machine: a dashed line is the highest rate of its instructions. "
        "Points to the right do more arithmetic per byte of weights; far below the line there is room for improvement.",
    ),
    "Kernels": Kind(
        "format op median_seconds",
        "format op ranks bytes copy_share clone_share eager_speedup compile_speedup",
        "How near each kernel comes to a plain copy of the same bytes (copy_share 1 is as fast as memory allows), and "
        "how much faster it is than the same in eager and compiled PyTorch.",
    ),
    "Models": Kind(
        "what bf16 quantized",
        "model what tokens bf16 quantized ratio rotation_share",
        "The quantized model beside the same in bf16: tokens per second where higher is better, bytes where lower is.",
    ),
    "Patched against unpatched": Kind(
        "ratio_quartiles patched_seconds",
        "name tp tokens unpatched_seconds patched_seconds ratio",
        "Seconds to the first token with and without the patch, in pairs; a ratio below 1 is a gain.",
    ),
    "GPU checks and times": Kind(
        "section name",
        "section name tokens way seconds speedup right",
        "Each kernel checked against its reference on the GPU, and its seconds against cuBLAS in bf16.",
    ),
}


def section(runs: Sequence[Run]) -> Section | None:
    figures: list[Figure] = []
    rows = [(run, row) for run in runs for stage, row in run.rows() if stage == "benchmark"]
    for title, kind in KINDS.items():
        mine = [(run, row) for run, row in rows if all(key in row for key in kind.has.split())]
        if not mine:
            continue
        used = [key for key in kind.columns.split() if any(_cell(row.get(key)) is not None for _, row in mine)]
        table = [[run.name, *(_cell(row.get(key)) for key in used)] for run, row in mine]
        if title == "All-reduce":
            figures += _collectives(kind.says, ["run", *used], table, mine, len(runs) > 1)
        elif title == "Linears":
            figures.append(_linears(kind.says, ["run", *used], table, mine, len(runs) > 1))
        else:
            figures.append(Figure(title, kind.says, ["run", *used], table))
    return Section("Benchmarks", figures) if figures else None


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _collectives(
    says: str, columns: list[str], table: list[list[Any]], rows: list[tuple[Run, dict[str, Any]]], several: bool
) -> list[Figure]:
    """Return a picture for every number of ranks: seconds over bytes, the ideal dashed."""
    figures = []
    for ranks in sorted({int(figure_of(row, "ranks") or 0) for _, row in rows}):
        series: dict[str, tuple[list[float], list[float]]] = {}
        ideal: dict[str, tuple[list[float], list[float]]] = {}
        for run, row in rows:
            size, seconds, best = (figure_of(row, key) for key in ("bytes", "seconds", "ideal_seconds"))
            if figure_of(row, "ranks") != ranks or size is None or seconds is None:
                continue
            name = f"{run.name}: {row['algorithm']}" if several else str(row["algorithm"])
            _add(series, name, size, seconds)
            if best is not None:
                _add(ideal, name, size, best)
        mine = [line for line, (_, row) in zip(table, rows, strict=True) if figure_of(row, "ranks") == ranks]
        x, y = "bytes of the bf16 tensor", "seconds (dashed: bytes / rate)" if ideal else "seconds"
        ticks = {size: size_text(int(size)) for sizes, _ in series.values() for size in sizes}
        picture = partial(plots.lines, f"c{ranks}", series, x, y, log_x=True, log_y=True, ideal=ideal, ticks=ticks)
        figures.append(Figure(f"All-reduce over {ranks} ranks", says, columns, mine, picture if series else None))
    return figures


def _linears(
    says: str, columns: list[str], table: list[list[Any]], rows: list[tuple[Run, dict[str, Any]]], several: bool
) -> Figure:
    """Return GOP/s over the arithmetic per byte of weights, and the highest rate of a core as a flat line."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    ideal: dict[str, tuple[list[float], list[float]]] = {}
    for run, row in rows:
        keys = ("gops", "tokens", "outputs", "inputs", "weight_bytes")
        speed, tokens, outputs, inputs, held = (figure_of(row, key) for key in keys)
        if not speed or not tokens or not outputs or not inputs or not held:
            continue
        name = f"{run.name}: {row['way']}" if several else str(row["way"])
        _add(series, name, 2 * tokens * outputs * inputs / held, speed)
        if share := figure_of(row, "peak_share"):
            _add(ideal, name, 2 * tokens * outputs * inputs / held, speed / share)
    series = {name: series[name] for name in list(series)[: 2 * LINES]}
    x, y = "operations per byte of the weight", "GOP/s (dashed: the processor's peak)"
    picture = partial(plots.lines, "k", series, x, y, log_x=True, log_y=True, ideal=ideal, joined=False)
    return Figure("Linears under the roofline", says, columns, table, picture if series else None)


def _add(series: dict[str, tuple[list[float], list[float]]], name: str, x: float, y: float) -> None:
    xs, ys = series.setdefault(name, ([], []))
    xs.append(x)
    ys.append(y)
