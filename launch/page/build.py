"""Make the page: read the runs, choose the sections whose data are there, draw, fill the template, write the file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import write_text
from megatron_lowbit.launch.page import benchmarks, communication, quality, quantization, timing
from megatron_lowbit.launch.page.figure import Figure
from megatron_lowbit.launch.page.runs import Run, as_json, read_runs

LARGEST = 5_000_000  # bytes of a page
NO_PLOTS = "pip install 'megatron-lowbit[report]'"
SECTIONS = (quality, communication, quantization, timing, benchmarks)


def write_page(folders: Sequence[str | Path], output: str | Path) -> int:
    """Write the page of one run, or of several side by side.

    folders: output_dirs. Returns the bytes. Raises LowBitError for a folder without results or with damaged ones, for
    a page of more than LARGEST bytes, and for a file that cannot be written; then nothing is.
    """
    page = page_of(read_runs(list(folders))).encode("ascii", "xmlcharrefreplace").decode()  # in any locale
    size = len(page)
    if size > LARGEST:
        raise LowBitError(f"the page of {len(folders)} runs has {size / 1e6:.1f} MB, and 5 MB at most; name fewer runs")
    write_text(output, page)
    return size


def page_of(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    found = [section for room in SECTIONS if (section := room.section(runs)) is not None]
    plots = _draws()
    names = ", ".join(run.name for run in runs)
    title = f"Comparison of {names}" if len(runs) > 1 else f"{names}: {', '.join(runs[0].stages) or 'artifact'}"
    return _template().render(
        title=title,
        sections=found,
        about=[about for run in runs for about in _about(run)],
        several=len(runs) > 1,
        picture=_picture if plots else lambda figure: "",
        install="" if plots else NO_PLOTS,
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja")


def _draws() -> bool:
    """Return whether pictures can be drawn; without them the page has the tables."""
    try:
        import_module("matplotlib")
    except ImportError:
        return False
    return True


def _picture(figure: Figure) -> Markup | str:
    return "" if figure.draw is None else Markup(figure.draw())


def _about(run: Run) -> list[dict[str, Any]]:
    """Return how each stage was run: command, settings, environment."""
    about = []
    for stage, record in run.stages.items():
        found = record.get("environment")
        environment = found if isinstance(found, dict) else {}
        command = environment.get("command")
        about.append(
            {
                "run": run.name,
                "stage": stage,
                "command": " ".join(map(str, command)) if isinstance(command, list) else "",
                "config": as_json(record.get("config", {})),
                "data": as_json(record["data"]) if record.get("data") else "",
                "environment": as_json({k: v for k, v in environment.items() if k != "command"}),
            }
        )
    return about
