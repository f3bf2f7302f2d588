"""The pictures of a page: SVG that follows the page's light and dark colours and needs no script.

Matplotlib draws them. One file with four lines of 48 points and a heat map of 48 x 96 takes 4.9 MB with plotly 7.1,
all that a page may have; 1.3 MB with bokeh 3.9; 0.9 MB with altair 6.3; and 0.08 MB with matplotlib 3.11. The first
three are drawn by a script when the page is opened, bokeh's onto a canvas, which screen readers and style sheets do not
see. All have free licences (MIT, BSD, BSD, PSF's), are kept up, and work offline. Matplotlib's SVG has text as text,
takes its colours from the page, prints, and is what `megatron-lowbit[report]` installs anyway.

A colour is drawn as a placeholder that no one else uses, and then replaced by a variable of the page's style sheet:
--ink for text and axes, --c0 ... --c5 for series, which differ in their markers too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

INK, GRID, PAPER = "#010203", "#010204", "#010205"
SERIES = [f"#01021{number}" for number in range(6)]
MARKERS = "os^DvP"
DASHES = ("-", "--", ":")
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    **{color: f"var(--c{i})" for i, color in enumerate(SERIES)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}
WIDTH = 7.2  # inches of a picture; the page scales it
ROW = 0.2  # inches of a row of text
LONGEST = 40  # characters of a name
TICKS = 32  # names beside a picture, at most
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {name: (x, y)}


def draw(number: str, size: tuple[float, float], fill: Callable[[Any], None]) -> str:
    """Return a picture as an SVG element.

    number: makes the names inside unique on the page. size: inches. fill(axes): what draws.
    """
    matplotlib = import_module("matplotlib")
    figures = import_module("matplotlib.figure")
    style = import_module("matplotlib.style")
    with style.context("default"), matplotlib.rc_context({**_STYLE, "svg.hashsalt": number}):
        figure = figures.Figure(figsize=size, layout="constrained")
        fill(figure.subplots())
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _themed(text.getvalue())


def _themed(svg: str) -> str:
    """Return the <svg> element alone, with the page's colours and no names that another picture has too."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))  # axes_1 and patch_2 are in every picture, and are not
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


def lines(
    number: str,
    series: Series,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    names: Sequence[str] | None = None,
    ticks: Mapping[float, str] | None = None,
    ideal: Series | None = None,
    joined: bool = True,
) -> str:
    """Draw a line per series.

    log_x, log_y: a logarithmic scale, for values of more than a decade. names: of x = 0, 1, ...; ticks: {x: its text};
    ideal: further lines, thin and dashed, in their series' colour; joined: whether the points are.
    """

    def fill(axes: Any) -> None:
        for place, (name, (x, y)) in enumerate(series.items()):
            look = _look(place, joined)
            axes.plot(x, y, label=_short(name), **look)
            if ideal and name in ideal:
                axes.plot(*ideal[name], "--", linewidth=1, color=look["color"])
        curves = [*series.values(), *(ideal or {}).values()]
        _scale(axes.xaxis, axes.set_xscale, [value for x, _ in curves for value in x], log_x)
        _scale(axes.yaxis, axes.set_yscale, [value for _, y in curves for value in y], log_y)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.set_xticks([], minor=True)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(axis="both", linewidth=0.5)
        if names:
            step = math.ceil(len(names) / TICKS)
            axes.set_xticks(range(0, len(names), step), [*map(_short, names[::step])], rotation=90)
        if len(series) > 1:
            _legend(axes, len(series))

    longest = max((len(_short(name)) for name in names), default=0) if names else 0
    return draw(number, (WIDTH, 3.2 + 0.06 * longest + _legend_height(len(series))), fill)


def bars(number: str, names: Sequence[str], groups: Mapping[str, Sequence[float]], label: str, stacked: bool) -> str:
    """Draw horizontal bars, one row per name; groups: {name in the legend: a value per row}."""

    def fill(axes: Any) -> None:
        places = range(len(names))
        start, share = [0.0] * len(names), 0.8 / (1 if stacked else len(groups))
        for place, (name, values) in enumerate(groups.items()):
            at = places if stacked else [p - 0.4 + share * (place + 0.5) for p in places]
            look = {"color": SERIES[place % len(SERIES)], "edgecolor": PAPER, "linewidth": 0.5}
            hatch = ("", "////", "....", "xxxx")[place // len(SERIES) % 4]
            axes.barh(at, values, share, left=start if stacked else None, label=_short(name), hatch=hatch, **look)
            start = [a + b for a, b in zip(start, values, strict=True)]
        _rows(axes, names)
        axes.set_xlabel(label)
        axes.grid(axis="x", linewidth=0.5)
        axes.set_axisbelow(True)
        if len(groups) > 1:
            _legend(axes, len(groups))

    return draw(number, (WIDTH, _height(len(names)) + _legend_height(len(groups))), fill)


def points(number: str, names: Sequence[str], values: Sequence[float], errors: Sequence[float], label: str) -> str:
    """Draw a value per name with its standard error."""

    def fill(axes: Any) -> None:
        axes.errorbar(values, range(len(names)), xerr=errors, fmt="o", color=SERIES[0], capsize=3)
        _rows(axes, names)
        axes.set_xlabel(label)
        axes.grid(axis="both", linewidth=0.5)

    return draw(number, (WIDTH, _height(len(names))), fill)


def heat_map(
    number: str,
    names: Sequence[str],
    cells: Sequence[Sequence[float]],
    x_label: str,
    label: str,
    *,
    log: bool = False,
    ticks: Sequence[float] | None = None,
) -> str:
    """Draw cells as colours (cividis, which is the same for the colour-blind), a row per name, which may be empty.

    log: the scale of positive values; ticks: values that the scale names.
    """

    def fill(axes: Any) -> None:
        colors = import_module("matplotlib.colors")
        array = import_module("numpy").array(cells, dtype=float)
        norm = None
        if log and (array > 0).any():
            norm = colors.LogNorm(vmin=array[array > 0].min(), vmax=array.max())
        image = axes.imshow(array, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
        _rows(axes, names, upside_down=False)
        axes.set_xlabel(x_label)
        bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02, format=_plain, ticks=ticks)
        bar.outline.set_visible(False)

    return draw(number, (WIDTH, min(8.0, max(2.0, 0.6 + 0.16 * len(names)))), fill)


def _scale(axis: Any, set_scale: Callable[[str], None], values: Sequence[float], log: bool) -> None:
    """Choose an axis's scale and ticks for what is drawn along it."""
    ticker = import_module("matplotlib.ticker")
    if log and min(values, default=0) > 0 and max(values) > 10 * min(values):
        set_scale("log")
        axis.set_major_formatter(_plain)
        axis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axis.set_minor_formatter(_plain)
    elif all(isinstance(value, int) for value in values):
        axis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))


def _plain(value: float, place: int | None = None) -> str:
    """Return a tick of a logarithmic scale; matplotlib's own is a formula."""
    return f"{value:g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _look(place: int, joined: bool) -> dict[str, Any]:
    turn, which = divmod(place, len(SERIES))
    line = DASHES[turn % len(DASHES)] if joined else "none"
    marker = MARKERS[(which + turn) % len(MARKERS)]  # so that a colour that comes again has another
    return {"color": SERIES[which], "marker": marker, "linestyle": line}


def _short(name: str) -> str:
    """Return a name that leaves room for the picture; the table has the whole."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 3]}…{name[-(2 * LONGEST // 3) :]}"


def _rows(axes: Any, names: Sequence[str], upside_down: bool = True) -> None:
    named = [place for place, name in enumerate(names) if name]
    ticks = named[:: math.ceil(len(named) / TICKS) or 1]
    axes.set_yticks(ticks, [_short(names[place]) for place in ticks])
    if upside_down:  # the first on top
        axes.set_ylim(len(names) - 0.5, -0.5)


def _height(rows: int) -> float:
    return min(8.0, 0.8 + ROW * max(rows, 2))


def _legend_height(count: int) -> float:
    return ROW * math.ceil(count / 2) if count > 1 else 0.0


def _legend(axes: Any, count: int) -> None:
    axes.figure.legend(loc="outside upper center", ncols=min(count, 2))
