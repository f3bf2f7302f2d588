"""Temporary names belong to one process of one machine; what a dead one left goes at the next start, nothing else."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from forked import forked

from megatron_lowbit import temporary
from megatron_lowbit.io import files
from megatron_lowbit.io.files import ensure_writable, write_tensors, write_text
from megatron_lowbit.runtime.folder_lock import FolderLock
from megatron_lowbit.temporary import PATIENCE, beside, remove_dead, scratch_folder, start_of, where


def dead_name(folder: Path, name: str, place: str | None = None) -> Path:
    """A temporary name of a process that is gone, of this machine or another."""
    with forked(lambda: print(beside(folder / name).name)) as child:
        found = child.finish()[1].strip()
    return folder / (found if place is None else re.sub(r"\.[0-9a-f]{8}-", f".{place}-", found))


def aged(path: Path, seconds: float) -> Path:
    if not path.exists():
        path.write_text("x")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_names():
    """Unlike in one process, and in processes of the same number in two containers."""
    names = {beside(Path("a/b.json")) for _ in range(100)}
    assert len(names) == 100 and {name.parent for name in names} == {Path("a")}
    assert all(name.name.startswith(".b.json.") and name.suffix == ".tmp" for name in names)
    assert f"-{os.getpid()}-{start_of(os.getpid())}-" in names.pop().name


def test_two_containers_with_one_process_id(tmp_path, monkeypatch):
    """Both have process 7, and probe one folder over and over."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    probe = lambda: [ensure_writable(tmp_path) for _ in range(500)] and None  # noqa: E731
    with forked(probe) as one, forked(probe) as other:
        assert [one.finish(), other.finish()] == [(0, ""), (0, "")]
    assert not list(tmp_path.iterdir())


def test_what_goes_and_what_stays(tmp_path):
    """Taking the folder cleans it, and the folders in it that runs write to."""
    inside = tmp_path / "resume" / "ranges-2"
    inside.mkdir(parents=True)
    dead = [dead_name(tmp_path, "lowbit.json"), dead_name(inside, "calibration.safetensors")]
    (folder := dead_name(tmp_path, "tensors.safetensors")).mkdir()
    (folder / ".tmpAbC123").write_text("a")
    elsewhere = dead_name(tmp_path, "far.json", "01234567")
    for path in dead:
        path.write_text("x")
    numberless = 2**22 + 5  # above the largest process id
    earlier = [
        ".lock.%d.tmp",
        ".lock.%d.probe",
        ".write-probe-%d",
        ".quantize.json.%d.tmp",
        ".lowbit-1.safetensors.%d.tmp",
    ]
    goes = [*dead, folder, *(aged(tmp_path / (name % numberless), 0) for name in earlier)]
    goes += [aged(elsewhere, PATIENCE + 60), aged(tmp_path / ".tmpXyZ789", PATIENCE + 60)]
    goes += [aged(tmp_path / f".metrics.{os.getpid()}.tmp", PATIENCE + 60)]
    stays = [beside(tmp_path / "mine.json"), dead_name(tmp_path, "near.json", "01234567"), tmp_path / ".tmpAAAAAA"]
    stays += [tmp_path / f".write-probe-{os.getpid()}", tmp_path / "lowbit.json"]
    for path in stays:
        path.write_text("x")
    stays += [aged(beside(tmp_path / "slow.json"), 10 * PATIENCE)]
    stays += [aged(tmp_path / name, 10 * PATIENCE) for name in (".tmp", ".tmp-notes", ".hidden.tmp", ".gitignore")]
    lock = FolderLock(tmp_path)
    lock.take()
    assert [path.name for path in goes if path.exists()] == []
    assert [path.name for path in stays if not path.exists()] == []
    lock.release()


def test_without_the_folder_only_what_is_known_to_be_dead(tmp_path):
    gone, far = dead_name(tmp_path, "a.json"), dead_name(tmp_path, "b.json", "01234567")
    others = [aged(far, 10 * PATIENCE), aged(tmp_path / ".tmpXyZ789", 10 * PATIENCE), aged(beside(tmp_path / "c"), 0)]
    gone.write_text("x")
    remove_dead([tmp_path, tmp_path / "not-there"])
    assert not gone.exists() and all(path.exists() for path in others)


def test_a_number_that_another_process_has_by_now(tmp_path):
    path = beside(tmp_path / "a.json")
    path.write_text("x")
    reused = tmp_path / path.name.replace(f"-{start_of(os.getpid())}-", "-1-")
    reused.write_text("x")
    remove_dead([tmp_path])
    assert path.exists() and not reused.exists()


@pytest.mark.parametrize("name", ["save_file", "sha256"])
def test_killed_while_it_writes_tensors(name, tmp_path, monkeypatch):
    """safetensors writes to a file of its own first: that lies in our temporary folder too."""
    real = getattr(files, name)

    def writes_and_dies(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(files, name, writes_and_dies)
    with forked(lambda: write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})) as child:
        assert child.finish()[0] == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.safetensors.") and left.is_dir()
    remove_dead([tmp_path])
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_after_an_error(tmp_path, monkeypatch):
    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fails)
    for write in (
        lambda: write_text(tmp_path / "a.json", "x"),
        lambda: write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not list(tmp_path.iterdir())


def test_scratch_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def killed() -> None:
        with scratch_folder() as folder:
            (folder / "log").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(killed) as child:
        child.finish()
    (left,) = tmp_path.iterdir()
    with scratch_folder() as folder:
        assert not left.exists() and folder.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_where_is_not_the_name_of_the_host_alone():
    assert where() == temporary.where() and len(where()) > 8
