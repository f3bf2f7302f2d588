"""Sentences for a reader: whole lines in a pipe or a file, wrapped at words on a terminal."""

from __future__ import annotations

import sys
import textwrap
from typing import TextIO

from rich.console import Console


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line; where a terminal shows it, on as many as it takes, none of which breaks a word.

    file: standard output by default.
    """
    file = sys.stdout if file is None else file
    console = Console(file=file)
    if console.is_terminal and len(text) > console.width:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    print(text, file=file, flush=True)
