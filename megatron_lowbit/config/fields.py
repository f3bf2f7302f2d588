"""Lists the fields of a config: keys, defaults, choices and descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel


def defaults(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of a config, in order."""
    values: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        values |= defaults(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return values


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key that a config takes, those of sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys


class Key(NamedTuple):
    """One key of a config. choices: the words it takes, of a key that takes no other."""

    name: str
    default: Any
    choices: tuple[str, ...]
    description: str


class Section(NamedTuple):
    """The keys that begin with `prefix`, and what they are about."""

    prefix: str
    title: str
    keys: list[Key]


def list_sections(config: BaseModel, prefix: str = "") -> Iterator[Section]:
    """Yield the config's own keys and then those of each section, with the values of `config` as defaults."""
    keys: list[Key] = []
    below: list[Section] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        named = get_args(field.annotation)[-1:] if get_origin(field.annotation) is dict else ()
        if isinstance(value, BaseModel):
            below += list_sections(value, f"{prefix}{name}.")
            continue
        if named and isinstance(named[0], type) and issubclass(named[0], BaseModel):
            below += list_sections(named[0](), f"{prefix}{name}.NAME.")
        keys.append(Key(prefix + name, value, _choices(field.annotation), _description(type(config), name)))
    yield Section(prefix, " ".join((type(config).__doc__ or "").split()), keys)
    yield from below


def _description(model: type[BaseModel], name: str) -> str:
    """Return the docstring of the field; of one that only has another default, that of the class it comes from."""
    for base in model.__mro__:
        if issubclass(base, BaseModel) and name in base.model_fields:
            text = base.model_fields[name].description
            if text:
                return " ".join(text.split())
    return ""


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the words of a Literal, also inside a tuple or beside None."""
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(choice for inner in get_args(annotation) for choice in _choices(inner))
