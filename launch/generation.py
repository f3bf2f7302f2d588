"""generation_config.json: how a model's makers want text to be continued (end-of-text tokens, penalties, ...).

It lies beside config.json, in a model's folder and in an artifact's; a model without one has none in its artifacts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.io.files import discard

FILE = "generation_config.json"


def copy_generation_config(name: str | Path, folder: str | Path) -> None:
    """Put the file of the model `name`, a folder or a hub id, into `folder`, or remove another model's from there.

    Raises OSError where the folder cannot be written to.
    """
    source, target = find_generation_config(name), Path(folder) / FILE
    if source is None:
        discard(target)
    elif source.resolve() != target.resolve():
        temporary = target.with_name(f".{FILE}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)


def find_generation_config(name: str | Path) -> Path | None:
    """Return the file of a model, a folder or a hub id; None where it has none."""
    if Path(name).is_dir():
        file = Path(name) / FILE
        return file if file.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def load_generation_config(name: str | Path) -> Any:
    """Return transformers' GenerationConfig of a model or artifact; None where it has none.

    Raises LowBitError for a file that is damaged.
    """
    from transformers import GenerationConfig

    file = find_generation_config(name)
    if file is None:
        return None
    try:
        return GenerationConfig.from_pretrained(file.parent)
    except Exception as error:  # whatever transformers raises
        raise LowBitError(f"cannot read {str(file)!r}: {one_line(error)}") from None
