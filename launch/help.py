"""The keys of a config as text for a terminal: key, default and description, section by section."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

from megatron_lowbit.config import Key, list_sections

WIDTH = 80


def explain_keys(config: BaseModel, unused: Collection[str] = ()) -> str:
    """Return the keys of `config` with its values as defaults, but for those that the command refuses."""
    blocks = []
    for section in list_sections(config):
        keys = [key for key in section.keys if key.name not in unused]
        if not keys:
            continue
        title = section.prefix.rstrip(".")
        heading = f"{title}: {section.title}" if title else "keys, their defaults and what they mean"
        lines = [textwrap.fill(heading, WIDTH), *map(_explain, keys)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _explain(key: Key) -> str:
    meaning = describe(key)
    head = f"  {key.name}={as_typed(key.default)}"
    return f"{head}\n{textwrap.fill(meaning, WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"


def describe(key: Key) -> str:
    """Return the key's description, with the words that it takes where the description does not name them all."""
    unnamed = [choice for choice in key.choices if choice not in key.description]
    words = f"{'some' if isinstance(key.default, tuple) else 'one'} of {', '.join(key.choices)}"
    return f"{key.description}; {words}" if unnamed else key.description


def as_typed(value: Any) -> str:
    """Return a default as it is typed after `key=`."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if value.isprintable() else json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    return json.dumps(value)
