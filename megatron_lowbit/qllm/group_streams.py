"""The two streams of hidden states that go from group to group, in files that a killed run is continued from.

full-precision stream   h  -> F(h)            what the correction aims at
quantized stream        h~ -> F~(h~)          what the next group will be given
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.runtime.distributed import on_every_rank
from megatron_lowbit.runtime.launcher_env import env_rank

FULL_PRECISION, QUANTIZED = "hp", "lowbit"  # as the files are named


class GroupStreams:
    """Keep this rank's streams in `folder`: before the group at hand, and while it runs, after it.

    shape: [windows, length, hidden]; group: the number of the group at hand; checksums: {file: SHA-256} of an
    unfinished run, whose streams before that group are opened, or None for a fresh one, whose streams are empty.
    Raises LowBitError where the disk has no room, or a file is not what was written.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        group: int,
        checksums: Mapping[str, str] | None,
    ):
        self.folder, self.shape, self.dtype, self.group = folder, shape, dtype, group
        self.full_precision, self.quantized = (
            self._open(name, group, checksums=checksums) for name in (FULL_PRECISION, QUANTIZED)
        )
        self._scratch: list[HiddenStream] = []

    def _open(
        self, name: str, number: int, hashed: bool = True, checksums: Mapping[str, str] | None = None
    ) -> HiddenStream:
        path = self.folder / f"{name}-{number}-rank{env_rank()}.bin"
        existing = checksums is not None
        checksum = checksums.get(path.name) if checksums is not None else None
        return on_every_rank(lambda: HiddenStream(path, self.shape, self.dtype, existing, checksum, hashed))

    def create_full_precision(self) -> HiddenStream:
        """Return the empty full-precision stream after the group at hand."""
        return self._open(FULL_PRECISION, self.group + 1)

    def create_quantized(self) -> HiddenStream:
        """Return the empty quantized stream after the group at hand."""
        return self._open(QUANTIZED, self.group + 1)

    def create_scratch(self) -> list[HiddenStream]:
        """Return two streams for the hidden states between the blocks of the group at hand."""
        self._scratch = [self._open("scratch", side, hashed=False) for side in (0, 1)]
        return self._scratch

    def advance(self, full_precision: HiddenStream, quantized: HiddenStream) -> None:
        """Go on to the next group, with the streams before it; delete those of the group at hand."""
        for stream in (self.full_precision, self.quantized, *self._scratch):
            stream.delete()
        self.full_precision, self.quantized, self._scratch = full_precision, quantized, []
        self.group += 1
