"""What the README and the pages of docs/ hold: commands, Python blocks, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANUAL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, *(ROOT / f"{name}.md" for name in ("BENCHMARKS", "CHANGELOG", "SECURITY"))]
PAGES += sorted((ROOT / "benchmarks").glob("*.md"))
PROGRAMS = ("megatron-lowbit", "make", "torchrun", "deepspeed", "srun", "mpirun")


@dataclass(frozen=True)
class Command:
    """An indented command line: program and options of a launcher, then a stage and its arguments, or an example."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def stage(self) -> list[str] | None:
        """[stage, argument...], also where a launcher starts the stage's module; None for make and for scripts."""
        if self.words[0] == "megatron-lowbit":
            return list(self.words[1:])
        prefix = "megatron_lowbit.launch."
        found = [number for number, word in enumerate(self.words) if word.startswith(prefix)]
        return [self.words[found[0]].removeprefix(prefix), *self.words[found[0] + 1 :]] if found else None

    @property
    def ranks(self) -> int | None:
        """How many a launcher is told to start; None without a launcher, or where a file of hosts says it."""
        options = dict(zip(self.words, self.words[1:], strict=False))
        match self.words[0]:
            case "torchrun":
                return int(options["--nproc-per-node"])
            case "srun":
                return int(options["-N"]) * int(options["--ntasks-per-node"])
            case "mpirun":
                return int(options["-n"])
            case "deepspeed" if "--num_accelerators" in options:
                return int(options["--num_accelerators"])
        return None


@cache
def commands() -> list[Command]:
    """Return the commands of all manual pages, without comments; a backslash at a line's end joins it with the next."""
    found = []
    for page in MANUAL:
        lines = page.read_text().replace("\\\n", "").splitlines()
        for number, line in enumerate(lines, 1):
            if line.startswith("    ") and line.split()[0] in PROGRAMS:
                found.append(Command(page.name, number, tuple(shlex.split(line, comments=True))))
    return found


@cache
def python_blocks() -> list[tuple[str, str]]:
    """(page, source) of every fenced block of Python."""
    return [
        (page.name, block) for page in MANUAL for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text())
    ]


@cache
def links() -> list[tuple[Path, str]]:
    """(page, target) of every link that does not leave the repository."""
    found = []
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
        targets = re.findall(r"\]\(([^)\s]+)\)", text)
        found += [(page, target) for target in targets if not re.match(r"https?:", target)]
    return found
