"""What imports what: a light package, one direction between its layers, and a folder named like somebody's package."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

import megatron_lowbit

ROOT = Path(__file__).resolve().parents[1]

# A room is a folder, or a module outside all folders. A room may import from itself and from those on lower floors.
FLOORS = [
    {"plain_yaml", "temporary", "embedded"},
    {"config", "kernels"},
    {"io", "quality"},
    {"runtime"},
    {"quant"},
    {"comm"},
    {"layers", "artifact"},
    {"adapters"},
    {"qllm", ""},
    {"launch"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    return module.partition(".")[0]


@cache
def sources() -> dict[str, Path]:
    """{module name without `megatron_lowbit.`: file} of the three folders that make up the package."""
    found = {}
    for folder, prefix in (("megatron_lowbit", ()), ("kernels", ("kernels",)), ("launch", ("launch",))):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = prefix + file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


@cache
def imported(file: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, at its top or inside functions; not what only type checkers see."""
    return frozenset(names_in(file))


def names_in(file: Path) -> Iterator[str]:
    for_types = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= {id(child) for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file.name} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__", "require", "find_spec"):
                yield str(node.args[0].value)


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {
        name
        for dotted in imported(sources()[module])
        if (name := dotted.removeprefix("megatron_lowbit.")) != dotted and name in sources() and name != module
    }


def test_every_room_has_a_floor():
    assert {room(name) for name in sources()} == FLOOR.keys()


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_run_downwards(name):
    for module in sources():
        if room(module) == name:
            up = [other for other in own_imports(module) if room(other) != name and FLOOR[room(other)] >= FLOOR[name]]
            assert not up, f"{module} imports {up}, which is not on a lower floor"


def test_no_two_modules_import_each_other():
    """Neither directly nor around a corner; a package's __init__ is left out, since importing from it is its use."""
    modules = {name: file for name, file in sources().items() if file.name != "__init__.py"}
    TopologicalSorter({name: own_imports(name) & modules.keys() for name in modules}).prepare()


def test_the_parser_sees_the_imports():
    """Some that are known to be there, so that the tests above look at something."""
    assert "megatron_lowbit.kernels" in imported(sources()["quant.affine"])
    assert "megatron_lowbit.config" in imported(sources()["quality"])
    assert "deepspeed" in {name.partition(".")[0] for name in imported(sources()["adapters.deepspeed"])}
    assert not [name for name in imported(sources()[""]) if name.startswith("megatron_lowbit")]


def test_the_pipeline_reads_no_private_attribute_of_another_object():
    for module, file in sources().items():
        for node in ast.walk(ast.parse(file.read_text())) if room(module) == "qllm" else ():
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert ast.unparse(node.value) in ("self", "cls"), f"{module}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", list(sources()))
def test_only_adapters_import_the_frameworks(module):
    frameworks = {"deepspeed", "megatron"} & {name.partition(".")[0] for name in imported(sources()[module])}
    assert not frameworks or module.startswith("adapters.")


def run_python(code: str, **environment: str) -> str:
    """Standard output of `python -c code`, started in the repository's root."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = """
import json, sys
import megatron_lowbit
heavy = ("deepspeed", "megatron", "transformers", "triton", "wandb", "datasets", "torch")
at_first = [name for name in heavy if name in sys.modules]
for name in megatron_lowbit.__all__:
    if name != "apply_to_megatron":  # subclasses Megatron's layers
        getattr(megatron_lowbit, name)
import torch
later = [name for name in heavy[:3] + ("wandb", "datasets") if name in sys.modules]
print(json.dumps([at_first, later, torch.cuda.is_initialized()]))
"""
    at_first, later, cuda = json.loads(run_python(code, PYTHONSAFEPATH="1"))
    assert at_first == []
    assert later == []  # not even all public names together need a framework
    assert not cuda


def test_public_names():
    assert sorted(megatron_lowbit.__all__) == list(megatron_lowbit.__all__) and len(set(megatron_lowbit.__all__)) > 5
    for name in megatron_lowbit.__all__:
        home = importlib.import_module(f"megatron_lowbit.{megatron_lowbit._HOMES[name]}")
        assert getattr(megatron_lowbit, name) is getattr(home, name)
    assert set(megatron_lowbit._HOMES) == set(megatron_lowbit.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = megatron_lowbit.nothing


def test_what_an_interactive_user_sees():
    """dir() lists the public names alone, and help() explains them, without Megatron too."""
    assert {name for name in dir(megatron_lowbit) if not name.startswith("__")} == set(megatron_lowbit.__all__)
    for name in megatron_lowbit.__all__:
        assert name in (megatron_lowbit.__doc__ or ""), "the package's docstring lists every name"
        assert getattr(megatron_lowbit, name).__doc__, name
    code = """
import pydoc, sys
sys.modules["megatron"] = None
import megatron_lowbit
print("apply_to_megatron" in dir(megatron_lowbit))
text = pydoc.render_doc(megatron_lowbit, renderer=pydoc.plaintext)
print(all(f"{name}(" in text for name in ("apply_to_huggingface", "apply_to_deepspeed", "remove", "class Artifact")))
"""
    assert run_python(code, PYTHONSAFEPATH="1").split() == ["False", "True"]


def test_bad_arguments_are_told_before_torch_is_imported():
    """Each in a fresh interpreter would cost seconds: all in one that may not import any of these."""
    code = """
import sys
for name in ("torch", "transformers", "datasets", "deepspeed", "wandb", "numpy"):
    sys.modules[name] = None
from megatron_lowbit.launch import main
calls = ["--version", "nothing", "evaluate --help", "evaluate model=embedded", "evaluate model=/no/where x=1",
         "generate model=/no/where", "generate model=embedded prompts=/no/where", "quantize model=embedded tp=two",
         "calibrate model=embedded calibration.data=/no/where", "demo engine=vllm", "parity artifact=/no/where",
         "evaluate model=embedded evaluation.data=a.csv", "evaluate engine=deepspeed", "generate wandb=offline",
         "generate model=embedded tp=2", "benchmark collectives ranks=1", "benchmark kernels tokens=0",
         "benchmark linear shapes=4096", "benchmark model models=/no/where", "slurm render /no/where",
         "benchmark gpu seconds=0", "benchmark repeats=0"]
for call in calls:
    try:
        print(main(call.split()), file=sys.stderr)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("megatron-lowbit: ")] == ["0", "2", "0", *["2"] * 19]
    assert len(lines) == 22 + 20, "one line for each that is wrong"


# transformers does `from kernels import ...` where the Hugging Face package `kernels` is installed, and ours is a
# folder of that name. `python -c` and `python -m` put the working directory first on the path, unless PYTHONSAFEPATH
# is set.


@pytest.fixture
def hub_package(tmp_path) -> str:
    """A folder with a stand-in for the package of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    return str(tmp_path)


def test_who_answers_to_the_name_kernels(hub_package):
    code = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    assert Path(run_python(code, PYTHONPATH=hub_package).strip()) == ROOT / "kernels" / "__init__.py"  # the trap
    safe = Path(run_python(code, PYTHONPATH=hub_package, PYTHONSAFEPATH="1").strip())
    assert safe == Path(hub_package) / "kernels" / "__init__.py"


HUB_KERNELS = """
import sys
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
from megatron_lowbit.kernels import pack_bits
import torch
assert pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]
print(is_kernels_available())
"""


def test_transformers_imports_in_the_repository_root():
    run_python(HUB_KERNELS, PYTHONSAFEPATH="1")


def test_transformers_imports_with_the_root_on_the_path():
    """It finds our folder, sees no version it knows, and goes on without; ours still work under their own name."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        assert run_python(HUB_KERNELS).strip() == "False"
    else:
        pytest.skip("the Hugging Face package kernels is installed: here transformers needs PYTHONSAFEPATH=1")
