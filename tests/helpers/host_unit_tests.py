"""A host's own unit tests, without us and on our layers: a pytest plugin that records outcomes, and what compares them.

SEEN names a folder. A pytest session writes {test: outcome} into it, and any process adds a line for each layer of ours
that it builds or runs.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_outcomes: dict[str, str] = {}


def compare(files: list[str], variants: Sequence[str], run: Any) -> int:
    """Run each file's tests in each variant, of which the first is without us, by run(file, variant, folder).

    Prints what came of them. Returns 1 where a variant passes other tests than the first, or has used no layer of ours.
    """
    same = True
    for file in files:
        reference = None
        for variant in variants:
            with tempfile.TemporaryDirectory() as folder:
                run(file, variant, folder)
                outcomes, used = _merged(Path(folder))
            counts = Counter(outcomes.values())
            passed = {test for test, outcome in outcomes.items() if outcome == "passed"}
            reference = passed if reference is None else reference
            figures = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
            uses = f"layers of ours {used['built']}, their forward passes {used['run']}"
            others = [f"    passes in one of the two alone: {test}" for test in sorted(passed ^ reference)]
            print(f"{file}, {variant}: {figures}; {uses}", *others, sep="\n", flush=True)
            same = same and passed == reference and (variant == variants[0] or used["built"] > 0)
    return 0 if same else 1


def _merged(folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """What the sessions of one run have seen: a test passes if it does in all of them."""
    outcomes: dict[str, str] = {}
    for path in folder.glob("*.json"):
        for test, outcome in json.loads(path.read_text()).items():
            if outcomes.get(test, "passed") == "passed":
                outcomes[test] = outcome
    uses = [line for path in folder.glob("*.used") for line in path.read_text().split()]
    return outcomes, Counter(uses)


def sessions(environments: list[dict[str, str]], folder: str, cwd: Path, *arguments: str) -> None:
    """Run a pytest session beside each other in each of these environments; the first prints."""
    command = [sys.executable, "-m", "pytest", "-p", "host_unit_tests", "-p", "no:cacheprovider", "-o", "addopts="]
    running: list[subprocess.Popen[bytes]] = []
    for environment in environments:
        output = subprocess.DEVNULL if running else None
        settings = {**os.environ, **environment, "SEEN": folder}
        running.append(subprocess.Popen([*command, *arguments], cwd=cwd, env=settings, stdout=output, stderr=output))
    for process in running:
        process.wait()


def count(owner: Any, method: str, word: str) -> None:
    """Have a line with this word added whenever a method of a class is called."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def counted(*args: Any, **options: Any) -> Any:
        with (Path(os.environ["SEEN"]) / f"{os.getpid()}.used").open("a") as file:
            print(word, file=file)
        return original(*args, **options)

    setattr(owner, method, counted)


def pytest_runtest_logreport(report: Any) -> None:
    says = report.when == "call" or report.outcome != "passed"  # setting up and taking down do where they go wrong
    if says and _outcomes.get(report.nodeid) != "failed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    (Path(os.environ["SEEN"]) / f"{os.getpid()}.json").write_text(json.dumps(_outcomes))
