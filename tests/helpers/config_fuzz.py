"""Random and mutated command lines and config files, and what becomes of them: a config, or one line and exit code 2.

    python tests/helpers/config_fuzz.py FIRST COUNT    cases FIRST .. FIRST + COUNT - 1 in this process

A case is made from its number alone, so that a failure can be repeated.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from megatron_lowbit.config import LowBitError, StageConfig, defaults, load_config
from megatron_lowbit.launch import arguments
from megatron_lowbit.launch.bench import arguments as benchmark_arguments
from megatron_lowbit.launch.bench.config import (
    BenchmarkCollectivesConfig,
    BenchmarkKernelsConfig,
    BenchmarkLinearConfig,
    BenchmarkModelConfig,
)
from megatron_lowbit.launch.slurm import render as slurm
from megatron_lowbit.launch.slurm.config import SlurmConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
BENCHMARKS = {
    "collectives": BenchmarkCollectivesConfig,
    "kernels": BenchmarkKernelsConfig,
    "linear": BenchmarkLinearConfig,
    "model": BenchmarkModelConfig,
}
CLASSES = {**arguments.CONFIGS, **BENCHMARKS, "slurm": SlurmConfig}

# Values that readers of numbers, dates, YAML, paths and text stumble over.
VALUES = (
    *("", " ", "0", "1", "2", "-1", "3.5", "1e3", "1e999", "-0.0", ".nan", ".inf", "nan", "0x1F", "0o17", "1_000"),
    *("9" * 30, "9" * 4299, "9" * 5000, "0x" + "f" * 5000, "-" + "9" * 400, "1:30", "1:30:00.5", "1" + "0" * 300),
    *("true", "yes", "no", "on", "off", "null", "~", "none", "None", "Yes", "y", "=", "<<", "2024-02-30", "2024-02-28"),
    *("2024-02-28 25:61:00", "0000-00-00", "!!timestamp x", "!!int x", "!!int ''", "!!float q", "!!bool x", "!!null 3"),
    *("!!binary é", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 3", "!!map [1]", "!x y"),
    *("!!python/object:os.system {}", "!!python/name:os.system", "!!python/tuple [1, 2]", "!!seq {}", "%YAML 9.9"),
    *(
        "&a [*a]",
        "*a",
        "&a {b: *a}",
        "{a: 1, a: 2}",
        "{? [x] : 1}",
        "{{a: 1}: 2}",
        "[",
        "]",
        "{",
        "}",
        "[[[[",
        "- -",
        "a: b",
    ),
    *(
        "a: b: c",
        "# only a comment",
        "'",
        '"',
        "'a",
        '"\\ud800"',
        '"\\0"',
        "|",
        ">",
        "---",
        "--- a",
        "...",
        "@x",
        "`x",
        "%",
    ),
    *(
        "\0",
        "a\0b",
        "\ud800",
        "\udcff",
        "é",
        "日本語",
        "🙂",
        "\u2028",
        "\x85",
        "\x1b[31m",
        "\x7f",
        "\ufeff",
        "\r\n",
        "\t",
    ),
    *(
        "[" * 1000,
        "{a: " * 400,
        "- " * 200,
        "a" * 5000,
        "a" * 300,
        "../" * 200,
        "[" + "1, " * 300 + "1]",
        "x=y",
        "a.b",
    ),
    *(
        "embedded",
        "/",
        ".",
        "..",
        "/dev/null",
        "/nowhere",
        "a/b",
        "a/b/c",
        "a:b:c",
        "stdlib:calibration",
        "stdlib:x",
        "~",
    ),
    *(
        "x.csv",
        "x.json.gz",
        "huggingface",
        "deepspeed",
        "megatron",
        "vllm",
        "W3A3",
        "W4A8",
        "[2, 4]",
        "[2, x]",
        "[]",
        "{}",
    ),
    *("64KiB", "1gbit", "04:00:00", "paper", "[[a, b], [c]]", "{evaluate: {arguments: [model=embedded]}}", "-1e-400"),
)
OPTIONS = (
    "--config",
    "--model",
    "--output-dir",
    "--engine",
    "--wandb",
    "--nproc",
    "--dry-run",
    "--ablation",
    "--x",
    "--",
)


# With these a stage has what it cannot do without.
BASE = {
    "calibrate": ("model=embedded", "calibration.data=stdlib:calibration"),
    "evaluate": ("model=embedded", "evaluation.data=stdlib:validation"),
    "generate": ("model=embedded",),
    "quantize": ("model=embedded",),
    "slurm": ("stages={evaluate: {arguments: [model=embedded, 'evaluation.data=stdlib:validation']}}",),
}


def bomb(levels: int, width: int) -> str:
    names = [f"a{level}" for level in range(levels)]
    lines = [f"{names[0]}: &{names[0]} [{', '.join(['x'] * width)}]"]
    for before, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * width)}]")
    return "\n".join(lines) + "\n"


def case(number: int, folder: Path) -> tuple[str, list[str]]:
    """(stage, arguments) of a case; its config file, if it has one, lies in the folder."""
    rng = random.Random(number)
    stage = rng.choice(list(CLASSES))
    usual = defaults(CLASSES[stage]())
    keys = [*usual, "stages.evaluate.arguments", "variables.x"]
    argv = list(BASE.get(stage, ())) if rng.random() < 0.8 else []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        key = rng.choice(list(usual))
        argv.append(f"{key}={usual[key]}" if rng.random() < 0.5 else override(rng, keys))
    if stage == "slurm" or rng.random() < 0.5:
        file = folder / "case.yaml"
        file.write_bytes(document(rng, keys))
        name = (
            str(file)
            if rng.random() < 0.97
            else rng.choice(("/dev/zero", "/dev/null", "", str(folder), "\0", "x" * 5000))
        )
        argv[0:0] = [name] if stage == "slurm" else ["--config", name]
    if stage != "slurm" and rng.random() < 0.2:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(OPTIONS))
        if rng.random() < 0.7:
            argv.append(rng.choice(VALUES))
    return stage, argv


def override(rng: random.Random, keys: list[str]) -> str:
    key = rng.choice(keys)
    roll = rng.random()
    if roll < 0.1:
        key = mutated(rng, key)
    elif roll < 0.15:
        key += rng.choice((".x", ".", "..a", ".a" * 50, ".0", "." + rng.choice(VALUES)))
    value = rng.choice(VALUES) if rng.random() < 0.9 else mutated(rng, rng.choice(VALUES))
    return f"{key}={value}" if rng.random() < 0.97 else rng.choice((key, f"={value}", value))


def document(rng: random.Random, keys: list[str]) -> bytes:
    """A config file: an example with a few things changed, or one made up."""
    roll = rng.random()
    if roll < 0.6:
        text = rng.choice(EXAMPLES).read_text()
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            text = changed(rng, text)
    elif roll < 0.9:
        text = ""
        for _ in range(rng.randrange(1, 6)):
            *sections, leaf = rng.choice(keys).split(".")
            opening = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
            text += f"{opening}{'  ' * len(sections)}{leaf}: {rng.choice(VALUES)}\n"
    elif roll < 0.95:
        text = rng.choice(
            (bomb(9, 9), bomb(3, 3), "architecture:\n  " + bomb(9, 9).replace("\n", "\n  "), "", "\n", "a\n")
        )
    else:
        return rng.randbytes(rng.choice((1, 10, 100)))
    data = text.encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.1:
        spoiled = bytearray(data or b"x")
        for _ in range(rng.randrange(1, 4)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        data = bytes(spoiled)
    return rng.choice((b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")) + data if rng.random() < 0.1 else data


def changed(rng: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    place = rng.randrange(len(lines))
    what = rng.randrange(6)
    if what == 0:
        lines.insert(place, lines[place])  # a key twice
    elif what == 1:
        del lines[place]
    elif what == 2:
        key, colon, _ = lines[place].partition(":")
        lines[place] = f"{key}{colon} {rng.choice(VALUES)}"
    elif what == 3:
        lines[place] = " " * rng.randrange(5) + lines[place]
    elif what == 4:
        lines[place] = mutated(rng, lines[place])
    else:
        lines.insert(place, f"{rng.choice(VALUES)}: {rng.choice(VALUES)}")
    return "\n".join(lines) + "\n"


def mutated(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(("", *VALUES)) + text[place + rng.randrange(3) :]


def attempt(stage: str, argv: list[str]) -> int | None:
    """Everything that is done with a stage's arguments before it runs: None, or the exit code after one line."""
    if stage in BENCHMARKS:
        return benchmark_arguments.check_arguments(stage, argv)
    if stage != "slurm":
        return arguments.check_arguments(stage, argv)
    try:
        config = load_config(SlurmConfig, argv[0], argv[1:])
        slurm.render(slurm.with_files_found(config, Path(argv[0]).parent))
    except LowBitError as error:
        return arguments.fail(str(error))
    return None


def outcome(stage: str, argv: list[str], attempt: Callable[[str, list[str]], int | None] = attempt) -> str:
    """config, refused, or what went wrong: another exit code, no line or several, or a traceback."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = attempt(stage, argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
    said = stderr.getvalue()
    if code is None:
        return "config" if not said else f"a config, and {said[:200]!r}"
    lines = said.splitlines()
    one = (
        len(lines) == 1 and said.endswith("\n") and lines[0].startswith("megatron-lowbit: ") and lines[0].isprintable()
    )
    return "refused" if code == 2 and one and len(said) < 4000 else f"exit code {code} and {said[:300]!r}"


def count(first: int, number: int) -> tuple[Counter[str], dict[str, int]]:
    """({outcome: how often}, {bad outcome: the first case that had it})."""
    found: Counter[str] = Counter()
    examples: dict[str, int] = {}
    stages = {base.__name__ for base in CLASSES.values() if issubclass(base, StageConfig)}
    assert len(stages) == len(CLASSES) - 1
    with tempfile.TemporaryDirectory() as folder:
        for place in range(first, first + number):
            result = outcome(*case(place, Path(folder)))
            found[result] += 1
            if result not in ("config", "refused"):
                examples.setdefault(result, place)
    return found, examples


if __name__ == "__main__":
    found, examples = count(int(sys.argv[1]), int(sys.argv[2]))
    print(found.most_common())
    print(examples)
