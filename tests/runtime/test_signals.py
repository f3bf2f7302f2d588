"""Ctrl-C: one line and exit code 130, wherever the command is; and no rank outlives the command that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import gone, run_here
from forked import forked
from tiny_models import save_model
from unfinished_runs import metrics, quantize

from megatron_lowbit.launch import main, runner
from megatron_lowbit.runtime import preemption


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def wait_until(ready) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_interrupted_at_work(model, tmp_path):
    """Nothing half written is left, the folder is free, and the record of the run says how it ended."""
    with forked(lambda: main(quantize(model, tmp_path))) as child:
        wait_until(lambda: metrics(tmp_path))
        child.send_signal(signal.SIGINT)
        code, said = child.finish()
    assert code == 130 and said.splitlines()[-1] == "megatron-lowbit: interrupted" and "Traceback" not in said
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert '"exit_code": 130' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert run_here(*quantize(model, tmp_path)) == 0


IMPORTS = """
import os, signal, sys
from megatron_lowbit.launch import main
class Interrupts:  # the moment when torch would be looked for
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.exit(main(["generate", "model=embedded", "prompt=def", f"output_dir={sys.argv[1]}"]))
"""


def test_interrupted_while_it_imports(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORTS, tmp_path], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "megatron-lowbit: interrupted\n")


def test_a_shells_background_job_goes_on():
    """It inherits SIGINT ignored, because Ctrl-C is not for it."""

    def ignores() -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        preemption.install()
        os.kill(os.getpid(), signal.SIGINT)
        return 5

    with forked(ignores) as child:
        assert child.finish() == (5, "")


@pytest.mark.parametrize(("echo", "code"), [(60.0, 7), (-1.0, 130)])
def test_a_second_interrupt(echo, code):
    """Passed on by a launcher it is the first one again; later it ends the process at once."""

    def twice() -> int:
        preemption.ECHO = echo
        preemption.install()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit:
            os.kill(os.getpid(), signal.SIGINT)
            return 7
        return 1

    with forked(twice) as child:
        assert child.finish() == (code, "megatron-lowbit: interrupted\n")


# A rank that takes long, in place of a stage of ours; it says which process it is.
RANK = """
import os, sys, time
from pathlib import Path
from megatron_lowbit.runtime import preemption
preemption.install()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
UNTIL_ASKED = RANK.replace("time.sleep(600)", "while not preemption.asked(): time.sleep(0.01)\nsys.exit(99)")


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """(a command that starts two ranks in a fork, their process ids once they have installed their handlers)"""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    (tmp_path / "pids").mkdir()
    monkeypatch.setattr(runner, "PATIENCE", 0.5)
    monkeypatch.setattr(runner, "GRACE", 0.5)
    real = subprocess.Popen
    command = [sys.executable, str(script), str(tmp_path / "pids")]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: real(command, **more))

    def starts() -> int:
        preemption.install()
        return runner.start_ranks("evaluate", [], 2)

    def pids() -> list[int]:
        wait_until(lambda: len([p for p in (tmp_path / "pids").iterdir() if p.read_text()]) == 2)
        return [int(path.read_text()) for path in (tmp_path / "pids").iterdir()]

    return starts, pids


@pytest.mark.parametrize("to", ["the command", "everybody", "a rank"])
def test_interrupted_with_ranks(to, ranks):
    """One line, of the command, whether a terminal tells the ranks too or not."""
    starts, pids = ranks
    with forked(starts) as child:
        own = pids()
        targets = {"the command": [child.pid], "everybody": [child.pid, *own], "a rank": own[:1]}[to]
        for pid in targets:
            os.kill(pid, signal.SIGINT)
        code, said = child.finish()
    assert code == 130 and said == ("" if to == "a rank" else "megatron-lowbit: interrupted\n")
    assert all(gone(pid) for pid in own)


def test_terminated_with_ranks(tmp_path, monkeypatch):
    """What a scheduler or `timeout` does: the command passes it on, and all ask to be run again."""
    script = tmp_path / "rank.py"
    script.write_text(UNTIL_ASKED)
    real = subprocess.Popen
    command = [sys.executable, str(script), str(tmp_path)]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: real(command, **more))

    def starts() -> int:
        preemption.install()
        return runner.start_ranks("evaluate", [], 2)

    with forked(starts) as child:
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        child.send_signal(signal.SIGTERM)
        assert child.finish()[0] == preemption.REQUEUE


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ranks_die_with_their_command(ranks):
    starts, pids = ranks
    with forked(starts) as child:
        own = pids()
        child.send_signal(signal.SIGKILL)
        assert child.finish()[0] == -signal.SIGKILL
    wait_until(lambda: all(gone(pid) for pid in own))


def test_parity_passes_signals_on(tmp_path, monkeypatch):
    """To the process that runs one engine, which would go on for an hour."""
    from megatron_lowbit.launch import parity

    script = tmp_path / "engine.py"
    script.write_text(UNTIL_ASKED)

    def runs() -> int:
        preemption.install()
        os.environ["RANK"] = "0"
        command = [sys.executable, str(script), str(tmp_path)]
        return parity._run(command, preemption.child_of(os.environ))[0]

    with forked(runs) as child:
        wait_until(lambda: (tmp_path / "0").exists())
        child.send_signal(signal.SIGTERM)
        assert child.finish() == (99, "")
