"""What a page is made of: sections of figures, each a sentence, a picture where one helps, and its data as a table."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 60  # rows of a table on the page
KEPT = 4000  # rows of its CSV: the page stays a few megabytes


@dataclass(frozen=True)
class Figure:
    """One picture and its data.

    Args:
        title: a heading.
        says: one or two sentences: what one sees, and why it matters.
        columns, rows: the data; cells are numbers, texts or None.
        draw: returns the picture as SVG (plots.py); None: the table is the picture.
    """

    title: str
    says: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[], str] | None = None

    @property
    def shown(self) -> list[list[tuple[str, bool]]]:
        """Return the cells of the first rows: (text, whether it is a number)."""
        return [[(cell_text(cell), _is_number(cell)) for cell in row] for row in self.rows[:SHOWN]]

    @property
    def numeric(self) -> list[bool]:
        """Return which columns hold numbers alone."""
        return [all(_is_number(row[i]) or row[i] is None for row in self.rows) for i in range(len(self.columns))]

    @property
    def notes(self) -> list[str]:
        """Return what the table leaves out."""
        count, notes = len(self.rows), []
        if count > SHOWN:
            notes.append(f"The table shows the first {SHOWN} of {count:,} rows.")
        if count > KEPT:
            notes.append(f"The CSV holds the first {KEPT:,}.")
        return notes

    @property
    def csv_uri(self) -> str:
        """Return the data as a link: no file beside the page and no script is needed to save it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows[:KEPT])
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.getvalue().encode()).decode()}"


@dataclass(frozen=True)
class Section:
    title: str
    figures: Sequence[Figure]


def cell_text(value: Any) -> str:
    """Return a cell as it is read: four digits of a fraction, thousands of an integer apart."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
