"""The folder of built kernels: what is loaded from there is this user's own, and what its name says.

The kernels here are one line, which takes no time to build; the real ones' build is in test_cpu_kernels.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from commands import gone
from forked import forked

from megatron_lowbit.kernels import build

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
NOBODY = 65534


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder, not made yet."""
    source = tmp_path / "hybrid.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setitem(build.SOURCES, "hybrid", source)
    monkeypatch.setattr(build, "HEADERS", [])
    monkeypatch.setattr(build, "FLAGS", ["-shared", "-fPIC"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))
    return tmp_path / "cache" / "megatron_lowbit"


def planted(path: Path, trace: Path) -> Path:
    """A library whose constructor leaves a trace."""
    source = trace.with_suffix(".cpp")
    source.write_text(
        f'#include <cstdio>\nextern "C" int answer() {{ return 13; }}\n'
        f'__attribute__((constructor)) static void run() {{ fclose(fopen("{trace}", "w")); }}\n'
    )
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", path], check=True)
    return path


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so")) if cache.is_dir() else []


def test_built_once_into_a_private_folder(cache, monkeypatch):
    assert build.load("hybrid").answer() == 42
    (library,) = built(cache)
    assert cache.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
    assert library.stem.split("-")[2] == hashlib.sha256(library.read_bytes()).hexdigest()
    monkeypatch.setattr(build, "_build_in", None)
    assert build.load("hybrid").answer() == 42


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"answer", b"answes")),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o777),
        lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
        pytest.param(lambda path: os.chown(path, NOBODY, NOBODY), marks=as_root),
    ],
    ids=["cut short", "other bytes", "empty", "anybody may write it", "a link", "another user's"],
)
def test_a_library_that_is_not_what_was_built(change, cache):
    build.load("hybrid")
    change(built(cache)[0])
    assert build.load("hybrid").answer() == 42
    (library,) = built(cache)
    assert not library.is_symlink() and library.stat().st_mode & 0o777 == 0o700


def plant_everywhere(cache: Path, trace: Path) -> None:
    """Under every name that could be asked for."""
    key = built(cache)[0].stem.split("-")[1]
    library = planted(trace.with_suffix(".so"), trace)
    total = hashlib.sha256(library.read_bytes()).hexdigest()
    for old in built(cache):
        old.unlink()
    for name in (f"hybrid-{key}.so", f"hybrid-{key}-{total}.so"):
        shutil.copy(library, cache / name)


@as_root
def test_a_folder_of_another_user(cache, tmp_path, caplog):
    """Nothing of it is loaded; a private folder takes its place, and is found again."""
    build.load("hybrid")
    plant_everywhere(cache, tmp_path / "trace")
    for path in (cache, *built(cache)):
        os.chown(path, NOBODY, NOBODY)
    cache.chmod(0o777)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "megatron_lowbit"):
            assert build.load("hybrid").answer() == 42
        (record,) = caplog.records
        assert f"{cache} belongs to another user" in record.getMessage()
    assert not (tmp_path / "trace").exists() and len(built(cache)) == 2
    (own,) = (tmp_path / "machine").iterdir()
    assert own.stat().st_mode & 0o777 == 0o700 and len(built(own)) == 1


@as_root
def test_what_others_have_put_into_a_lenient_folder(cache, tmp_path):
    build.load("hybrid")
    plant_everywhere(cache, tmp_path / "trace")
    for path in built(cache):
        os.chown(path, NOBODY, NOBODY)
    cache.chmod(0o777)
    assert build.load("hybrid").answer() == 42
    assert not (tmp_path / "trace").exists() and cache.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_a_link(cache, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "other")
    assert build.load("hybrid").answer() == 42
    assert "may be written by others" in caplog.text and not list((tmp_path / "other").iterdir())


def test_no_private_folder_at_all(cache, tmp_path):
    """It is built for this process alone."""
    cache.parent.write_text("no folder")
    (tmp_path / "machine" / f"megatron_lowbit-{os.geteuid()}").write_text("no folder")
    assert build.load("hybrid").answer() == 42
    assert len(list((tmp_path / "machine").iterdir())) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_what_was_looked_at_is_what_is_loaded(cache, tmp_path, monkeypatch):
    """Somebody who can rename the folder swaps it between the look and the load."""
    build.load("hybrid")
    library, real = built(cache)[0], ctypes.CDLL
    other = planted(tmp_path / "other.so", tmp_path / "trace")

    def swapped_first(name):
        os.replace(other, library)
        return real(name)

    monkeypatch.setattr(ctypes, "CDLL", swapped_first)
    assert build.load("hybrid").answer() == 42 and not (tmp_path / "trace").exists()


def test_a_killed_build_leaves_nothing(cache, monkeypatch):
    def killed() -> None:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        build.load("hybrid")

    with forked(killed) as child:
        assert child.finish()[0] == -signal.SIGKILL
    assert len(list(cache.glob(".hybrid-*.tmp"))) == 1
    assert build.load("hybrid").answer() == 42
    assert sorted(path.name for path in cache.iterdir()) == [built(cache)[0].name, "lock"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_compiler_that_hangs(cache, tmp_path, monkeypatch):
    """It is ended with what it has started, and the error says so."""
    compiler, started = tmp_path / "hangs", tmp_path / "started"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 120 &\necho $! > {started}\nwait\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "SECONDS", 5)
    with pytest.raises(RuntimeError, match="hangs took longer than 5 s"):
        build.load("hybrid")
    deadline = time.monotonic() + 60
    while not gone(int(started.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
