"""What an earlier run has finished, kept with all that it depends on: a sealed JSON file each.

A file with other settings, one that is damaged, and one that was changed count for nothing: the work is done again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, unwritten
from megatron_lowbit.io.files import SEAL, read_json, seal_of, write_sealed


def read_kept(file: Path, settings: Mapping[str, Any]) -> Any:
    """Return what is kept for these settings, of JSON values; None where there is nothing."""
    try:
        record = read_json(file) if file.is_file() else {}
    except LowBitError:  # damaged
        return None
    if record.get(SEAL) != seal_of(record) or record.get("settings") != json.loads(json.dumps(settings)):
        return None
    return record.get("found")


def write_kept(file: Path, settings: Mapping[str, Any], found: Any) -> Any:
    """Keep what was found, under a temporary name until it is whole, and return it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(file, error) from None
    write_sealed(file, {"settings": dict(settings), "found": found})
    return found


def file_name(name: str) -> str:
    """Return a file's name for a row or task; names that differ stay different."""
    plain = re.sub(r"[^\w.+-]+", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
