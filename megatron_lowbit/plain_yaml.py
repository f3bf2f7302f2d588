"""Read YAML that people write by hand, in bounded time and memory, without YAML 1.1's surprises.

04:00:00, 2024-02-30    text, where YAML 1.1 reads a number in base 60 and a date (which need not exist)
a: 1, a: 2              refused, where PyYAML takes the last
&a [*a], &b [*a, *a]    aliases may not contain themselves, nor grow to more than LARGEST values
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

LONGEST = 2**18  # characters: PyYAML reads about 100,000 a second
LARGEST = 20_000  # values, with every alias written out
DEEPEST = 32  # levels of lists and sections
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_MISREAD = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def parse_yaml(text: str, kind_of: Callable[[tuple[str, ...]], type | None] = lambda path: None) -> Any:
    """Return the values of a YAML document.

    Args:
        text: The document, at most LONGEST characters.
        kind_of: Tells for a path of keys what is expected there: `str` for text, which is then taken as it is written
            (123, yes and null too); type(None) for text that null unsets; None for anything else.

    Raises:
        ValueError: In one line, for what is no YAML, too long, too large or too deep, and for a key given twice.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST:,} characters")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _measure(node, {}, set())
        _keep_text(node, (), kind_of, set())
        return yaml.SafeLoader("").construct_document(node)  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except _TooMuch as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # PyYAML's constructors raise whatever int(), datetime and their own regexes do
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"not a value of YAML: {message or type(error).__name__}") from None


class _TooMuch(Exception):
    pass


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """Return (values, levels) of a node with its aliases written out; refuses too many of them and keys given twice."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _TooMuch(f"an alias in line {node.start_mark.line + 1} contains itself")
    above.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    children = [_measure(child, known, above) for child in _children(node)]
    above.discard(id(node))
    size, levels = 1 + sum(size for size, _ in children), 1 + max((levels for _, levels in children), default=0)
    if size > LARGEST:
        raise _TooMuch(f"with its aliases it holds more than {LARGEST:,} values")
    if levels > DEEPEST:
        raise _TooMuch(f"it is nested more than {DEEPEST} levels deep")
    known[id(node)] = size, levels
    return size, levels


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _TooMuch(f"key {key.value[:80]!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))


def _keep_text(
    node: yaml.Node, path: tuple[str, ...], kind_of: Callable[[tuple[str, ...]], type | None], seen: set[int]
) -> None:
    """Tag as text what YAML 1.1 misreads, and what is expected to be text."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag in _MISREAD and not _is_number(node):
        node.tag = _TEXT
    if isinstance(node, yaml.MappingNode):
        for number, (key, value) in enumerate(node.value):
            here = (*path, str(key.value)) if isinstance(key, yaml.ScalarNode) else path
            kind = kind_of(here)
            if isinstance(value, yaml.ScalarNode) and kind is not None and (kind is str or value.tag != _NULL):
                written = yaml.ScalarNode(_TEXT, value.value, value.start_mark, value.end_mark, value.style)
                node.value[number] = key, written  # a copy: an alias may give the same node to a number too
            else:
                _keep_text(value, here, kind_of, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _keep_text(value, path, kind_of, seen)


def _is_number(node: yaml.ScalarNode) -> bool:
    return not node.tag.endswith("timestamp") and ":" not in node.value
