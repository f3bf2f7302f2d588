"""What lm-eval hands from rank to rank, as the plain values that our messages take: nothing is unpickled.

{("acc", "none"): [1.0]}  <->  {"pairs": [[{"tuple": ["acc", "none"]}, [1.0]]]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def to_plain(value: Any) -> Any:
    """Return dicts of any keys, tuples and numpy's numbers as plain values, all else as its text, as lm-eval's files
    have it."""
    if isinstance(value, Mapping):
        return {"pairs": [[to_plain(key), to_plain(held)] for key, held in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [to_plain(item) for item in value]}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def from_plain(value: Any) -> Any:
    """Return what to_plain was given."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(from_plain(value["tuple"]))
    return {from_plain(key): from_plain(held) for key, held in value["pairs"]}
