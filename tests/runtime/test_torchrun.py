"""What a rank that ends with one line leaves to be said by torchrun: torch's own classes read it."""

from __future__ import annotations

import json
import logging

import pytest
from commands import run_here
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ErrorHandler,
    ProcessFailure,
    error_handler,
)

from megatron_lowbit.launch import torchrun


def test_its_report_ends_with_our_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run_here("evaluate", "model=/no/such/folder", f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert run_here("nonsense") == 2, "a second line changes nothing"
    failure = ProcessFailure(local_rank=0, pid=123, exitcode=2, error_file=str(file))
    assert f"traceback : {line}\n" in str(ChildFailedError("evaluate", {0: failure}))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "parent.json"))
    ErrorHandler().dump_error_file(str(file), 2)  # as torchrun below another one does
    assert line in json.loads((tmp_path / "parent.json").read_text())["message"]["message"]


@pytest.mark.parametrize("name", ["", "/no/such/folder/error.json"])
def test_without_a_place_for_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", name)
    assert run_here("evaluate", "model=/no/such/folder", f"output_dir={tmp_path}") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def failing(code: int):
    def main(argv: list[str]) -> None:
        log = logging.getLogger(api.__name__)
        log.warning("Sending process %s closing signal %s", 5, "SIGTERM")
        logging.getLogger(error_handler.__name__).error("no error file defined for parent, to copy child error file")
        log.error("failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s", code, 0, 5, "python")
        raise ChildFailedError("x", {0: ProcessFailure(0, 5, code, "<N/A>")})

    return main


@pytest.mark.parametrize(("code", "ends", "words"), [(2, 2, 0), (99, 99, 0), (1, 1, 1), (-9, 1, 1)])
def test_ours_says_nothing_twice(code, ends, words, monkeypatch, caplog):
    """But that a rank was killed, or ended in a traceback, is news."""
    monkeypatch.setattr(torchrun, "main", failing(code))
    for module in (api, error_handler):
        monkeypatch.setattr(logging.getLogger(module.__name__), "filters", [])
    assert torchrun.run([]) == ends
    assert len(caplog.records) == words


def test_a_signal(monkeypatch):
    def main(argv: list[str]) -> None:
        raise api.SignalException("Process 5 got signal: 2", 2)

    monkeypatch.setattr(torchrun, "main", main)
    assert torchrun.run([]) == 130
