"""The tile of a product: measured at its first call on a device, and kept for the next process.

A shape that nobody has measured is timed with each of a few tiles, once, outside of a CUDA graph's capture; inside,
triton_linear.py's usual tile serves. No tile changes a bit of a result.

The table lies in the folder of build.py, which belongs to this user alone:

    tiles-DEVICE-KEY.json    KEY: a digest of the kernels' source, Triton's version and the tiles that are tried
                             {"sum": SHA-256 of the tiles as JSON, "tiles": {shape: [a Tile]}}

A table that is not what its sum says, or names a tile that is not tried, is measured again, and one line says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from megatron_lowbit.kernels import build, triton_linear
from megatron_lowbit.kernels.quantizer import TokenQuantizer
from megatron_lowbit.kernels.triton_linear import Problem, Tile, is_split, usual_tile
from megatron_lowbit.temporary import beside, remove

logger = logging.getLogger("megatron_lowbit")

REPEATS = 20  # launches of a measurement


def quant_linear(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight_bits: int,
    acts: TokenQuantizer,
    dtype: torch.dtype,
) -> Tensor:
    """Launch quant_linear of triton_linear.py with the tile that is best here."""

    def launch(tile: Tile) -> Tensor:
        weight = packed_weight, scale, zero_point, weight_bits
        return triton_linear.quant_linear(x, *weight, acts, dtype, tile)

    shape = triton_linear.problem(x, scale, weight_bits, acts.bits, acts.groups)
    return launch(choose(shape, len(x), x.device, launch))


def candidates(shape: Problem, tokens: int) -> list[Tile]:
    """Return the tiles that are tried, the usual one first. Those of floats agree in the order of their sums."""
    usual = usual_tile(shape, tokens)
    deep = usual._replace(stages=usual.stages + 2)
    if shape.exact_floats:
        return [usual, deep]
    if is_split(tokens):
        tiles = [usual, deep, usual._replace(channels=128, warps=8)]
        return tiles if shape.floats or usual.warps > 4 else [*tiles, usual._replace(words=2 * usual.words)]
    if usual.channels > 64:
        return [usual, deep, usual._replace(channels=64, warps=4)]
    return [usual, usual._replace(tokens=32, warps=4)]


def choose(shape: Problem, tokens: int, device: torch.device, launch: Callable[[Tile], object]) -> Tile:
    """Return the shape's tile. launch: makes the product with a tile, to be timed."""
    if device.type != "cuda":
        return usual_tile(shape, tokens)
    table = _table(device)
    key = name_of(shape, tokens)
    tile = table.tiles.get(key)
    if tile is None:
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return usual_tile(shape, tokens)
        tile = min(candidates(shape, tokens), key=lambda one: _milliseconds(launch, one))
        table.add(key, tile)
    return tile


def name_of(shape: Problem, tokens: int) -> str:
    """Return what a tile depends on: few tokens by the tile that holds them, many all alike."""
    tile = usual_tile(shape, tokens)
    return (
        f"W{shape.bits}A{shape.act_bits} {shape.out_features}x{shape.blocks * shape.width} "
        f"groups {shape.weight_groups},{shape.act_groups} {str(shape.dtype).removeprefix('torch.')} "
        f"{'split' if is_split(tokens) else 'whole'} {tile.tokens}"
    )


def _milliseconds(launch: Callable[[Tile], object], tile: Tile) -> float:
    """Return how long a call takes; infinity where the tile does not run here, for want of shared memory, say."""
    try:
        for _ in range(3):
            launch(tile)
    except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError):
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        launch(tile)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


class Table:
    """Tiles of one device. folder: where they are kept; None: for this process only."""

    def __init__(self, name: str, folder: Path | None):
        self.path = None if folder is None else folder / f"tiles-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{_digest()}.json"
        self.tiles: dict[str, Tile] = {}
        if self.path is not None:
            self.tiles = self._read(self.path)

    def add(self, key: str, tile: Tile) -> None:
        """Keep a tile, beside what other processes have kept meanwhile."""
        self.tiles[key] = tile
        if self.path is None:
            return
        with contextlib.suppress(OSError), build._one_at_a_time(self.path.parent):
            self.tiles = {**self._read(self.path), **self.tiles}
            tiles = json.dumps(self.tiles, sort_keys=True)
            unfinished = beside(self.path)
            try:
                unfinished.touch(mode=0o600)
                unfinished.write_text(f'{{"sum": "{_sum(tiles)}", "tiles": {tiles}}}\n')
                os.replace(unfinished, self.path)
            finally:
                remove(unfinished)

    @staticmethod
    def _read(path: Path) -> dict[str, Tile]:
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        except OSError:
            opened = None
        try:
            if opened is None:
                raise ValueError("a link, or not readable")
            with open(opened) as file:
                found = os.fstat(opened)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    raise ValueError("others may write it")
                content = json.load(file)
            tiles = content["tiles"]
            if content["sum"] != _sum(json.dumps(tiles, sort_keys=True)):
                raise ValueError("not what its sum says")
            return {key: _tile(values) for key, values in tiles.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("GPU tiles: %s is damaged (%s); they are measured again", path, type(error).__name__)
            remove(path)
            return {}


def _tile(values: list[int]) -> Tile:
    """Return a tile from a table; ValueError for one that no shape is tried with."""
    tile = Tile(*values)
    powers = all(type(value) is int and value in (16, 32, 64, 128) for value in tile[:3])
    if not powers or tile.warps not in (4, 8) or tile.stages not in range(1, 8):
        raise ValueError(f"no tile: {values}")
    return tile


_tables: dict[int, Table] = {}


def _table(device: torch.device) -> Table:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _tables:
        _tables[index] = Table(torch.cuda.get_device_name(index), _folder())
    return _tables[index]


def _folder() -> Path | None:
    """Return a folder that is this user's alone; None where there is none."""
    for folder in build._folders():
        with contextlib.suppress(OSError):
            if build._is_private(folder):
                return folder
    return None


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest() -> str:
    sources = [Path(path).read_text() for path in (__file__, triton_linear.__file__)]
    return _sum("\0".join([*sources, triton.__version__]))[:16]
