"""The last lines of a command: what it wrote, and what to do with it. On standard error: standard output is results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from megatron_lowbit.config import StageConfig
from megatron_lowbit.launch.help import WIDTH
from megatron_lowbit.launch.report import PAGE
from megatron_lowbit.runtime.say import say


def tell_ending(stage: str, config: StageConfig, record: dict[str, Any]) -> None:
    """Print what a stage wrote, the seconds it took, and the command that comes next, if one does."""
    folder = Path(config.output_dir)
    page = f" and {PAGE}" if (folder / PAGE).exists() else ""
    say(f"wrote {stage}.json{page} to {folder} in {duration(record['seconds'])}", file=sys.stderr)
    if command := _next(stage, config):
        say_next(command)


def duration(seconds: float) -> str:
    """Return seconds as 12 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wrap_command(words: list[str]) -> str:
    """Return a command for a shell, broken where a line would not fit WIDTH columns."""
    lines, line = [], "next:"
    for word in map(shlex.quote, words):
        if len(line) + len(word) + 3 > WIDTH:
            lines.append(f"{line} \\")
            line = "   "
        line = f"{line} {word}"
    return "\n".join([*lines, line]).removeprefix("next: ")


def say_next(words: list[str]) -> None:
    """Print the command that comes next."""
    print(f"next: {wrap_command(words)}", file=sys.stderr)


def _next(stage: str, config: StageConfig) -> list[str]:
    """Return the command that makes use of what a stage wrote; empty where there is none to name."""
    folder = config.output_dir
    model = [] if config.model is None else [f"model={config.model}"]
    if stage == "demo":
        return ["megatron-lowbit", "generate", f"artifact={Path(folder) / 'artifact'}", "prompt=def read_lines(path):"]
    if stage in ("calibrate", "quantize") and not getattr(config, "dry_run", False):
        from megatron_lowbit.comm.plan import plan_sizes  # and with it torch, which `slurm` does without

        text = "evaluation.data=stdlib:validation" if config.model == "embedded" else "evaluation.data=TEXT"
        ranks = [f"virtual_tp={size}" for size in plan_sizes(Path(folder))[:1]]
        return ["megatron-lowbit", "evaluate", *model, f"artifact={folder}", text, *ranks]
    if stage == "evaluate":
        return ["megatron-lowbit", "report", folder, "OTHER_RUN"]
    return []
