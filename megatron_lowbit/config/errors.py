"""Says in one line what is wrong with the values that somebody gave."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import reprlib
from collections.abc import Collection
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_lowbit.config.fields import dotted_keys

logger = logging.getLogger("megatron_lowbit")
NOTICED = "MEGATRON_LOWBIT_NOTICED"  # set for ranks whose starter has read the same arguments


class LowBitError(Exception):
    """Bad input: one line that names the value and the fix. Commands print it and exit with code 2.

    Args:
        message: the line.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> try:
        ...     lowbit.Artifact.load("nowhere")
        ... except lowbit.LowBitError as error:
        ...     print(error)
        artifact folder 'nowhere' does not exist; write one with calibrate or quantize
    """


@cache
def notice(text: str) -> None:
    """Log a line, once per process and on rank 0 alone: an old spelling that still works is told and not refused."""
    if os.environ.get("RANK", "0") in ("", "0") and NOTICED not in os.environ:
        logger.warning("%s", text)


def one_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, cut where it is very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _cut(lines[0], 500) if lines else type(error).__name__


def unwritten(path: str | os.PathLike[str], error: Exception) -> LowBitError:
    """Return what to raise where `path` cannot be written: why, and what helps.

    error: an OSError, or safetensors' own, which has the number of the system's error in its text alone.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    why = os.strerror(number) if number is not None else one_line(error)
    return LowBitError(f"cannot write {str(path)!r}: {why}; {_HELPS.get(number or 0, 'choose another output_dir')}")


_HELPS = {
    errno.ENOSPC: "free space, or set output_dir to a folder on another disk",
    errno.EDQUOT: "delete files of yours, or set output_dir to a folder on another disk",
    errno.EROFS: "set output_dir to a folder on a disk that can be written to",
    errno.EACCES: "ask for the right to write there, or choose another output_dir",
    errno.EPERM: "ask for the right to write there, or choose another output_dir",
}


def shown(value: Any) -> str:
    """Return the repr of a value that somebody gave, for a message: cut where it is long, whatever the value is."""
    try:
        return _cut(_REPR.repr(value), 200)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def explain(stage: type[BaseModel], error: ValidationError) -> str:
    """Return one line for the first problem: the key, the value, and the nearest valid name where one is near."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = dotted_keys(stage)
        leaves = {name.rpartition(".")[2]: name for name in valid}
        near = nearest(key, valid) or leaves.get(nearest(key.rpartition(".")[2], list(leaves)) or "")
        hint = f"; did you mean {near!r}?" if near else f"; valid keys: {', '.join(valid)}"
        return f"unknown config key {shown(key)}{hint}"
    key, value = _cut(key, 200), problem["input"]
    if problem["type"] == "literal_error":
        choices = [part.strip("' ") for part in str(problem["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        near = nearest(str(value), choices) if isinstance(value, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        return f"{key}={shown(value)} is not one of {', '.join(choices)}{hint}"
    if problem["type"] == "tuple_type":
        item = value if isinstance(value, str) else shown(value)  # an int may have more digits than str() writes
        return f"{key}={shown(value)}: it is a list; write {key}=[{_cut(item, 200)}]"
    message = _cut(problem["msg"].removeprefix("Value error, "), 300)
    if not key:  # a rule between settings names them itself
        return message
    if problem["type"] == "value_error" and isinstance(value, dict):  # a rule between the keys of a section
        return f"{key}: {message}"
    return f"{key}={shown(value)}: {message[:1].lower()}{message[1:]}"


def suggest(name: str, choices: Collection[str]) -> str:
    """Return how a message about an unknown name ends: with the choice that it is a slip of, or with all of them."""
    near = nearest(name, list(choices))
    return f"; did you mean {near!r}?" if near else f"; choose one of {', '.join(choices)}"


def nearest(name: str, choices: list[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that a name is a slip of, capitals aside; None where it is no slip at all.

    cutoff: how alike they have to be; 1 is the same.
    """
    if len(name) > 100:
        return None
    folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 20]} ... ({len(text):,} characters)"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 150
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20
