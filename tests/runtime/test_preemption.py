"""Told to stop by SIGUSR1 or SIGTERM: all ranks leave together with exit code 99, and the same command, run again, ends
with the bits of a run that nobody disturbed. Signals and ranks are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import preemption_cases as cases
import pytest
from commands import COMMAND, run_here, run_there, started
from forked import forked
from ports import free_port
from rank_pool import RankPool
from tiny_models import save_model
from unfinished_runs import artifact_files, done, killed_at, metrics, quantize, renamed

from megatron_lowbit.launch import main
from megatron_lowbit.qllm import resume
from megatron_lowbit.runtime import preemption
from megatron_lowbit.runtime.metrics import MetricLogger


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, f"it ended by itself: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_handler(pid: int) -> bool:
    """Whether a process handles SIGUSR1 itself."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1)


SIGNALS = {  # {group: (signals, moment, whose signal rank 0 names)}
    0: ({1: signal.SIGUSR1}, "", "another rank's signal"),
    1: ({0: signal.SIGTERM, 1: signal.SIGTERM}, '"done": 1', "SIGTERM"),
    2: ({0: signal.SIGUSR1}, '"done": 2', "SIGUSR1"),
}


def test_quantize_stops_in_every_group(model, tmp_path):
    """Three signals in three runs, each of which continues the one before: to one rank or both; in the first group, the
    middle one and the last."""
    assert run_here(*quantize(model, tmp_path / "whole")) == 0
    whole, folder = artifact_files(tmp_path / "whole"), tmp_path / "stopped"
    argv, ranks = quantize(model, folder, "tp=2"), RankPool(2)
    try:
        for group, (signals, text, who) in SIGNALS.items():
            moment = f"{folder}/resume/state.json|{text}" if text else f"{folder}/metrics.jsonl"
            results = ranks.run(cases.command, free_port(), argv, signals, moment, timeout=300)
            assert [code for code, _ in results] == [preemption.REQUEUE] * 2, results
            (line,) = [line for line in results[0][1].splitlines() if line.startswith("megatron-lowbit: ")]
            assert line.startswith(f"megatron-lowbit: stopped by {who}: after {group} of 3 groups"), line
            assert (done(folder) or 0) == group and not (folder / "lowbit.json").exists()
            assert not (folder / ".lock").exists()
        results = ranks.run(cases.command, free_port(), argv, {}, "", timeout=300)
    finally:
        ranks.close()
    assert [code for code, _ in results] == [0, 0] and "continuing after 2 of the block groups" in results[0][1]
    found = artifact_files(folder)
    assert {renamed(name): value for name, value in found.items() if name != "lowbit.json"} == {
        renamed(name): value for name, value in whole.items() if name != "lowbit.json"
    }
    assert not (folder / "resume").exists()


def calibrate(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("calibrate", f"model={model}", f"output_dir={folder}", "calibration.data=stdlib:calibration"),
        *("calibration.samples=40", "calibration.sequence_length=64", "calibration.batch_size=1"),
        *("comm.tp_sizes=[2]", "comm.preset=paper", "comm.clipping=histogram", *more),
    ]


def test_calibrate_stops_and_continues(model, tmp_path, capsys, monkeypatch):
    """Killed after a state, then told to stop, then refused with other settings, then continued to the end."""
    (tmp_path / "whole").mkdir()
    assert run_here(*calibrate(model, tmp_path / "whole")) == 0
    whole, folder = artifact_files(tmp_path / "whole"), tmp_path / "stopped"
    whole = {name: value for name, value in whole.items() if not name.startswith("calibrate.")}
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)  # after every batch
    monkeypatch.setattr(resume, "SAVE_SHARE", float("inf"))  # however long that takes
    killed_at("replace:state.json", 3, [*calibrate(model, folder)])
    monkeypatch.undo()
    killed = done(folder)
    assert killed is not None and killed >= 2

    def told() -> int:
        return len([record for record in metrics(folder) if "calibration_batch" in record])

    before = told()  # what the killed process did after its last state is done again, but not told again

    def stopped_after_three() -> int:
        real = MetricLogger.log

        def log(self, **values):
            real(self, **values)
            if told() == before + 3:
                os.kill(os.getpid(), signal.SIGUSR1)

        monkeypatch.setattr(MetricLogger, "log", log)
        return main(calibrate(model, folder))

    with forked(stopped_after_three) as child:
        code, said = child.finish()
    assert code == preemption.REQUEUE, said
    assert f"continuing after {killed} of the 40 batches" in said and "took over" in said
    stopped = done(folder)
    assert stopped is not None and killed < stopped < 40 and f"after {stopped} of 40 batches" in said
    assert not (folder / "calibration.json").exists()
    capsys.readouterr()
    assert run_here(*calibrate(model, folder, "calibration.ema_gamma=0.5")) == 2
    assert "calibration.ema_gamma 0.01 there, 0.5 here" in capsys.readouterr().err
    assert run_here(*quantize(model, folder)) == 2
    assert "stage 'calibrate' there, 'quantize' here" in capsys.readouterr().err
    assert run_here(*calibrate(model, folder)) == 0
    assert f"continuing after {stopped} of" in capsys.readouterr().out
    found = artifact_files(folder)
    assert {name: value for name, value in found.items() if name in whole} == whole and len(whole) >= 4
    assert not (folder / "resume").exists()


def test_calibrate_on_ranks_that_share_the_windows(two_ranks, tmp_path):
    """Only rank 1 gets the signal; each rank's histograms are its own and are kept by it."""
    results = two_ranks.run(cases.calibrate_with_a_signal, str(tmp_path))
    for rank, (stopped, whole, continued) in enumerate(results):
        assert stopped == results[0][0] == [4, 6], "batches done at the two signals, the same on both ranks"
        assert continued == whole, rank
    assert results[0][1] == results[1][1]


def test_pipeline_stages_may_run_ahead(two_ranks):
    """With a lag, an answer is used so many steps later, at the same step by all."""
    assert two_ranks.run(cases.steps_until_stopped, 0, 3) == [3, 3]
    assert two_ranks.run(cases.steps_until_stopped, 2, 3) == [5, 5]


def test_a_signal_before_anything_is_imported(model, tmp_path):
    """The handler is there as soon as Python runs our code; evaluate, without a state, stops at its first batch."""
    arguments = [f"model={model}", "evaluation.data=stdlib:validation", f"output_dir={tmp_path}"]
    with started(*COMMAND, "evaluate", *arguments) as process:
        until(lambda: has_handler(process.pid), process)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == preemption.REQUEUE, stderr
    assert stderr.splitlines() == ["megatron-lowbit: stopped by SIGTERM: it starts over when it is run again"]
    assert not (tmp_path / "evaluate.json").exists()


@pytest.mark.parametrize(("echo", "code"), [(60.0, 7), (-1.0, 128 + signal.SIGTERM)])
def test_a_second_sigterm(echo, code, monkeypatch):
    """Passed on by a launcher it is the first one again; later it ends the process."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(preemption, "ECHO", echo)
        try:
            preemption.install()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if preemption.asked() else 1)
        except SystemExit as ended:
            os._exit(ended.code)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    assert run_here("--help") == 0
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_a_signal_while_python_ends():
    """Another rank was told first, this one has left too, and only now gets its own signal: the code stays 99."""
    code = """
import os, signal, sys
from megatron_lowbit.runtime import preemption
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
        print("late")
late = Late()
preemption.install()
sys.exit(99)
"""
    exit_code, stdout, stderr = run_there(sys.executable, "-c", code)
    assert (exit_code, stdout) == (99, "late\n"), stderr
