"""The README and the pages: their commands parse and the cheap ones run, their code names what there is, their links
lead to files, and the README keeps to its size. Placeholders (MODEL, TEXT, artifact) stand for small real inputs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from commands import CALIBRATION, EVALUATION, needs_deepspeed, run_here
from example_runs import evaluated
from pages import MANUAL, ROOT, Command, commands, links, python_blocks

import megatron_lowbit
from megatron_lowbit.config import defaults
from megatron_lowbit.launch import BENCHMARKS, STAGES, arguments
from megatron_lowbit.launch.bench.arguments import PARSERS
from megatron_lowbit.launch.inputs import check_inputs
from megatron_lowbit.launch.layout import check_layout, own_ranks, ranks_of, world_of
from megatron_lowbit.launch.slurm import render

ENGINES = {"deepspeed": "deepspeed", "megatron": "megatron"}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("Once\nupon\n")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("release")
    (folder / "text.txt").write_text("def read_lines(path):\n    return path\n" * 400)
    return folder


def small(words: list[str], artifact: Path, text: Path, output: Path) -> list[str]:
    """The words with small real inputs in place of a page's names for them."""
    stands_for = {
        "DIR_OR_HUB_ID": "embedded",
        "MODEL": "embedded",
        "TEXT": str(text / "text.txt"),
        "TASKS": str(text),
        "artifact": str(artifact),
        "CHECKPOINT": str(text / "checkpoint"),
        "prompts.txt": str(text / "prompts.txt"),
    }
    filled = []
    for word in words:
        key, equals, value = word.partition("=")
        value = str(output) if key == "output_dir" else stands_for.get(value, value)
        filled.append(f"{key}={value}" if equals else stands_for.get(word, word))
    return filled


def test_there_are_commands_and_code():
    """What the tests below go through is not empty, and the pages' main ways of starting are among it."""
    assert {command.words[0] for command in commands()} >= {"megatron-lowbit", "make", "torchrun", "deepspeed", "srun"}
    assert {stage[0] for command in commands() if (stage := command.stage)} >= STAGES.keys()
    assert len(python_blocks()) > 5 and len(links()) > 50


@pytest.mark.parametrize("command", [c for c in commands() if c.stage], ids=str)
def test_a_command_parses(command: Command, embedded_artifact, text, tmp_path, capsys, monkeypatch):
    """With its stage's own parser and checks; a launcher starts as many ranks as the stage needs."""
    for reader in ("launch.inputs", "io.texts"):  # pages name models and texts of the hub, which is not asked here
        monkeypatch.setattr(f"megatron_lowbit.{reader}.check_on_hub", lambda *args: None)
    assert command.stage is not None
    stage, *argv = small(command.stage, embedded_artifact, text, tmp_path)
    if "--help" in (stage, *argv):
        with contextlib.suppress(SystemExit):
            assert run_here(stage, *argv) == 0
        assert capsys.readouterr().out.startswith("usage: megatron-lowbit")
        return
    if stage == "slurm":
        assert argv[0] in ("render", "submit")
        assert render.main(["render", *argv[1:], f"output_dir={tmp_path}"]) == 0
        return
    if stage == "report":
        runs = [f"{tmp_path}/{word}" for word in argv if word.startswith("runs/")]
        for run in map(Path, runs):
            run.mkdir(parents=True)
            evaluated(run)
        assert run_here("report", *runs, *(["--output", tmp_path / "page.html"] if "--output" in argv else [])) == 0
        return
    if stage == "lm_eval":
        pytest.importorskip("lm_eval")
        from megatron_lowbit.launch.harness.model import config_of

        options = dict(itertools.pairwise(argv))
        config = config_of(dict(pair.split("=") for pair in options["--model_args"].split(",")))
        assert options["--model"] == "megatron_lowbit" and command.ranks in (None, ranks_of("evaluate", config))
        return
    if stage == "benchmark" and argv and argv[0] in BENCHMARKS:
        PARSERS[argv[0]](argv[1:])
        return
    config, nproc = arguments.parse(stage, arguments.CONFIGS[stage], argv)
    if command.words[0] == "megatron-lowbit":
        check_layout(stage, config, nproc)
    else:
        assert command.ranks in (None, own_ranks(stage, config) or world_of(config))
    needed = [name for name in ENGINES if name in getattr(config, "engines", (config.engine,))]
    needed += ["lm_eval"] if getattr(getattr(config, "evaluation", None), "tasks", ()) else []
    if all(find_spec(name) for name in needed):
        check_inputs(stage, config)


def lines_with(*parts: str) -> list[Command]:
    """One command line of each kind: the first that has this text in it."""
    return [next(c for c in commands() if part in " ".join(c.words)) for part in parts]


@pytest.mark.parametrize("command", lines_with("megatron-lowbit calibrate model=", "rates.flops=400e12"), ids=str)
def test_a_command_runs(command: Command, embedded_artifact, text, tmp_path):
    assert command.stage is not None
    extra = [] if "--dry-run" in command.stage else [*CALIBRATION[1:], f"output_dir={tmp_path}"]
    assert run_here(*small(command.stage, embedded_artifact, text, tmp_path), *extra) == 0


@needs_deepspeed
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (lines_with("megatron-lowbit generate artifact=artifact engine=deepspeed")[0], ["max_new_tokens=2"]),
        (lines_with("megatron-lowbit evaluate artifact=artifact engine=deepspeed")[0], EVALUATION[1:]),
    ],
    ids=str,
)
def test_a_command_runs_on_two_ranks(command: Command, extra, embedded_artifact, text, tmp_path):
    argv = [*small(list(command.stage or ()), embedded_artifact, text, tmp_path), *extra, f"output_dir={tmp_path}"]
    assert run_here(*argv) == 0


@pytest.mark.parametrize("target", sorted({c.words[1] for c in commands() if c.words[0] == "make"}))
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "--dry-run", target], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target():
    told = subprocess.run(["make", "help"], capture_output=True, text=True, timeout=300, check=True).stdout
    listed = re.findall(r"(?m)^make ([a-z-]+)", told)
    phony = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())
    assert phony is not None and sorted(listed) == sorted(phony[1].split())


@pytest.mark.parametrize(
    "script", [c for c in commands() if any(word.startswith("examples/") for word in c.words)], ids=str
)
def test_examples_are_there(script: Command):
    """tests/test_examples.py runs them."""
    for word in script.words:
        assert not word.startswith("examples/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize(
    ("page", "source"), python_blocks(), ids=[f"{page}-{n}" for n, (page, _) in enumerate(python_blocks())]
)
def test_python_blocks_name_what_there_is(page, source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            module = node.module if isinstance(node, ast.ImportFrom) else name
            package = "megatron" if "adapters.megatron" in str(module) else str(module).partition(".")[0]
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
            found = importlib.import_module(str(module))
            assert isinstance(node, ast.Import) or hasattr(found, name), f"{module} has no {name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lowbit":
            assert node.attr in megatron_lowbit.__all__, node.attr


@pytest.mark.parametrize(("page", "target"), links(), ids=[f"{page.name}-{target}" for page, target in links()])
def test_links_lead_somewhere(page: Path, target: str):
    file, _, heading = target.partition("#")
    assert not heading, "headings change: link to the page"
    assert (page.parent / file).exists(), target


def test_every_page_is_reached_from_the_readme():
    linked = {(page.parent / target).resolve() for page, target in links() if page.name == "README.md"}
    assert not [page for page in (ROOT / "docs").glob("*.md") if page not in linked]
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "BENCHMARKS.md", "CITATION.cff", "LICENSE"):
        assert ROOT / name in linked, name


def test_files_of_equations_hold_them():
    """Each row of the README's table names a definition that is in the file it links: one file away from the README."""
    rows = re.findall(r"\| \[[^]]+\]\(([^)]+)\), `(\w+)` \|", (ROOT / "README.md").read_text())
    assert len(rows) >= 10
    for file, name in rows:
        assert re.search(rf"(?m)^ *(def|class) {name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


def test_files_that_pages_name_are_there():
    """`some/file.py` in a page's text is a file of the repository, from its root or from the package's."""
    for page in MANUAL:
        for name in re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|h|cpp|sh|sbatch))`", page.read_text()):
            assert any((ROOT / where / name).exists() for where in ("", "megatron_lowbit")), f"{page.name}: {name}"


def test_size_of_the_readme():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300 and len(text.splitlines()) <= 160


def test_every_key_that_pages_set_is_one():
    """`key=value` in a page's text, where the key has a dot."""
    known = {key for config in arguments.CONFIGS.values() for key in defaults(config())}
    for page in MANUAL:
        for key in re.findall(
            r"`((?:comm|weights|calibration|evaluation|correction|reassembly|rates)\.(?!json)\w+)[=`]", page.read_text()
        ):
            assert key in known, f"{page.name}: {key}"


def test_citation_names_both_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {reference["url"].rpartition("/")[2] for reference in cited["references"]} == {"2411.07942", "2310.08041"}
