"""Reading and writing files: JSON objects, and safetensors with a JSON beside them.

Each file is written under a temporary name and renamed, the JSON last: a pair exists when its JSON does. The JSON holds
the checksum of the tensors it belongs to, and a seal, the checksum of itself: the sha256 of its other keys, sorted and
without white space. Whatever is wrong with a file is one LowBitError that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line, unwritten
from megatron_lowbit.temporary import beside, remove

logger = logging.getLogger("megatron_lowbit")

FORMAT = 4
WITHOUT_SEAL = 3  # the format before, which still loads
WITH_HEAD = 5  # of a checkpoint with a quantized output projection alone, so that an earlier version refuses it
EXTENDED = 6  # of a checkpoint that is rotated, clipped, has bits of its own for every linear or quantized experts
SEAL = "json_sha256"
_warned: set[Path] = set()  # folders whose lack of seals was logged


def ensure_writable(folder: str | Path) -> Path:
    """Create the folder and prove that files can be written there; raises LowBitError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = beside(folder / "write-probe")
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or one_line(error)
        raise LowBitError(f"output_dir {str(folder)!r} is not writable ({why}); choose another") from None
    return folder


def missing_folders(folder: str | Path) -> list[Path]:
    """Return those of a folder and its parents that are not there, innermost first."""
    folder = Path(folder)
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing, innermost first; the others stay."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
            folder.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = beside(path)
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritten(path, error) from None
    finally:
        discard(temporary)


def save_pair(stem: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors, then the JSON that makes them count."""
    checksum = write_tensors(stem.with_suffix(".safetensors"), tensors)
    write_sealed(stem.with_suffix(".json"), {"format": FORMAT, "sha256": checksum, **meta})


def write_sealed(path: Path, meta: dict[str, Any]) -> None:
    """Write a JSON object with its seal."""
    write_json(path, {**meta, SEAL: seal_of(meta)})


def seal_of(meta: dict[str, Any]) -> str:
    """Return the sha256 of a JSON object without its seal, in canonical form: keys sorted, no white space, ASCII."""
    rest = {key: value for key, value in meta.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically; returns its sha256."""
    folder = beside(path)  # safetensors itself writes to a temporary file, which a kill leaves behind: in here
    temporary = folder / path.name
    try:
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors leaves files that only their owner can read
        checksum = sha256(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from None
    finally:
        remove(folder)
    return checksum


def load_pair(stem: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, the JSON); raises LowBitError where either is damaged, or the JSON lacks a key."""
    meta = read_meta(stem, "sha256", *keys)
    return read_tensors(stem.with_suffix(".safetensors"), meta["sha256"]), meta


def read_meta(stem: Path, *keys: str, formats: tuple[int, ...] = (FORMAT, WITHOUT_SEAL)) -> dict[str, Any]:
    path = stem.with_suffix(".json")
    meta = read_json(path)
    if "format" in meta and (type(meta["format"]) is not int or meta["format"] not in formats):
        *more, last = map(str, formats)
        raise LowBitError(
            f"{str(stem)!r} has format {str(meta['format'])[:20]}; this version reads {', '.join(more)} and {last}: "
            "write it again"
        )
    if not {"format", *keys} <= set(meta):
        raise LowBitError(f"cannot read {str(stem)!r}: its JSON is incomplete; write it again")
    if SEAL in meta or meta["format"] != WITHOUT_SEAL:
        check_seal(path, meta)
    elif path.parent not in _warned:
        _warned.add(path.parent)
        logger.warning(
            "%r was written by an earlier version, without checksums of its JSON files: a change in them may go "
            "unnoticed; write it again to have them checked",
            str(path.parent),
        )
    return meta


def check_seal(path: Path, meta: dict[str, Any]) -> None:
    """Raise LowBitError where the JSON object `meta` of the file `path` is not what was written."""
    if meta.get(SEAL) != seal_of(meta):
        raise LowBitError(f"{str(path)!r} was changed or is corrupt (its checksum differs); write it again")


def read_json(path: Path, nan: bool = False) -> dict[str, Any]:
    """Read a JSON object; raises LowBitError. nan: whether NaN and Infinity, which JSON does not have, are let
    through."""
    try:
        value = parse_json(path.read_text(), nan)
        if not isinstance(value, dict):
            raise ValueError("its JSON is incomplete")
        return value
    except (OSError, ValueError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


def parse_json(text: str | bytes, nan: bool = False) -> Any:
    """Parse any JSON value. Raises ValueError for what is no JSON, a key that comes twice, too deep nesting, and NaN
    unless `nan`."""
    try:
        constant = None if nan else _no_constant
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"its JSON has the key {twice[:60]!r} twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"its JSON holds {name}, which is no number")


def read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if sha256(path) != checksum:
            raise LowBitError(f"{str(path)!r} is truncated or corrupt (its checksum differs); write it again")
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


@contextlib.contextmanager
def complete(file: Path) -> Iterator[None]:
    """Surround the use of what was read from `file`: a missing tensor, a wrong shape or value is one LowBitError."""
    try:
        yield
    except KeyError as error:
        raise LowBitError(f"{str(file)!r} is incomplete: it lacks {error.args[0]}; write it again") from None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise LowBitError(f"{str(file)!r}: {one_line(error)}; write it again") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Surround other packages' code that writes `path`: what the system refuses is one LowBitError.

    Packages in Rust (tokenizers, safetensors) raise an Exception of their own, with "(os error NUMBER)" in its text.
    """
    try:
        yield
    except LowBitError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or "(os error " in str(error):
            raise unwritten(path, error) from None
        raise


@contextlib.contextmanager
def all_or_nothing(folder: str | Path) -> Iterator[None]:
    """Surround the writing of files that belong together: where it fails, those that are new in `folder` are removed.

    Files that were there before stay, as they were or written anew. A rank on a machine without the folder writes none.
    """
    before = _files(folder)
    try:
        yield
    except LowBitError:
        for path in _files(folder) - before:
            discard(path)
        raise


def _files(folder: str | Path) -> set[Path]:
    try:
        return {path for path in Path(folder).iterdir() if path.is_file()}
    except FileNotFoundError:
        return set()


def discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
