"""Reading and writing files: JSON objects, and safetensors with a JSON beside them.

Each file is written under a temporary name and renamed, the JSON last: a pair exists when its JSON does, and its JSON
holds the checksum of the tensors it belongs to. Whatever is wrong with a file is one LowBitError that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.temporary import beside, remove

FORMAT = 3


def ensure_writable(folder: str | Path) -> Path:
    """Create the folder and prove that files can be written there; raises LowBitError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = beside(folder / "write-probe")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise LowBitError(f"output_dir {str(folder)!r} is not writable ({error.strerror}); choose another") from None
    return folder


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
        raise LowBitError(f"cannot write {str(path)!r}: {error.strerror}") from None
    finally:
        discard(temporary)


def save_pair(stem: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors, then the JSON that makes them count."""
    checksum = write_tensors(stem.with_suffix(".safetensors"), tensors)
    write_json(stem.with_suffix(".json"), {"format": FORMAT, "sha256": checksum, **meta})


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
        raise LowBitError(f"cannot write {str(path)!r}: {one_line(error)}") from None
    finally:
        remove(folder)
    return checksum


def load_pair(stem: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the JSON); raises LowBitError where either is damaged, or the JSON lacks a key."""
    meta = read_meta(stem, "sha256", *keys)
    return read_tensors(stem.with_suffix(".safetensors"), meta["sha256"]), meta


def read_meta(stem: Path, *keys: str) -> dict[str, Any]:
    meta = read_json(stem.with_suffix(".json"))
    if "format" in meta and meta["format"] != FORMAT:
        raise LowBitError(f"{str(stem)!r} has format {meta['format']}; this version reads {FORMAT}: write it again")
    if not {"format", *keys} <= set(meta):
        raise LowBitError(f"cannot read {str(stem)!r}: its JSON is incomplete; write it again")
    return meta


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises LowBitError."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("its JSON is incomplete")
        return value
    except (OSError, ValueError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


def read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if sha256(path) != checksum:
            raise LowBitError(f"{str(path)!r} is truncated or corrupt (its checksum differs); write it again")
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


@contextlib.contextmanager
def complete(stem: Path) -> Iterator[None]:
    """Around the use of loaded tensors: JSON and safetensors that do not belong together are one clear error."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LowBitError(f"{str(stem)!r} is incomplete ({one_line(error)}); write it again") from None


def discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
