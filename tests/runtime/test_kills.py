"""Commands that are killed and run again: an undisturbed run's results, and nothing left behind (kill_matrix.py)."""

from __future__ import annotations

import json

import kill_matrix
import pytest


def faults(names: list[str], kills: int, tmp_path, seed: int = 7) -> list[str]:
    said: list[str] = []
    tallies = kill_matrix.campaign(names, kills, seed, tmp_path, said.append)
    assert sum(tally.kills for tally in tallies.values()) >= kills
    return [fault for tally in tallies.values() for fault in tally.faults]


def test_a_few(tmp_path):
    assert not (found := faults(["quantize rtn", "calibrate"], 4, tmp_path)), "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_two_hundred(seed, tmp_path):
    assert not (found := faults([*kill_matrix.OF_ONE_PROCESS], 30, tmp_path, seed)), "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_of_several_processes(seed, tmp_path):
    assert not (found := faults([*kill_matrix.OF_SEVERAL_PROCESSES], 7, tmp_path, seed)), "\n".join(found)


def test_what_counts_as_the_same(tmp_path):
    """An oracle that sees a changed file, a changed figure and a file that is left."""
    record = {"rows": [{"kl": 0.5, "seconds": 3.0}], "environment": {}, "config": {}}
    (tmp_path / "evaluate.json").write_text(json.dumps(record))
    (tmp_path / "lowbit.json").write_text("{}")
    before = kill_matrix.results(tmp_path)
    (tmp_path / "evaluate.json").write_text(json.dumps({**record, "rows": [{"kl": 0.5, "seconds": 4.0}]}))
    assert kill_matrix.results(tmp_path) == before
    (tmp_path / "evaluate.json").write_text(json.dumps({**record, "rows": [{"kl": 0.6, "seconds": 3.0}]}))
    assert kill_matrix.results(tmp_path) != before
    (tmp_path / ".x.tmp").write_text("")
    assert ".x.tmp" in kill_matrix.results(tmp_path)
