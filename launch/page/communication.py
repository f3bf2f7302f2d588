"""Section of the low-bit communication (arXiv 2411.07942): ranges, bits per feature, saturation.

A heat map of a large model has more features than a picture has points, so neighbouring features share a cell, which
shows the widest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.comm.plan import CommPlan, FeatureRange
from megatron_lowbit.launch.page import plots
from megatron_lowbit.launch.page.figure import Figure, Section
from megatron_lowbit.launch.page.quality import by_site, short_sites
from megatron_lowbit.launch.page.runs import Run, figure_of, numbers_of

CELLS = 24_000  # of all heat maps of one kind on a page
COLUMNS = 96  # cells of a row, at most
BF16 = 16  # a plan's bits of a feature that stays in bf16


def section(runs: Sequence[Run]) -> Section | None:
    figures: list[Figure] = []
    with_plans = [run for run in runs if run.stats or run.plans]
    for number, run in enumerate(with_plans):
        of = f" ({run.name})" if len(runs) > 1 else ""
        figures += _ranges(run, of, number, CELLS // len(with_plans))
        figures += _bits(run, of, number, CELLS // len(with_plans))
    figures += _saturation(runs)
    return Section("Communication", figures) if figures else None


def _ranges(run: Run, of: str, number: int, budget: int) -> list[Figure]:
    """Return the width of every feature's range on every rank, for the largest tensor-parallel size."""
    size = max(run.stats.ranges, default=1) if run.stats else 1
    if run.stats is None or size == 1:
        return []
    sites = run.stats.ranges[size]
    names = short_sites(list(sites))
    widths = [_widths(r) for r in sites.values()]
    rows = [(f"{name} rank {rank}", row) for name, w in zip(names, widths, strict=True) for rank, row in enumerate(w)]
    cells, shared = _cells([row for _, row in rows], budget)
    table = [[name, *map(_rounded, row)] for (name, _), row in zip(rows, cells, strict=True)]
    says = (
        f"The width of each feature's calibrated range, a row for each of a site's {size} ranks. A bright column is a "
        "feature that is wide on every rank: in few bits such features lose most, so plans give them more. "
        f"{_cell_note(shared)}"
    )
    columns = ["site and rank", *(str(place * shared) for place in range(len(cells[0])))]
    x_label = "feature" if shared == 1 else f"feature / {shared}"
    beside = [name if rank == 0 else "" for name in names for rank in range(size)]
    picture = partial(plots.heat_map, f"r{number}", beside, cells, x_label, "width of the range", log=True)
    summary = []
    for tp_size, by_site_ in sorted(run.stats.ranges.items()):
        for site, r in by_site_.items() if tp_size > 1 else ():
            total = _widths(r).sum(0)
            summary.append([tp_size, site, len(total), total.max().item(), total.median().item()])
    about = (
        "The aggregated range of a feature is the sum of its widths over the ranks, by which the plan ranks features."
    )
    heading = ["tp_size", "site", "features", "widest", "median"]
    return [
        Figure(f"Feature ranges by site and rank, tp_size {size}{of}", says, columns, table, picture),
        Figure(f"Aggregated ranges{of}", about, heading, summary),
    ]


def _widths(r: FeatureRange) -> Tensor:
    """Return max - min, float32 [tp_size, features]."""
    return r.max_vals - r.min_vals


def _bits(run: Run, of: str, number: int, budget: int) -> list[Figure]:
    """Return how many features have how many bits, and which the widest formats are given to, by the largest plan."""
    if not run.plans:
        return []
    size = max(run.plans)
    plan = run.plans[size]
    sites = short_sites(list(plan.sites))
    used = sorted({int(b) for site in plan.sites.values() for b in site.first.bits.unique()})
    counts = [[int((site.first.bits == b).sum()) for b in used] for site in plan.sites.values()]
    shares = {_format(b): [100 * row[place] / sum(row) for row in counts] for place, b in enumerate(used)}
    table = []
    for tp_size, other in sorted(run.plans.items()):
        for name, site in other.sites.items():
            bits = site.first.bits
            table.append(
                [tp_size, name, len(bits), _mean_bits(other, name), int((bits == BF16).sum())]
                + [int((bits == b).sum()) for b in used]
            )
    says = (
        f"Which share of each site's features travels in how many bits, by the plan for {size} ranks "
        f"({plan.label}). Wide features are given more bits, so that the many others can have few."
    )
    columns = ["tp_size", "site", "features", "mean bits", "bf16 features", *(f"in {_format(b)}" for b in used)]
    picture = partial(plots.bars, f"f{number}", sites, shares, "share of the features (%)", True)
    figures = [Figure(f"Bits per feature, tp_size {size}{of}", says, columns, table, picture)]
    chosen, highest = [site.first.bits.float() for site in plan.sites.values()], max(used)
    if len(used) > 1:
        cells, shared = _cells(chosen, budget)
        what = "bf16 features" if highest == BF16 else f"features in {highest} bits"
        says = (
            f"The widest format in each place, the same on all ranks. The {what} are where ranges are widest. "
            f"{_cell_note(shared)}"
        )
        rows = [[name, *map(_rounded, row)] for name, row in zip(plan.sites, cells, strict=True)]
        columns = ["site", *(str(place * shared) for place in range(len(cells[0])))]
        x_label = "feature" if shared == 1 else f"feature / {shared}"
        picture = partial(plots.heat_map, f"w{number}", sites, cells, x_label, "bits (16: bf16)", ticks=used)
        figures.append(Figure(f"Features chosen for wide formats, tp_size {size}{of}", says, columns, rows, picture))
        index = [
            [name, ", ".join(map(str, (site.first.bits == highest).nonzero().flatten()[:LISTED].tolist()))]
            for name, site in plan.sites.items()
        ]
        about = f"The indices of the {what} of each site, {LISTED} at most."
        figures.append(Figure(f"The {what}{of}", about, ["site", "features"], index))
    return figures


LISTED = 64  # indices of chosen features in a cell


def _mean_bits(plan: CommPlan, name: str) -> float:
    return plan.sites[name].first.bits.float().mean().item()


def _format(bits: int) -> str:
    return "bf16" if bits == BF16 else f"{bits} bits"


def _saturation(runs: Sequence[Run]) -> list[Figure]:
    """Return how many values lay beyond their range, and what fell back to bf16."""
    rows = [
        (run.name, str(row.get("name", stage)), row)
        for run in runs
        for stage, row in run.rows()
        if figure_of(row, "values")
    ]
    if not rows:
        return []
    table = []
    for run, name, row in rows:
        fallen = row.get("bf16_sites")
        counts: list[Any] = [figure_of(row, key) for key in ("values", "saturated", "saturated_share")]
        sites = ", ".join(map(str, fallen)) if isinstance(fallen, list) else ""
        table.append([run, name, *counts, figure_of(row, "nonfinite_tokens"), sites or "none"])
    columns = ["run", "name", "values", "saturated", "saturated_share", "nonfinite_tokens", "fell back to bf16"]
    says = (
        "Values beyond their calibrated range are cut off. A site where many are falls back to bf16. Then the "
        "text is unlike the calibration text, and calibrating on such text helps."
    )
    by = [(run, name, row) for run, name, row in rows if numbers_of(row, "saturated_sites")]
    percent = [
        (run, name, {"percent": {s: 100 * v for s, v in numbers_of(row, "saturated_sites").items()}})
        for run, name, row in by
    ]
    return [
        Figure("Saturation and fall-backs", says, columns, table),
        *by_site("Saturation by site", says, "values beyond range (%)", "percent", percent, len(runs) > 1),
    ]


def _cells(rows: list[Tensor], budget: int) -> tuple[list[list[float]], int]:
    """Return the rows with neighbouring features merged to their largest, and how many share a cell.

    budget: cells of the whole map; rows of different widths are filled up with their smallest value.
    """
    widest = max(len(row) for row in rows)
    columns = max(1, min(COLUMNS, budget // len(rows)))
    shared = ceil(widest / columns)
    cells = []
    for row in rows:
        padded = torch.nn.functional.pad(row.float(), (0, -len(row) % shared), value=row.min().item())
        merged = padded.view(-1, shared).amax(1)
        missing = ceil(widest / shared) - len(merged)
        cells.append(torch.nn.functional.pad(merged, (0, missing), value=row.min().item()).tolist())
    return cells, shared


def _cell_note(shared: int) -> str:
    return "" if shared == 1 else f"A cell shows the widest of {shared} neighbouring features."


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
