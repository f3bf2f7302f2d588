"""Reads what an offline W&B run wrote: one `run-*.wandb` file of protobuf records.

After 7 bytes of file header it is LevelDB's log format: blocks of 32 KiB that hold fragments, each of them `crc32 (4
bytes), length (2), kind (1), payload`. A record is one fragment (kind 1), or first, middle and last ones (2, 3, 4).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
FRAGMENT = struct.Struct("<IHB")
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    project: str = ""
    run_id: str = ""
    job_type: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)  # {metric or glob: what it is drawn over}
    artifacts: list[OfflineArtifact] = field(default_factory=list)


@dataclass
class OfflineArtifact:
    name: str
    type: str
    entries: dict[str, tuple[str, str]]  # {file: (reference, digest)}


def read_run(folder: Path) -> OfflineRun:
    """The one run below `folder`."""
    (file,) = (file for file in folder.rglob("run-*.wandb") if not file.parent.is_symlink())
    return read_file(file)


def wandb_files(folder: Path) -> list[Path]:
    """The .wandb files of an output folder, oldest first."""
    found = [file for file in folder.glob("wandb/*run-*/run-*.wandb") if not file.parent.is_symlink()]
    return sorted(found, key=lambda file: file.stat().st_ctime)


def read_file(file: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for payload in _records(file.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.project, run.job_type, run.run_id = record.run.project, record.run.job_type, record.run.run_id
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "metric":
            run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            contents = record.artifact.manifest.contents
            entries = {entry.path: (entry.ref, entry.digest) for entry in contents}
            run.artifacts.append(OfflineArtifact(record.artifact.name, record.artifact.type, entries))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data.startswith(FILE_HEADER), "not a W&B file"
    position, parts = len(FILE_HEADER), []
    while position + FRAGMENT.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < FRAGMENT.size:  # too little left in the block for a fragment
            position += room
            continue
        checksum, length, kind = FRAGMENT.unpack_from(data, position)
        if kind == 0:  # the rest of the block is zeros
            position += room
            continue
        payload = data[position + FRAGMENT.size : position + FRAGMENT.size + length]
        if len(payload) < length:  # what a kill leaves
            return
        assert zlib.crc32(bytes([kind]) + payload) == checksum, f"wrong checksum at byte {position}"
        position += FRAGMENT.size + length
        if kind in (FULL, FIRST):
            parts = []
        parts.append(payload)
        if kind in (FULL, LAST):
            yield b"".join(parts)
