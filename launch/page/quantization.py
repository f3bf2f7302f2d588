"""Section of the quantization (QLLM, arXiv 2310.08041): outliers, threshold search, correction, bits of linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megatron_lowbit.launch.page import plots
from megatron_lowbit.launch.page.figure import Figure, Section
from megatron_lowbit.launch.page.quality import LINES, short_sites
from megatron_lowbit.launch.page.runs import Run, dicts_of, figure_of, list_of, numbers_of

CURVES = 12  # layers in the picture of the threshold search: those that it improves most


def section(runs: Sequence[Run]) -> Section | None:
    figures: list[Figure] = []
    for number, run in enumerate(runs):
        of = f" ({run.name})" if len(runs) > 1 else ""
        layers = {name: about for group in _groups(run) for name, about in _layers(group)}
        figures += _outliers(layers, of, number) + _search(layers, of, number) + _bits(run, of, number)
    figures += _losses(runs)
    return Section("Quantization", figures) if figures else None


def _groups(run: Run) -> Iterator[dict[str, Any]]:
    for _, row in run.rows():
        yield from dicts_of(row, "groups")


def _layers(group: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    layers = group.get("layers")
    for name, about in (layers if isinstance(layers, dict) else {}).items():
        if isinstance(about, dict):
            yield name, about


def _outliers(layers: dict[str, dict[str, Any]], of: str, number: int) -> list[Figure]:
    """Return the largest channel of every input before and after reassembly."""
    rows: list[list[Any]] = []
    for name, about in layers.items():
        before, after = list_of(about, "widest_before"), list_of(about, "widest_after")
        if before and after:
            counts = (figure_of(about, key) for key in ("median_before", "splits", "added", "threshold", "error"))
            rows.append([name, before[0], after[0], *counts, str(about.get("chosen"))])
    if not rows:
        return []
    columns = [
        *("input of", "widest before", "widest after", "median before", "largest split", "channels added"),
        *("threshold", "error relative to none", "chosen"),
    ]
    says = (
        "The largest magnitude of any channel of each input, before and after outlier channels are split. The step of "
        "a quantized activation follows the largest channel, so a shorter second bar means finer steps for all."
    )
    groups = {"before": [row[1] for row in rows], "after": [row[2] for row in rows]}
    names = short_sites([str(row[0]) for row in rows])
    picture = partial(plots.bars, f"o{number}", names, groups, "largest |x| of a channel", False)
    return [Figure(f"Outlier channels before and after reassembly{of}", says, columns, rows, picture)]


def _search(layers: dict[str, dict[str, Any]], of: str, number: int) -> list[Figure]:
    """Return the error of every candidate of the threshold search."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, about in layers.items():
        points = about.get("search")
        pairs = [list_of({"": point}, "") for point in points] if isinstance(points, list) else []
        if len(pairs) > 1 and all(len(pair) == 2 for pair in pairs):
            curves[name] = [(added, error) for added, error in pairs]
    if not curves:
        return []
    rows = [[name, added, error] for name, curve in curves.items() for added, error in curve]
    best = sorted(curves, key=lambda name: min(error for _, error in curves[name]))[:CURVES]
    shown = {name: curves[name] for name in curves if name in best}
    names = short_sites(list(shown))
    series = {
        name: ([a for a, _ in curve], [e for _, e in curve]) for name, curve in zip(names, shown.values(), strict=True)
    }
    few = "" if len(curves) <= CURVES else f" The picture shows the {CURVES} inputs that gain most of {len(curves)}."
    says = (
        "The error of a block's output for every number of channels that splitting may add; 1 is the error without "
        f"reassembly, and the lowest point of a line is what was chosen.{few}"
    )
    picture = partial(plots.lines, f"t{number}", series, "channels added (0: no reassembly)", "error relative to none")
    columns = ["input of", "channels added", "error relative to none"]
    return [Figure(f"Threshold search{of}", says, columns, rows, picture)]


def _losses(runs: Sequence[Run]) -> list[Figure]:
    """Return the correction's loss over the epochs, a line per group of blocks."""
    rows, series = [], {}
    for run in runs:
        for group in _groups(run):
            blocks = group.get("blocks")
            name = _blocks_name(blocks) if isinstance(blocks, list) and blocks else "blocks"
            trained, held = list_of(group, "losses"), list_of(group, "held_out_losses")
            if not trained:
                continue
            start = figure_of(group, "loss_before")
            rows.append([run.name, name, 0, None, start])
            for epoch, loss in enumerate(trained):
                rows.append([run.name, name, epoch + 1, loss, held[epoch] if epoch < len(held) else None])
            judged = [start, *held] if held and start else trained
            first = 0 if held and start else 1
            label = f"{run.name}: {name}" if len(runs) > 1 else name
            series[label] = (list(range(first, first + len(judged))), judged)
    if not rows:
        return []
    which = {name: curve for name, curve in list(series.items())[: 2 * LINES]}
    few = "" if len(which) == len(series) else f" The picture shows the first {len(which)} of {len(series)} groups."
    says = (
        "The squared error of each group of blocks against full precision while its low-rank correction is trained, on "
        f"text held out from training; epoch 0 is before it. A line that does not fall gained nothing.{few}"
    )
    columns = ["run", "blocks", "epoch", "loss in training", "held-out loss"]
    picture = partial(plots.lines, "l", which, "epoch", "squared error per token and feature", log_y=True)
    return [Figure("Loss of the low-rank correction", says, columns, rows, picture)]


def _blocks_name(blocks: list[Any]) -> str:
    return f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"


def _bits(run: Run, of: str, number: int) -> list[Figure]:
    """Return the bits of every linear's weights, where they were chosen one by one."""
    figures = []
    for _, row in run.rows():
        about = row.get("weight_bits")
        bits = numbers_of(about, "bits") if isinstance(about, dict) else {}
        if bits:
            says = (
                "The bits of each linear's weights, chosen so that the divergence from full precision is least within "
                "the budget: linears that matter more have more."
            )
            names = short_sites(list(bits))
            series = {"bits": (list(range(len(names))), list(bits.values()))}
            picture = partial(plots.lines, f"q{number}", series, "", "bits of the weights", names=names, joined=False)
            figures.append(
                Figure(f"Bits of the linears{of}", says, ["linear", "bits"], [*map(list, bits.items())], picture)
            )
    return figures
