"""The table of tiles: kept, read again, never trusted; and what is tried is right."""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

if find_spec("triton") is not None:
    from megatron_lowbit.kernels import gpu_tiles, triton_linear
    from megatron_lowbit.kernels.gpu_tiles import Table
    from megatron_lowbit.kernels.triton_linear import Tile

    TILE = Tile(64, 16, 64, 4, 3)


def shape(act_bits: int = 8, groups: int = 1):
    x, scale = torch.empty((5, 4096), device="meta"), torch.empty((1024, 1), device="meta")
    return triton_linear.problem(x.bfloat16(), scale, 4, act_bits, groups)


def test_a_table_is_read_again_and_merged(tmp_path):
    first, second = Table("NVIDIA H100 80GB", tmp_path), Table("NVIDIA H100 80GB", tmp_path)
    first.add("a", TILE)
    second.add("b", TILE._replace(warps=8))
    assert Table("NVIDIA H100 80GB", tmp_path).tiles == {"a": TILE, "b": TILE._replace(warps=8)}
    assert Table("another", tmp_path).tiles == {}
    (path,) = (one for one in tmp_path.iterdir() if one.suffix == ".json")
    assert path.name.startswith("tiles-NVIDIA-H100-80GB-") and path.stat().st_mode & 0o777 == 0o600
    assert Table("without a folder", None).tiles == {}


DAMAGE = {
    "cut off": lambda path: path.write_text(path.read_text()[:-9]),
    "not JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "another tile": lambda path: path.write_text(path.read_text().replace("64", "32")),
    "a list": lambda path: path.write_text("[]"),
    "written by others": lambda path: path.chmod(0o666),
    "no tile": lambda path: path.write_text(signed({"a": [64, 17, 64, 4, 3]})),
    "too short": lambda path: path.write_text(signed({"a": [64, 16]})),
    "a number for a tile": lambda path: path.write_text(signed({"a": 5})),
    "a link": lambda path: (path.rename(path.with_suffix(".old")), path.symlink_to(path.with_suffix(".old"))),
}


def signed(tiles) -> str:
    return json.dumps({"sum": gpu_tiles._sum(json.dumps(tiles, sort_keys=True)), "tiles": tiles})


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_is_measured_again(kind, tmp_path, caplog):
    table = Table("GPU", tmp_path)
    table.add("a", TILE)
    DAMAGE[kind](table.path)
    with caplog.at_level(logging.WARNING, logger="megatron_lowbit"):
        again = Table("GPU", tmp_path)
        again.add("b", TILE)
    assert len(caplog.records) == 1 and "damaged" in caplog.text and "measured again" in caplog.text
    assert again.tiles == Table("GPU", tmp_path).tiles == {"b": TILE}


def test_a_folder_of_others_is_not_used(tmp_path, monkeypatch):
    """build.py's rules: the first private folder, or none."""
    monkeypatch.setattr(gpu_tiles.build, "_folders", lambda: iter([tmp_path / "open" / "x", tmp_path / "own" / "x"]))
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "x").symlink_to(tmp_path)
    assert gpu_tiles._folder() == tmp_path / "own" / "x"
    assert os.stat(tmp_path / "own" / "x").st_mode & 0o777 == 0o700


def fake_device(monkeypatch, capturing: bool, milliseconds: dict) -> list:
    """A device that takes so long; returns the tiles that were launched."""
    launched: list = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(gpu_tiles, "_table", lambda device: table)
    monkeypatch.setattr(gpu_tiles, "_milliseconds", lambda launch, tile: (launch(tile), milliseconds.get(tile, 2.0))[1])
    table = Table("GPU", None)
    return launched


def test_the_fastest_is_kept_and_measured_once(monkeypatch):
    tried = gpu_tiles.candidates(shape(), 5)
    launched = fake_device(monkeypatch, False, {tried[2]: 1.0})
    for _ in range(2):
        assert gpu_tiles.choose(shape(), 5, torch.device("cuda"), launched.append) == tried[2]
    assert launched == tried


def test_nothing_is_timed_in_a_capture_nor_kept(monkeypatch):
    launched = fake_device(monkeypatch, True, {})
    usual = triton_linear.usual_tile(shape(), 5)
    assert gpu_tiles.choose(shape(), 5, torch.device("cuda"), launched.append) == usual and launched == []
    assert gpu_tiles._table(None).tiles == {}


@pytest.mark.parametrize("tokens", (1, 40, 4096))
def test_what_is_tried_is_read_again_and_keeps_the_order_of_sums(tokens):
    for groups in (1, 8):
        for tile in gpu_tiles.candidates(shape(8, groups), tokens):
            assert gpu_tiles._tile(list(tile)) == tile
    tried = gpu_tiles.candidates(shape(16), tokens)
    assert len(tried) > 1
    assert len({(tile.words, triton_linear.pieces(shape(16), tile, 1)) for tile in tried}) == 1
    # ... and that of every other number of tokens.
    assert tried[0].words == triton_linear.usual_tile(shape(16), 1).words


def test_names_tell_shapes_apart():
    names = {gpu_tiles.name_of(shape(bits, groups), n) for bits in (8, 16) for groups in (1, 8) for n in (1, 40, 900)}
    assert len(names) == 3 + 3 + 3  # without codes of tokens, groups of tokens are none
    assert gpu_tiles.name_of(shape(), 900) == gpu_tiles.name_of(shape(), 2000)
