"""An output folder has one owner: refused while that lives, taken over once it is dead. Owners are real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from commands import COMMAND, run_here, run_there, started
from forked import forked
from ports import free_port
from tiny_models import save_model
from unfinished_runs import artifact_files, done, kill_when, metrics, quantize

from megatron_lowbit.config import LowBitError
from megatron_lowbit.runtime import folder_lock
from megatron_lowbit.runtime.folder_lock import FolderLock
from megatron_lowbit.temporary import PATIENCE


def elsewhere(folder: Path, age: float = 0.0, **values: object) -> Path:
    """A lock of another host's process, refreshed `age` seconds ago."""
    lock = folder / ".lock"
    lock.write_text(json.dumps({"host": "gpu07", "where": "another boot", "pid": 123, "start": "9"} | values))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def take(folder: Path, **environ: str) -> str:
    """What happens in a process of its own that takes the lock and exits without leaving it: taken, or the refusal."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(environ)
        try:
            FolderLock(folder).take()
            os.write(theirs, b"taken")
        except LowBitError as error:
            os.write(theirs, str(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with open(ours) as pipe:
        return pipe.read()


def test_taken_and_released(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    owner = json.loads((tmp_path / ".lock").read_text())
    assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
    said = take(tmp_path)
    assert f"belongs to process {os.getpid()} on {socket.gethostname()}; wait" in said and "\n" not in said
    lock.release()
    assert not list(tmp_path.iterdir())
    assert take(tmp_path) == "taken"
    FolderLock(tmp_path).release()
    assert (tmp_path / ".lock").exists(), "released by somebody who did not own it"


def test_a_dead_owner_of_this_host(tmp_path, capsys):
    """Also where another process has its number by now."""
    assert take(tmp_path) == "taken"
    lock = FolderLock(tmp_path)
    lock.take()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("took over ") and re.search(r"from process \d+ on ", line)
    lock.release()
    (tmp_path / ".lock").write_text(json.dumps({**lock.owner, "pid": 1, "start": "0"}))
    assert take(tmp_path) == "taken"


def test_an_owner_on_another_host(tmp_path):
    elsewhere(tmp_path, age=PATIENCE / 2, job="88", restarts=1)
    said = take(tmp_path)
    assert "belongs to process 123 on gpu07, Slurm job 88" in said
    assert take(tmp_path, SLURM_JOB_ID="89", SLURM_RESTART_COUNT="2") == said
    assert take(tmp_path, SLURM_JOB_ID="88", SLURM_RESTART_COUNT="1") == said
    assert take(tmp_path, SLURM_JOB_ID="88", SLURM_RESTART_COUNT="2") == "taken", "this job before it was requeued"
    elsewhere(tmp_path, age=PATIENCE + 60)
    assert take(tmp_path) == "taken", "nobody refreshes it"
    (tmp_path / ".lock").write_text("{")
    assert "an unknown host" in take(tmp_path)


MALFORMED = [
    '{"pid": "abc"}',
    '{"pid": 1.5}',
    '{"pid": true}',
    '{"pid": [1]}',
    "[]",
    "7",
    '"x"',
    "",
    "{",
    "\0",
    "{" * 10**5,
]
MALFORMED += ["[" * 100_000, '{"restarts": "x", "job": "88"}', '{"job": 88}', '{"host": {}}', '{"host": "\\ud800\\nx"}']
MALFORMED += ['{"pid": 1e999}', '{"pid": %s}' % (10**5 * "9"), '{"host": "%s"}' % (10**5 * "h")]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:24])
@pytest.mark.parametrize("ours", [False, True])
def test_a_lock_that_says_nothing_sensible(text, ours, tmp_path, monkeypatch):
    """One line while somebody may own it, taken over once nobody has refreshed it for long enough."""
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    if ours and text.startswith("{") and text.endswith("}"):
        text = json.dumps({"where": folder_lock.where(), **json.loads(text)}) if "999" not in text else text
    (tmp_path / ".lock").write_text(text)
    said = take(tmp_path)
    assert (said.startswith("output_dir ") and "\n" not in said and len(said) < 600) or (said == "taken" and ours), said
    said.encode()
    (tmp_path / ".lock").write_text(text)
    os.utime(tmp_path / ".lock", (time.time() - PATIENCE - 60,) * 2)
    assert take(tmp_path) == "taken"


def test_a_lock_that_is_a_folder(tmp_path):
    (tmp_path / ".lock").mkdir()
    assert "belongs to" in take(tmp_path)
    os.utime(tmp_path / ".lock", (time.time() - PATIENCE - 60,) * 2)
    assert "cannot remove" in take(tmp_path) and (tmp_path / ".lock").is_dir()


def test_killed_while_it_takes_over(tmp_path):
    """The guard of a takeover goes with its maker: the next one need not wait until it is old."""
    elsewhere(tmp_path, age=PATIENCE + 60)
    with forked(lambda: FolderLock(tmp_path)._link(tmp_path / ".lock-takeover") and None) as child:
        assert child.finish() == (0, "")
    assert take(tmp_path) == "taken"
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_it_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "REFRESH", 0.05)
    lock = FolderLock(tmp_path)
    lock.take()
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 3000
    while lock.path.stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.path.stat().st_mtime > 1
    lock.release()


@pytest.mark.parametrize("dead", [False, True])
def test_one_of_many_wins(dead, tmp_path, monkeypatch):
    """Twelve processes at once, for a free folder and for a dead owner's, over and over; between finding an owner dead
    and doing something about it each is held up for a while."""
    judge = folder_lock._dead

    def slowly(*args) -> bool:
        found = judge(*args)
        time.sleep(os.getpid() % 7 * 0.01)
        return found

    monkeypatch.setattr(folder_lock, "_dead", slowly)
    for _ in range(3):
        for left in tmp_path.iterdir():
            left.unlink()
        if dead:
            elsewhere(tmp_path, age=PATIENCE + 60)
        (start, go), (end, over) = os.pipe(), os.pipe()
        children = []
        for _ in range(12):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.close(over)
                os.read(start, 1)  # returns in all of them when the last writer closes
                try:
                    FolderLock(tmp_path).take()
                    os.read(end, 1)  # alive until all have tried
                    os._exit(0)
                except LowBitError:
                    os._exit(2)
                finally:
                    os._exit(3)
            children.append(child)
        os.close(start)
        os.close(go)
        codes: dict[int, int] = {}
        deadline = time.monotonic() + 300
        while len(codes) < 11 and time.monotonic() < deadline:
            for child in children:
                if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    codes[child] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.005)
        os.close(over)
        os.close(end)
        winners = [os.waitpid(child, 0)[1] for child in children if child not in codes]
        assert winners == [0] and list(codes.values()) == [2] * 11


def test_two_jobs_and_a_killed_one(tmp_path, capsys):
    """The second of two jobs is refused in one line and disturbs nothing; after a SIGKILL the next takes over, and the
    artifact is that of a run that nobody disturbed."""
    model = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    command = quantize(model, tmp_path / "out")
    assert run_here(*quantize(model, tmp_path / "whole")) == 0
    with started(*COMMAND, *command, "correction.epochs=1") as process:

        def ready() -> bool:
            return (tmp_path / "out" / "metrics.jsonl").exists() and done(tmp_path / "out") is not None

        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / ".lock").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        capsys.readouterr()
        assert run_here(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"belongs to process {process.pid} on {socket.gethostname()}" in line
        assert run_here("evaluate", f"model={model}", f"output_dir={tmp_path / 'out'}") == 2
        process.send_signal(signal.SIGCONT)
        kill_when(process, ready)
        assert process.wait(300) == -signal.SIGKILL
    assert (tmp_path / "out" / ".lock").exists()
    capsys.readouterr()
    assert run_here(*command) == 0
    assert capsys.readouterr().out.startswith("took over ")
    assert artifact_files(tmp_path / "out") == artifact_files(tmp_path / "whole")
    assert not (tmp_path / "out" / ".lock").exists() and len(metrics(tmp_path / "out")) > 0


def test_ranks_are_refused_together(tmp_path):
    """Rank 0 looks and speaks for both; the command ends in good time."""
    model = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    lock.take()
    arguments = quantize(model, tmp_path / "out", "tp=2")[1:]
    command = [*COMMAND[:2], "megatron_lowbit.launch.quantize", *arguments]
    code, _, stderr = run_there(*command, MASTER_PORT=str(free_port()))
    (line,) = stderr.splitlines()
    assert code == 2 and f"belongs to process {os.getpid()}" in line
    lock.release()
