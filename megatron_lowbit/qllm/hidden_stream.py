"""Hidden states of all calibration windows, in memory-mapped files: what one group of blocks hands to the next."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError, unwritten
from megatron_lowbit.io.files import sha256


class HiddenStream:
    """Keep [windows, length, hidden] in `dtype` in a file; pages of it are in memory while they are used.

    Raises LowBitError where the disk has no room: the file is allocated whole when it is made, because a write to a
    mapped page of a full disk would kill the process; and for one that should exist and does not, or that no longer
    holds what was written. checksum: of an existing file, to be verified. hashed: compute one while writing.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        existing: bool = False,
        checksum: str | None = None,
        hashed: bool = True,
    ):
        self.path = path
        count = shape[0] * shape[1] * shape[2]
        size = count * dtype.itemsize
        if existing and not (path.exists() and path.stat().st_size == size):
            raise LowBitError(f"{str(path)!r} is missing or cut short; delete its folder to start the run over")
        if existing and sha256(path) != checksum:
            raise LowBitError(f"{str(path)!r} was changed or is corrupt; delete its folder to start the run over")
        try:
            with open(path, "ab") as file:
                if file.tell() != size:
                    file.truncate(0)
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise LowBitError(f"{size:,} bytes of activations: {unwritten(path, error)}") from None
        self.values = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
        self._sha = hashlib.sha256() if hashed and not existing else None
        self._hashed = 0  # windows, from the first one on

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return a copy of windows start, ..., stop - 1 on the device."""
        # In-place arithmetic on what was read must not reach the file.
        return self.values[start:stop].to(device, copy=True)

    def write(self, start: int, hidden: Tensor) -> None:
        """Write windows start, start + 1, ...; one after the other from 0 on where the stream is hashed."""
        written = self.values[start : start + len(hidden)]
        written.copy_(hidden)
        if self._sha is not None:  # what was just written is still in the cache, so this costs no reading
            assert start == self._hashed, "a hashed stream is written in order"
            self._sha.update(written.view(torch.uint8).numpy().data)
            self._hashed += len(hidden)

    def checksum(self) -> str:
        """Return the SHA-256 of the file, all of which this object has written."""
        assert self._sha is not None and self._hashed == len(self.values), "only what was written whole has one"
        return self._sha.hexdigest()

    def delete(self) -> None:
        """Remove the file; the mapping goes when the last tensor on it does."""
        self.path.unlink(missing_ok=True)
