"""Run calibrate, quantize (rtn and qllm) and evaluate on a tiny model of every text family in transformers; print what
came of it as a table of Markdown. `python tests/helpers/family_matrix.py [FAMILY ...]`

Every command runs in this process. `traceback` in the table: it raised instead of printing one line.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import family_models

from megatron_lowbit.launch import main

TEXT = [f"calibration.data={__file__}", "calibration.samples=2", "calibration.sequence_length=64"]
LOOK = [f"evaluation.data={__file__}", "evaluation.samples=2", "evaluation.sequence_length=64"]
KEPT = "in full precision stay "
TRAIN = ["correction.epochs=1", "correction.batch_size=2", "correction.rank=2", "comm.tp_sizes=[2]"]


@dataclass
class Outcome:
    """What one family came to: the outcome of every stage (`yes`, `refused`, `traceback`), and what the first said that
    was refused, or left something in full precision."""

    family: str
    stages: dict[str, str] = field(default_factory=dict)
    words: str = ""

    def row(self) -> str:
        cells = [self.stage(name) for name in ("calibrate", "rtn", "qllm")]
        return f"| {self.family} | {' | '.join(cells)} | {self.words} |"

    def stage(self, name: str) -> str:
        """`yes`, where what the stage has written was evaluated too."""
        return self.stages[name] if self.stages[name] != "yes" else self.stages.get(f"evaluate {name}", "yes")


def tell(*argv: str) -> tuple[str, str]:
    """(what became of a command, what it said of it)."""
    out, err, logged = io.StringIO(), io.StringIO(), io.StringIO()
    handler, logger = logging.StreamHandler(logged), logging.getLogger("megatron_lowbit")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(argv))
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        logger.removeHandler(handler)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("megatron-lowbit:")]
    if code == 0:
        kept = [line for line in out.getvalue().splitlines() if line.startswith(KEPT)][:1]
        if "Q, K and V stay" in logged.getvalue():
            kept.append("Q, K and V (attention in code of its own)")
        return "yes", KEPT + "; ".join(line.removeprefix(KEPT) for line in kept) if kept else ""
    return ("refused" if code == 2 and len(lines) == 1 else "traceback"), " ".join(lines)


def outcome(family: str, folder: Path) -> Outcome:
    model, found = str(family_models.save(family, folder / "model")), Outcome(family)
    commands = {
        "calibrate": ["calibrate", f"model={model}", *TEXT, "comm.tp_sizes=[2]"],
        "rtn": ["quantize", f"model={model}", "weights.method=rtn", "weights.scheme=W4A4"],
        "qllm": ["quantize", f"model={model}", "weights.method=qllm", "weights.scheme=W4A4", *TEXT, *TRAIN],
    }
    said = []
    for stage, command in commands.items():
        found.stages[stage], words = tell(*command, f"output_dir={folder / stage}")
        said.append(words)
        if stage != "calibrate":
            name = f"evaluate {stage}"
            if found.stages[stage] != "yes":
                found.stages[name] = "-"
                continue
            options = [f"artifact={folder / stage}", f"output_dir={folder / name}", *LOOK]
            found.stages[name], words = tell("evaluate", *options)
            said.append(words if found.stages[name] != "yes" else "")
    words = next((w for w in said if w.startswith("megatron-lowbit")), next((w for w in said if w), ""))
    found.words = words.removeprefix("megatron-lowbit: ").replace(model, "MODEL")
    return found


def main_matrix(families: list[str]) -> int:
    print("| family | calibrate | rtn | qllm | what is said of it |\n|---|---|---|---|---|", flush=True)
    outcomes = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(outcome(family, Path(folder)))
        print(outcomes[-1].row(), flush=True)
    stages = [stage for found in outcomes for stage in found.stages.values()]
    counts = {what: stages.count(what) for what in ("yes", "refused", "traceback")}
    print(f"{len(outcomes)} families: {counts}", file=sys.stderr)
    return int(counts["traceback"] > 0)


if __name__ == "__main__":
    sys.exit(main_matrix(sys.argv[1:] or list(family_models.FAMILIES)))
