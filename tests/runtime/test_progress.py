"""Bars on a terminal: a loop within a loop has its own, and the items are the same wherever they are shown."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from functools import partial

import pytest
from rich.console import Console

from megatron_lowbit.runtime import folder_progress as folders
from megatron_lowbit.runtime import metrics
from megatron_lowbit.runtime.folder_progress import folder_progress
from megatron_lowbit.runtime.metrics import progress


def test_a_loop_within_a_loop(screen):
    seen = []
    for outer in progress(range(2), 2, "groups"):
        for inner in progress(iter("abc"), 3, f"blocks of {outer}"):
            assert [task.description for task in metrics._outer.tasks] == ["groups", f"blocks of {outer}"]
            seen.append((outer, inner))
        assert [task.description for task in metrics._outer.tasks] == ["groups"]
    assert seen == [(outer, inner) for outer in range(2) for inner in "abc"]
    assert "groups" in screen.getvalue() and "blocks of 0" in screen.getvalue()


def test_a_loop_that_is_left_leaves_no_display(screen):
    """The next loop is an outer one again, after a break and after an error."""
    for _ in progress(range(3), 3, "left"):
        break
    with pytest.raises(ZeroDivisionError):
        for item in progress(range(3), 3, "failed"):
            1 / item
    assert metrics._outer is None
    assert list(progress(range(2), 2, "next")) == [0, 1]


def test_other_ranks_and_pipes_show_nothing(screen, capsys, monkeypatch):
    assert list(progress(range(2), 2, "of rank 1", rank=1)) == [0, 1] and not screen.getvalue()
    monkeypatch.setattr(metrics, "Console", lambda stderr: Console(stderr=stderr))
    assert [list(progress(range(2), 2, "inner")) for _ in progress(range(2), 2, "outer")] == [[0, 1]] * 2
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_fills(tmp_path, monkeypatch):
    """The bar follows the bytes, files in folders too, while standard error is elsewhere."""
    terminal = io.StringIO()
    monkeypatch.setattr(metrics, "Console", partial(Console, force_terminal=True, width=80))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(folders, "LOOK", 0.001)
    with folder_progress(tmp_path, 1000, "written"), contextlib.redirect_stderr(io.StringIO()) as elsewhere:
        (tmp_path / "shard").mkdir()
        for name, size, percent in (("one", 250, 26), ("shard/two", 371, 63)):
            (tmp_path / name).write_bytes(bytes(size))
            deadline = time.monotonic() + 300
            while metrics._outer.tasks[0].completed < percent:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert metrics._outer.tasks[0].completed == percent
    assert metrics._outer is None and not elsewhere.getvalue()
    assert "written" in terminal.getvalue()  # how often it is drawn, rich decides


def test_writing_that_fails_ends_its_bar(screen, tmp_path):
    with pytest.raises(OSError), folder_progress(tmp_path, 1000, "written"):
        raise OSError
    assert metrics._outer is None
    assert not [thread for thread in threading.enumerate() if thread.name == "folder-progress"]


def test_nobody_looks_where_no_bar_is_shown(screen, tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(folders, "progress", lambda *_: watched.append(True))
    with folder_progress(tmp_path, 1000, "of rank 1", rank=1):
        pass
    monkeypatch.setattr(metrics, "Console", lambda stderr: Console(stderr=stderr))
    with folder_progress(tmp_path, 1000, "in a pipe"):
        pass
    assert not watched and not screen.getvalue()
