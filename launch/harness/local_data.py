"""The local_ tasks' questions, from files in a folder: evaluation.task_data, or lm-eval's --metadata.

FOLDER/piqa.jsonl        a JSON object per line; also piqa.jsonl.gz, or piqa.zip with a piqa.jsonl
FOLDER/BLiMP.zip         a JSON Lines file per paradigm in any folder of it; also a folder FOLDER/BLiMP
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_lowbit.config import LowBitError, one_line, shown

QUESTION = ("query", "choices", "gold")
PAIR = ("sentence_good", "sentence_bad")


def read_pairs(file: str, task_data: str | None = None, **_: Any) -> Any:
    """Return {"validation": dataset} of a paradigm of BLiMP, as lm-eval's custom_dataset; see `read`."""
    return read(file, PAIR, task_data, "BLiMP")


def read(
    file: str,
    fields: Sequence[str] = QUESTION,
    task_data: str | None = None,
    archive: str | None = None,
    **_: Any,
) -> Any:
    """Return {"validation": dataset} of a task, as lm-eval's custom_dataset.

    Args:
        file: name of the JSON Lines file, without its ending.
        fields: keys that every line has to have; `gold` is the number of one of the line's choices.
        task_data: folder of all tasks' files.
        archive: name of the zip file or folder that `file` is in, where it is not `task_data` itself.

    Raises:
        LowBitError: no such folder or file, a line that is no JSON object or lacks a key.
    """
    from datasets import Dataset

    if task_data is None:
        raise LowBitError(f"local tasks read {file}.jsonl from a folder; name it as evaluation.task_data=FOLDER")
    where, data = _content(str(task_data), file, archive)
    rows = [_row(line, fields, f"{where}, line {number}") for number, line in enumerate(data.splitlines(), 1) if line]
    if not rows:
        raise LowBitError(f"{where} is empty; it should hold a JSON object per line")
    return {"validation": Dataset.from_list(rows)}


def _content(folder: str, file: str, archive: str | None) -> tuple[str, bytes]:
    """Return (where the file was found, its bytes)."""
    root = Path(folder) / archive if archive else Path(folder)
    zipped = root.with_name(f"{root.name}.zip") if archive else root / f"{file}.zip"
    plain = root / f"{file}.jsonl"
    packed = root / f"{file}.jsonl.gz"
    try:
        if plain.is_file():
            return str(plain), plain.read_bytes()
        if packed.is_file():
            return str(packed), gzip.decompress(packed.read_bytes())
        if zipped.is_file():
            members = _members(zipped, zipped.stat().st_mtime_ns)
            if file in members:
                with zipfile.ZipFile(zipped) as opened:
                    return f"{zipped}, {members[file]}", opened.read(members[file])
            raise LowBitError(f"{str(zipped)!r} holds no {file}.jsonl")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, LowBitError):
            raise
        raise LowBitError(f"cannot read the questions of {file} in {shown(folder)}: {one_line(error)}") from None
    names = f"{plain.relative_to(folder)}, {packed.relative_to(folder)} or {zipped.relative_to(folder)}"
    raise LowBitError(f"evaluation.task_data={shown(folder)} has no questions of this task: it needs {names}")


@cache
def _members(archive: Path, changed: int) -> dict[str, str]:
    """Return {name without folder and ending: member} of the JSON Lines files of a zip file."""
    with zipfile.ZipFile(archive) as opened:
        paths = [PurePosixPath(name) for name in opened.namelist()]
    return {path.stem: str(path) for path in paths if path.suffix == ".jsonl" and "__MACOSX" not in path.parts}


def _row(line: bytes, fields: Iterable[str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LowBitError(f"{where} is no JSON: {one_line(error)}") from None
    lacking = [field for field in fields if not isinstance(row, dict) or field not in row]
    if lacking:
        raise LowBitError(f"{where} lacks {lacking[0]!r}; every line is a JSON object with {', '.join(fields)}")
    choices = row.get("choices", row.get("context_options"))
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts and (choices is not None or "gold" in fields):
        raise LowBitError(f"{where}: its choices are no list of texts, but {shown(choices)}")
    for field in set(fields) - {"choices", "context_options", "gold"}:
        if not isinstance(row[field], str):
            raise LowBitError(f"{where}: {field}={shown(row[field])} is no text")
    if "gold" in fields and not (type(row["gold"]) is int and 0 <= row["gold"] < len(choices)):
        raise LowBitError(f"{where}: gold={shown(row['gold'])} is not the number of one of {len(choices)} choices")
    return {field: row[field] for field in fields}
