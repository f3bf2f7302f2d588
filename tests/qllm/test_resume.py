"""A quantize run that is killed continues where it was, and ends with the files of one that was not.

Killed processes are real: SIGKILL, after a record of the metrics, or right before a file is renamed or removed.
"""

from __future__ import annotations

import fnmatch
import json
import signal
from pathlib import Path

import pytest
from commands import COMMAND, ranks_of, run_here, run_there, started
from forked import forked
from slow_cases import slow
from tiny_models import save_model
from unfinished_runs import artifact_files, done, kill_when, killed_at, metrics, quantize, renamed

from megatron_lowbit.launch import main
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

# Three blocks in groups of one.


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[str, str]:
    """The files of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_here(*quantize(model, folder)) == 0
    files = artifact_files(folder)
    names = {"lowbit.json", "config.json", "tokenizer.json", "comm_plan_tp2.json", "calibration.safetensors"}
    assert names < set(files) and len(fnmatch.filter(files, "lowbit-*.safetensors")) == 3 + 1
    assert not (folder / "resume").exists()
    return files


def has_loss(folder: Path, group: int) -> bool:
    return any(r.get("group") == group and "correction_loss" in r for r in metrics(folder))


@pytest.mark.parametrize(
    ("moment", "least"),
    [
        (lambda f: has_loss(f, 0), 0),
        (lambda f: (f / "resume" / "state.json").exists(), 1),
        (lambda f: has_loss(f, 1), 1),
        (lambda f: has_loss(f, 2), 2),
    ],
    ids=["after the first training", "after the first state", "in the second group", "in the last group"],
)
def test_killed_and_run_again(moment, least, model, whole, tmp_path, capsys):
    command = quantize(model, tmp_path)
    with forked(lambda: main(command)) as child:
        kill_when(child, lambda: moment(tmp_path))
        assert child.finish()[0] == -signal.SIGKILL
    assert not (tmp_path / "lowbit.json").exists(), "an artifact of a run that has not finished"
    before = done(tmp_path) or 0
    assert before >= least
    assert run_here(*command) == 0
    assert artifact_files(tmp_path) == whole
    assert not (tmp_path / "resume").exists()
    trained = [record["group"] for record in metrics(tmp_path) if "correction_loss" in record]
    assert trained == [0, 1, 2], "a loss is missing, or was told twice"
    out = capsys.readouterr().out
    assert (f"continuing after {before} of" in out) == (before > 0), "groups that were done are not done again"


MOMENTS = [
    slow("replace:lowbit-*-000.safetensors", 1),
    ("replace:state.json", 1),
    ("replace:lowbit-*-001.safetensors", 1),
    slow("replace:calibration.safetensors", 2),
    ("replace:state.json", 2),
    slow("replace:calibration.json", 2),
    slow("unlink:lowbit-1-*.bin", 1),
    slow("replace:lowbit-*-rest.safetensors", 1),
    ("replace:lowbit.json", 1),
    slow("unlink:calibration.json", 1),
    ("unlink:state.json", 1),
    slow("replace:comm_plan_tp2.json", 1),
    ("replace:quantize.json", 1),
]


@pytest.mark.parametrize(("action", "count"), MOMENTS)
def test_killed_at_a_file(action, count, model, whole, tmp_path, capsys):
    """Between any two steps of writing the state and the artifact."""
    command = quantize(model, tmp_path)
    killed_at(action, count, command)
    assert run_here(*command) == 0, capsys.readouterr().err
    assert artifact_files(tmp_path) == whole
    assert not (tmp_path / "resume").exists()


def test_killed_twice(model, whole, tmp_path):
    command = quantize(model, tmp_path)
    for count, left in ((1, 1), (1, 2)):  # before the second process's first state, too
        action = "replace:lowbit-*-001.safetensors" if left == 1 else "replace:lowbit-*-002.safetensors"
        killed_at(action, count, command)
        assert done(tmp_path) == left
    assert run_here(*command) == 0
    assert artifact_files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1])
def test_a_killed_rank(rank, model, whole, tmp_path):
    """The command ends with an error once a rank is gone; run again, the two ranks end with one process's files."""
    command = quantize(model, tmp_path, "tp=2")
    with started(*COMMAND, *command) as process:
        victim = ranks_of(process, 2)[rank]
        kill_when(process, lambda: has_loss(tmp_path, 1), victim)
        assert process.wait(300) not in (0, 2)
    assert done(tmp_path) == 1 and not (tmp_path / "lowbit.json").exists()
    code, out, err = run_there(*COMMAND, *command)
    assert code == 0, err
    assert "continuing after 1 of the block groups" in out
    again = artifact_files(tmp_path)
    assert {renamed(name): value for name, value in again.items() if name != "lowbit.json"} == {
        renamed(name): value for name, value in whole.items() if name != "lowbit.json"
    }


CHANGES = {
    "correction.rank=3": ["correction.rank 4 there, 3 here"],
    "calibration.samples=3": ["calibration.samples 4 there, 3 here"],
    "correction.learning_rate=0.001": ["correction.learning_rate 0.005 there, 0.001 here"],
    "weights.attention=false": ["weights.attention None there, False here"],
    "seed=7": ["seed 0 there, 7 here"],
    "tp=2": ["tp 1 there, 2 here"],
}


def test_other_settings_are_refused(model, whole, tmp_path, capsys):
    """One line that names the key and both values; the state stays, and its own command finishes it."""
    command = quantize(model, tmp_path)
    killed_at("replace:state.json", 2, command)
    assert done(tmp_path) == 1

    def state() -> dict[str, bytes]:
        told = ("metrics.jsonl", ".lock")  # the latter of the process that was killed
        # The kill may have left a file half written, which goes at the next start.
        found = [f for f in tmp_path.rglob("*") if f.is_file() and f.name not in told and f.suffix != ".tmp"]
        return {f.name: f.read_bytes() for f in found}

    before = state()
    for change, said in CHANGES.items():
        capsys.readouterr()
        if change == "tp=2":
            code, _, stderr = run_there(*COMMAND, *command, change)
        else:
            code, stderr = run_here(*command, change), capsys.readouterr().err
        assert code == 2, change
        (line,) = [line for line in stderr.splitlines() if line.strip()]
        assert line.startswith("megatron-lowbit: ") and "unfinished run" in line
        assert all(part in line for part in said), line
        assert state() == before, change
    path = tmp_path / "resume" / "state.json"
    earlier = json.loads(before["state.json"])
    # As an earlier version wrote it: with other statistics, and without a checksum.
    del earlier["settings"]["state"], earlier["json_sha256"]
    path.write_text(json.dumps(earlier))
    assert run_here(*command) == 2
    assert "state None there" in capsys.readouterr().err
    path.write_bytes(before["state.json"])
    other = save_text(tmp_path.parent / "other.txt")
    assert run_here(*command, f"calibration.data={other}") == 2
    assert "calibration.data " in capsys.readouterr().err
    assert run_here(*command) == 0
    assert artifact_files(tmp_path) == whole


def save_text(path: Path) -> Path:
    path.write_text("def f(x):\n    return x + 1\n" * 500)
    return path


def test_settings_that_may_differ(model, whole, tmp_path):
    """Where to, and whether W&B listens, changes nothing in the artifact: a moved folder can be continued."""
    pytest.importorskip("wandb", reason="needs megatron-lowbit[wandb]")
    killed_at("replace:state.json", 2, quantize(model, tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_here(*quantize(model, tmp_path / "b")) == 0
    assert artifact_files(tmp_path / "b") == whole


def test_the_old_artifact_stays_until_the_new_one(model, tmp_path):
    """A finished artifact in output_dir loads while another one is made, and after that run was killed."""
    assert run_here(*quantize(model, tmp_path, "weights.scheme=W8A8", "correction.mode=none")) == 0
    before = LowBitCheckpoint.load(tmp_path)
    files = json.loads((tmp_path / "lowbit.json").read_text())["files"]
    for action in ("replace:state.json", "replace:lowbit.json"):
        killed_at(action, 1, quantize(model, tmp_path))
        kept = LowBitCheckpoint.load(tmp_path)
        assert kept.scheme_name == "W8A8" and kept.linears.keys() == before.linears.keys()
    assert run_here(*quantize(model, tmp_path)) == 0
    assert LowBitCheckpoint.load(tmp_path).scheme_name == "W4A4"
    assert not [name for name in files if (tmp_path / name).exists()], "files of the artifact before"
