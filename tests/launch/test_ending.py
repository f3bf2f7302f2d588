"""The last lines of a command, and sentences on a terminal."""

from __future__ import annotations

import io
import os
import pty
import shlex

import pytest
from commands import CALIBRATION, run_here

from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.launch import arguments
from megatron_lowbit.launch.ending import duration, tell_ending, wrap_command
from megatron_lowbit.runtime.say import say


def test_duration():
    assert [duration(s) for s in (0.4, 59.4, 200, 3599.6, 7500)] == [
        "0 s",
        "59 s",
        "3 min 20 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


def test_a_command_is_broken_between_words():
    words = ["megatron-lowbit", "evaluate", "model=a b", "artifact=" + "x" * 70, "evaluation.data=TEXT"]
    text = wrap_command(words)
    assert shlex.split(text.replace("\\\n", " ")) == words
    first, *rest = text.splitlines()
    assert len("next: " + first) <= 80 and len(rest) == 2


def test_what_comes_next_is_a_command(tmp_path, capsys):
    folder = tmp_path / "a folder"
    assert run_here("calibrate", "model=embedded", "comm.tp_sizes=[4]", *CALIBRATION, f"output_dir={folder}") == 0
    err = capsys.readouterr().err
    assert f"wrote calibrate.json and report.html to {folder} in " in err
    words = shlex.split(err.partition("next: ")[2].replace("\\\n", " "))
    assert words[:2] == ["megatron-lowbit", "evaluate"] and f"artifact={folder}" in words
    config, _ = arguments.parse("evaluate", arguments.CONFIGS["evaluate"], words[2:])
    assert config.virtual_tp == 4, "what the folder has a plan for"
    assert config.evaluation.data == "stdlib:validation"


def test_without_a_plan_nobody_communicates(tmp_path, capsys):
    tell_ending("quantize", QuantizeConfig(model="embedded", output_dir=str(tmp_path)), {"seconds": 3.0})
    assert "virtual_tp" not in capsys.readouterr().err


def test_a_dry_run_has_no_artifact_to_go_on_with(tmp_path, capsys):
    config = QuantizeConfig(model="embedded", dry_run=True, output_dir=str(tmp_path))
    tell_ending("quantize", config, {"seconds": 3.0})
    assert capsys.readouterr().err == f"wrote quantize.json to {tmp_path} in 3 s\n"


TEXT = "a sentence of words " * 10 + "/a/path/that/is/longer-than-a-line/" + "x" * 80


def test_a_pipe_gets_one_line():
    file = io.StringIO()
    say(TEXT, file)
    assert file.getvalue() == TEXT + "\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_gets_whole_words(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        say(TEXT, terminal)
        shown = os.read(ours, 10_000).decode()
    os.close(ours)
    lines = shown.split()
    assert lines == TEXT.split(), "no word is broken"
    assert max(len(line) for line in shown.splitlines() if "/a/path" not in line) <= columns
