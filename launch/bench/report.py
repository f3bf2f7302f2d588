"""Markdown of a benchmark's results: what BENCHMARKS.md and a pull request take as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_lowbit.launch.tables import Justify
from megatron_lowbit.runtime.metrics import environment
from megatron_lowbit.runtime.say import say


def markdown(columns: Mapping[str, Justify], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns line up in a terminal, too: {name: "left" or "right"}, one text per column."""
    cells = [[*columns], *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(columns))]
    sides = list(columns.values())

    def line(row: Sequence[str]) -> str:
        padded = (f"{cell:{'<' if side == 'left' else '>'}{width}}" for cell, side, width in _zip(row, sides, widths))
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{'-' if side == 'left' else ':'}" for side, width in zip(sides, widths, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _zip(*lists: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    return zip(*lists, strict=True)


def circumstances() -> dict[str, Any]:
    """Return what a run began with: date, commit, and load, the processes that wanted a core in the last minute."""
    commit, load = environment()["commit"], round(os.getloadavg()[0], 1)
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "load": load}


def print_heading(title: str, about: Mapping[str, Any]) -> None:
    """Print the title, and a line with the machine, the date, the commit and the load."""
    here = environment()
    machine, commit = here["machine"], (about["commit"] or "no commit")[:9]
    parts = [f"{machine['processor']}, {machine['cores']} cores", about["date"], commit, f"load {about['load']}"]
    print(f"## {title}\n")
    say(", ".join([*parts, "torch " + here["versions"]["torch"]]))


def clock(threads: int) -> Any:
    """Return the clock of a measurement: CPU time of one thread, which other work does not lengthen; else time that
    passes."""
    return time.process_time if threads == 1 else time.perf_counter
