"""Print the tables of the commands: 80 columns wide where nobody says otherwise, and no number broken in two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 80  # of a pipe or file; a terminal has its own
Justify = Literal["left", "right"]


def print_table(
    columns: Mapping[str, Justify] | Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    caption: str | None = None,
) -> None:
    """Print rows under their columns' names.

    Args:
        columns: {name: "left" or "right"}; of a list, the first is left and the others right. Left columns are words,
            which wrap; right ones are numbers, which do not. A line break in a name is kept.
        rows: One text per column.
        title, caption: Lines above and below, wrapped.
    """
    sides: Mapping[str, Justify] = (
        columns
        if isinstance(columns, Mapping)
        else {name: "right" if place else "left" for place, name in enumerate(columns)}
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, caption_justify="left")
    for name, justify in sides.items():
        # Words may be cut anywhere only where they do not fit otherwise.
        table.add_column(name, justify=justify, no_wrap=justify == "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else WIDTH, markup=False, highlight=False).print(table)


def table_text(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as text, 80 columns wide; the first column is left, the others right."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH, markup=False, highlight=False, file=StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def number(value: float | None, form: str) -> str:
    """Return a cell: the value in a format, shorter where that is longer than ten characters; - for None."""
    if value is None:
        return "-"
    text = format(value, form)
    return text if len(text) <= 10 else format(value, ".3g")
