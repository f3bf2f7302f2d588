"""Reads a command's config from a YAML file and dotted overrides.

    load_config(EvaluateConfig, "run.yaml", ["comm.bits=4", "tp=2"])

Unknown keys and values out of range are errors that name the key, the value and the nearest valid name.
"""

from __future__ import annotations

import os
import re
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from megatron_lowbit.config.errors import LowBitError, explain, notice, one_line, shown
from megatron_lowbit.config.presets import PRESETS, named_preset, preset_key
from megatron_lowbit.config.sections import SchemeName
from megatron_lowbit.plain_yaml import DEEPEST, LONGEST, parse_yaml

StageT = TypeVar("StageT", bound=BaseModel)
SCHEMES = get_args(SchemeName)


def load_config(stage: type[StageT], file: str | None, overrides: list[str]) -> StageT:
    """Return the stage's config from a YAML file, then `key.path=value` overrides (values read as YAML).

    A file's section `schemes` holds further keys for each weights.scheme; those of the scheme that is chosen count, as
    if they stood in the file itself.

    Raises LowBitError, one line, for a file that cannot be read and for keys and values that the stage does not take.
    """
    given: dict[str, Any] = {}
    if file is not None:
        if (renamed := old_name(file)) is not None:
            model, scheme = renamed
            notice(f"{file} is not there; {model} is read with weights.scheme={scheme}")
            file, overrides = model, [f"weights.scheme={scheme}", *overrides]
        given = _read_file(stage, file)
    schemes = _take_schemes(stage, given)
    tree = _merged(stage, given, overrides)
    if of_scheme := schemes.get(_chosen_scheme(tree)):
        _merge(given, of_scheme)
        tree = _merged(stage, given, overrides)
    try:
        config = stage.model_validate(tree)
    except ValidationError as error:
        raise LowBitError(explain(stage, error)) from None
    _check_values(config.model_dump(), "")
    return config


def old_name(file: str) -> tuple[str, str] | None:
    """Return (MODEL.yaml, "W4A8") for a MODEL_w4a8.yaml that is not there while MODEL.yaml is; None for others.

    Once there was a file for every scheme of a model.
    """
    match = re.fullmatch(r"(.+)_(w\d+a\d+)(\.ya?ml)", file)
    if match is None or match[2].upper() not in SCHEMES or os.path.exists(file):
        return None
    model = match[1] + match[3]
    return (model, match[2].upper()) if os.path.isfile(model) else None


def _merged(stage: type[BaseModel], given: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Merge the stage's defaults, then a file's keys, then the overrides; not yet validated."""
    tree = stage().model_dump()  # a section that is given in part keeps the stage's other defaults
    if "experiment" in tree and "experiment=qllm" in (*overrides, f"experiment={given.get('experiment')}"):
        overrides = ["weights.preset=qllm", *overrides]
    _choose_preset(tree, given, overrides)
    _merge(tree, deepcopy(given))
    for override in overrides:
        _override(stage, tree, override)
    return tree


def _take_schemes(stage: type[BaseModel], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the section `schemes` out of a file's keys: {scheme: further keys}."""
    if "weights" not in stage.model_fields or "schemes" not in given:
        return {}
    schemes = given.pop("schemes")
    if not isinstance(schemes, dict):
        raise LowBitError(f"schemes={shown(schemes)}: give a section of keys for each scheme")
    for name, keys in schemes.items():
        if name not in SCHEMES:
            raise LowBitError(f"schemes: {shown(name)} is not one of {', '.join(SCHEMES)}")
        if not isinstance(keys, dict):
            raise LowBitError(f"schemes.{name}={shown(keys)}: give keys and values")
    return schemes


def _chosen_scheme(tree: dict[str, Any]) -> Any:
    weights = tree.get("weights")
    scheme = weights.get("scheme") if isinstance(weights, dict) else None
    return scheme if isinstance(scheme, str) else None  # what is no name, the stage's model says


def _read_file(stage: type[BaseModel], file: str) -> dict[str, Any]:
    def kind_of(path: tuple[str, ...]) -> type | None:
        key = path[2:] if path[0] == "schemes" else path
        return _text_kind(_annotation(stage, list(key))) if key else None

    try:
        text = _text_of(file) if os.path.isfile(file) else _text_of_pipe(file)
        given = parse_yaml(text, kind_of)
    except FileNotFoundError:
        where = "" if os.path.isabs(file) else f" in {os.getcwd()!r}: give its path, or go to the folder that has it"
        raise LowBitError(f"cannot read config file {shown(file)}: there is no such file{where}") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise LowBitError(f"cannot read config file {shown(file)}: {one_line(error)}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise LowBitError(f"config file {shown(file)} must hold keys and values, not {type(given).__name__}")
    return given


def _text_of(file: str) -> str:
    with open(file, encoding="utf-8-sig") as opened:  # a byte order mark is no part of the first key
        return opened.read(LONGEST + 1)


_text_of_pipe = cache(_text_of)  # arguments are parsed twice, and --config <(...) can be read once


def _override(stage: type[BaseModel], tree: dict[str, Any], override: str) -> None:
    """Put one `key.path=value` into the tree of values."""
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not key or len(path) > DEEPEST:
        example = "" if equals else ", such as model=embedded"
        raise LowBitError(f"override {shown(override)} is not of the form key.path=value{example}")
    node = tree
    for parent in path[:-1]:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise LowBitError(f"override {shown(override)}: {shown(parent)} is a value, not a section")
    annotation, leaf = _annotation(stage, path), path[-1]
    if type(None) in get_args(annotation) and text in ("null", "none", ""):
        node[leaf] = None
    elif _text_kind(annotation) is not None:
        node[leaf] = text  # prompt=123 and model=007 stay what was typed
    else:
        try:
            node[leaf] = parse_yaml(text)
        except ValueError:
            node[leaf] = text  # no YAML: whether it is a value, the stage's model says


def _text_kind(annotation: Any) -> type | None:
    """Return `str` for a field that is text, type(None) for text that may be unset, None for all other fields."""
    if annotation is str:
        return str
    return type(None) if set(get_args(annotation)) == {str, type(None)} else None


def _check_values(value: Any, key: str) -> None:
    """Refuse what no path, model or counter can hold: NUL characters, halves of characters, integers beyond 64 bits."""
    if isinstance(value, dict):
        for name, below in value.items():
            _check_values(name, f"{key}, a key")
            _check_values(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_values(item, key)
    elif isinstance(value, str):
        if "\0" in value:
            raise LowBitError(f"{key}={shown(value)}: holds a NUL character; leave it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LowBitError(f"{key}={shown(value)}: holds bytes that are not UTF-8; write it in UTF-8") from None
    elif isinstance(value, int) and value.bit_length() > 64:
        raise LowBitError(f"{key}={shown(value)}: is beyond 64 bits; give a smaller number")


def _choose_preset(tree: dict[str, Any], given: dict[str, Any], overrides: list[str]) -> None:
    """Put in the values of every preset, the last one named, before all that is given, which then wins."""
    for section in PRESETS:
        values, naming = given.get(section), preset_key(section)
        named = [str(values[naming])] if isinstance(values, dict) and naming in values else []
        pairs = (override.partition("=") for override in overrides)
        named += [text.strip(" '\"") for key, _, text in pairs if key == f"{section}.{naming}"]
        for of_section, keys in named_preset(section, named[-1]).items() if named and section in tree else ():
            if of_section in tree:
                tree[of_section] |= keys


def _merge(tree: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(tree.get(key), dict) and isinstance(value, dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _annotation(stage: type[BaseModel], path: list[str]) -> Any:
    """Return the type of the field at `path`; None where there is no such field."""
    model: Any = stage
    for name in path[:-1]:
        if name not in getattr(model, "model_fields", {}):
            return None
        model = model.model_fields[name].annotation
    field = getattr(model, "model_fields", {}).get(path[-1])
    return None if field is None else field.annotation
