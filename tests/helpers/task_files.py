"""Questions of the local_ tasks, in the formats of their files, about Python for the embedded model."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import yaml

from megatron_lowbit.launch.harness import TASKS

WORDS = ["self.name", "None", "return value", "def close(self):", "import sys", "0, 1", "True", "raise ValueError"]
PARADIGMS = [
    child["task"] for child in yaml.safe_load((TASKS / "local_blimp.yaml").read_text().replace("!", "#"))["task"]
]


def questions(count: int, choices: int = 4) -> list[dict[str, Any]]:
    """Questions with choices of different lengths; which of them is right goes round."""
    return [
        {
            "query": f"Question: what follows {WORDS[number % 8]} in line {number}?\n",
            "choices": [WORDS[(number + 3 * choice) % 8] for choice in range(choices)],
            "gold": number % choices,
        }
        for number in range(count)
    ]


def pairs(count: int) -> list[dict[str, str]]:
    return [{"sentence_good": f"return {WORDS[n % 8]}", "sentence_bad": f"{WORDS[n % 8]} return"} for n in range(count)]


def schemas(count: int) -> list[dict[str, Any]]:
    return [
        {"context_options": [f"for {w} in", f"while {w}"], "continuation": "range(4): pass", "gold": n % 2}
        for n, w in enumerate(WORDS[:count])
    ]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_tasks(folder: Path, count: int = 2) -> Path:
    """Write a file for every local task, plain, packed or zipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("piqa", "arc_easy", "arc_challenge", "boolq"):
        (folder / f"{name}.jsonl").write_text(lines(questions(count, 2 if name in ("piqa", "boolq") else 4)))
    (folder / "hellaswag.jsonl.gz").write_bytes(gzip.compress(lines(questions(count)).encode()))
    (folder / "winogrande.jsonl").write_text(lines(schemas(count)))
    with zipfile.ZipFile(folder / "BLiMP.zip", "w") as archive:
        for name in PARADIGMS:
            archive.writestr(f"data/{name}.jsonl", lines(pairs(count)))
            archive.writestr(f"__MACOSX/data/._{name}.jsonl", "what macOS adds")
    return folder
