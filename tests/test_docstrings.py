"""A function's docstring says what it does, beginning with a verb; that of a public name is complete by itself."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import tiny_models
from commands import needs_deepspeed, needs_megatron
from docstring_cases import run_example

import megatron_lowbit as lowbit

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    str(file.relative_to(ROOT)): file
    for folder in ("megatron_lowbit", "kernels", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in file.parents)
}

# No list of verbs is ever complete. First words that are none of these, not capitalized, or end in s (nouns in the
# plural; "Returns" instead of "Return") are what docstrings without a verb have begun with.
NOT_VERBS = re.compile(
    "A|All|An|Any|Around|As|At|Before|Both|By|Each|Every|For|From|How|In|Inside|Into|Like|Most|No|None|Of|On|One|Or|"
    "Some|That|The|There|This|Those|What|Whatever|Where|Whether|Which|Who|Whoever|Whose|Why|With|Within|Without"
)


# Files that are being rewritten; their docstrings follow. A file that passes leaves the list.
def begins_with_a_verb(text: str) -> bool:
    word = re.split(r"[\s.,:;(]", text.strip(), maxsplit=1)[0]
    plural = word.endswith("s") and not word.endswith("ss")
    return bool(re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", word)) and not NOT_VERBS.fullmatch(word) and not plural


def without_a_verb(file: Path) -> list[str]:
    """["line name: docstring"] of the functions whose docstring does not begin with a verb."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    texts = [(f"{node.lineno} {node.name}", ast.get_docstring(node)) for node in functions]
    return [f"{where}: {text.splitlines()[0]}" for where, text in texts if text and not begins_with_a_verb(text)]


@pytest.mark.parametrize("name", FILES)
def test_docstrings_begin_with_a_verb(name):
    found = without_a_verb(FILES[name])
    assert found == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the sum.", True),
        ("All-reduce x [..., E].", True),
        ("Pass it on.", True),
        ("The sum of all.", False),
        ("Whether it is there.", False),
        ("Of a whole model.", False),
        ("Returns the sum.", False),
        ("{name: tensor} of all.", False),
        ("x [..., E] -> codes.", False),
        ("uint8 [n].", False),
    ],
)
def test_what_counts_as_a_verb(text, expected):
    assert begins_with_a_verb(text) == expected


# What help() shows of a public name: its own text, and for a class that of every public method and property.


def public(name: str) -> dict[str, object]:
    """{dotted name: function} of a public name itself, and of what a class and our classes below it define."""
    value = getattr(lowbit, name)
    if not inspect.isclass(value):
        return {name: value}
    ours = [c for c in reversed(value.__mro__) if c.__module__.startswith("megatron_lowbit.")]
    members = {key: member for c in ours for key, member in vars(c).items() if not key.startswith("_")}
    functions = {
        key: getattr(m, "fget", None) or getattr(m, "__func__", m)
        for key, m in members.items()
        if isinstance(m, property | classmethod | staticmethod) or inspect.isfunction(m)
    }
    return {f"{name}.{key}": function for key, function in functions.items()}


def section(text: str, title: str) -> str:
    """A section's lines; empty where there is none."""
    found = re.search(rf"^{title}.*:\n((?:    .*\n|\n)+)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    return found.group(1) if found else ""


PUBLIC = [pytest.param(name, marks=needs_megatron if name == "apply_to_megatron" else ()) for name in lowbit.__all__]


@pytest.mark.parametrize("name", PUBLIC)
def test_help_is_complete_by_itself(name):
    value, functions = getattr(lowbit, name), public(name)
    parameters = list(inspect.signature(value).parameters) if value is not lowbit.LowBitError else ["message"]
    listed = re.findall(r"^    (\w+):", section(value.__doc__, "Args"), re.MULTILINE)
    assert listed == parameters, "every argument, in order"
    assert section(value.__doc__, "Example")
    for where, function in functions.items():
        text, signature = function.__doc__, inspect.signature(function)
        assert text, f"{where} has no docstring"
        assert not re.search(r"\b(as|see) (in|for|of|there)\b", text), f"{where} sends the reader elsewhere"
        expected = [key for key in signature.parameters if key not in ("self", "cls")]
        assert re.findall(r"^    (\w+):", section(text, "Args"), re.MULTILINE) == expected, where
        property_like = not expected and text.startswith("Return ") and "\n" not in text.strip()
        returns = signature.return_annotation not in ("None", None)
        assert bool(section(text, "Returns")) == (returns and not property_like), where
    if not inspect.isclass(value):
        assert section(value.__doc__, "Raises"), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama in "model"; quantized, calibrated for two ranks, and with its calibration, in "artifact"."""
    path = tmp_path_factory.mktemp("example")
    model = tiny_models.build("llama")
    model.save_pretrained(path / "model")
    tiny_models.save_artifact(tiny_models.make_artifact(model, "W4A8", (2,)), path / "artifact")
    tiny_models.make_stats(model, (2,)).save(path / "artifact")
    return path


ON_RANKS = {"HybridReducer": (), "apply_to_deepspeed": needs_deepspeed, "apply_to_megatron": needs_megatron}


@pytest.mark.parametrize("name", [name for name in lowbit.__all__ if name not in ON_RANKS])
def test_an_example_runs(name, folder):
    assert run_example(0, 1, name, folder) == ""


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in ON_RANKS.items()])
def test_an_example_runs_on_two_ranks(name, folder, two_ranks):
    assert two_ranks.run(run_example, name, folder) == ["", ""]
