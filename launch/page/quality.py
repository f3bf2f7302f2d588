"""Section of how good the models are: perplexity, KL and accuracy with standard errors, against bits; SQNR by site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_lowbit.launch.page import plots
from megatron_lowbit.launch.page.figure import Figure, Section
from megatron_lowbit.launch.page.runs import Run, figure_of, numbers_of

MEASURES = {
    "perplexity": "perplexity (lower is better)",
    "kl": "KL in nats per token (lower is better)",
    "accuracy": "accuracy (higher is better)",
}
TITLES = {"perplexity": "Perplexity", "kl": "KL divergence", "accuracy": "Accuracy"}
BITS = {"bits_per_value": "bits on the wire per value", "bytes_per_token": "bytes on the wire per token"}
LINES = 6  # series of a line plot; more are a heat map

Named = list[tuple[str, str, dict[str, Any]]]  # (run, row's name, row)


def section(runs: Sequence[Run]) -> Section | None:
    rows = _rows(runs)
    figures = [
        *_measures(rows, len(runs) > 1),
        *_tasks(rows),
        *_against_bits(rows, len(runs) > 1),
        *_sites(rows, len(runs) > 1),
    ]
    return Section("Quality", figures) if figures else None


def labels(rows: Named, several: bool) -> list[str]:
    """Return what a picture calls each row: with its run, where there are several."""
    return [f"{run}: {name}" if several else name for run, name, _ in rows]


def _rows(runs: Sequence[Run]) -> Named:
    """Return the rows that have measured a model; those of one name at several numbers of ranks are told apart."""
    rows = [
        (run.name, str(row.get("name", stage)), row)
        for run in runs
        for stage, row in run.rows()
        if any(figure_of(row, measure) is not None for measure in MEASURES) or numbers_of(row, "sites")
    ]
    sizes: dict[tuple[str, str], set[float | None]] = {}
    for run_name, name, row in rows:
        sizes.setdefault((run_name, name), set()).add(figure_of(row, "tp"))
    return [
        (run_name, f"{name}, TP {row['tp']}" if "tp" in row and len(sizes[run_name, name]) > 1 else name, row)
        for run_name, name, row in rows
    ]


def _measures(rows: Named, several: bool) -> list[Figure]:
    """Return a figure for each measure that some row has: the values with their standard errors."""
    figures = []
    beside = {"perplexity": ["tokens", "sqnr_db", *BITS], "accuracy": ["accuracy_kept_percent"]}
    for measure, label in MEASURES.items():
        having = [item for item in rows if figure_of(item[2], measure) is not None]
        if not having:
            continue
        values = [figure_of(row, measure) or 0.0 for _, _, row in having]
        errors = [figure_of(row, f"{measure}_stderr") or 0.0 for _, _, row in having]
        columns = ["run", "name", measure, f"{measure}_stderr", *beside.get(measure, [])]
        table = [[run, name, *(figure_of(row, key) for key in columns[2:])] for run, name, row in having]
        says = (
            "Each point is one way to run the model; the bar is its standard error over the windows of text. "
            "Where bars overlap, a difference may be chance."
        )
        picture = partial(plots.points, f"m{measure}", labels(having, several), values, errors, label)
        figures.append(Figure(TITLES[measure], says, columns, table, picture))
    return figures


def _tasks(rows: Named) -> list[Figure]:
    """Return the accuracy of every task."""
    table = [
        [run, name, task, *(figure_of(found, key) for key in ("accuracy", "stderr", "n"))]
        for run, name, row in rows
        if isinstance(row.get("tasks"), dict)
        for task, found in row["tasks"].items()
        if isinstance(found, dict)
    ]
    says = "The share of questions of each task that are answered right, with its standard error, and their number."
    columns = ["run", "name", "task", "accuracy", "stderr", "questions"]
    return [Figure("Accuracy by task", says, columns, table)] if table else []


def _against_bits(rows: Named, several: bool) -> list[Figure]:
    """Return quality against what travels, of rows that have both."""
    figures = []
    for measure, label in MEASURES.items():
        for bits, bits_label in BITS.items():
            having = [item for item in rows if None not in (figure_of(item[2], measure), figure_of(item[2], bits))]
            if len({figure_of(row, bits) for _, _, row in having}) < 2:
                continue  # there is nothing to compare
            names = labels(having, several)
            series = {
                name: ([figure_of(row, bits) or 0.0], [figure_of(row, measure) or 0.0])
                for name, (_, _, row) in zip(names, having, strict=True)
            }
            table = [[run, name, figure_of(row, bits), figure_of(row, measure)] for run, name, row in having]
            says = "Further left is less to send; the best ways are on the edge towards few bits and good quality."
            number = f"b{measure}{bits}"
            picture = partial(plots.lines, number, series, bits_label, label, log_x=True, joined=False)
            title = f"{TITLES[measure]} against {bits_label}"
            figures.append(Figure(title, says, ["run", "name", bits, measure], table, picture))
            break  # bytes follow from bits
    return figures


def _sites(rows: Named, several: bool) -> list[Figure]:
    """Return the SQNR of every row-parallel linear's output."""
    having = [(run, name, row) for run, name, row in rows if numbers_of(row, "sites")]
    says = (
        "How far each row-parallel linear's output lies above its own error, in decibels: 20 dB is an error of a tenth "
        "of the signal. The lowest sites limit the whole model."
    )
    return by_site("SQNR by site", says, "SQNR (dB)", "sites", having, several)


def by_site(title: str, says: str, label: str, key: str, rows: Named, several: bool) -> list[Figure]:
    """Return a figure of one number per site and row: lines, or a heat map where there are many rows."""
    if not rows:
        return []
    sites = list(dict.fromkeys(site for _, _, row in rows for site in numbers_of(row, key)))
    table = [[run, name, site, value] for run, name, row in rows for site, value in numbers_of(row, key).items()]
    names = labels(rows, several)
    picture: Callable[[], str]
    if len(rows) <= LINES:
        series = {
            name: ([sites.index(site) for site in numbers_of(row, key)], [*numbers_of(row, key).values()])
            for name, (_, _, row) in zip(names, rows, strict=True)
        }
        picture = partial(plots.lines, f"s{key}", series, "", label, names=short_sites(sites))
    else:
        cells = [[numbers_of(row, key).get(site, float("nan")) for site in sites] for _, _, row in rows]
        picture = partial(plots.heat_map, f"s{key}", names, cells, "site, in the order of the model", label)
    return [Figure(title, says, ["run", "name", "site", label], table, picture)]


def short_sites(sites: Sequence[str]) -> list[str]:
    """Return names without what they begin with alike: 0.self_attn.o_proj of model.layers.0.self_attn.o_proj."""
    split = [site.split(".") for site in sites]
    shared = 0
    while len(sites) > 1 and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
