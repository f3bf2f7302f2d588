"""Bars on a terminal: a loop within a loop has its own, and the items are the same wherever they are shown."""

from __future__ import annotations

import pytest
from rich.console import Console

from megatron_lowbit.runtime import metrics
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
