"""mypy sees the whole package: a wrong call across the border of two rooms is an error, which it once was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A call into a lower room with a wrong argument, as a module of a room above might hold it.
ACROSS = {
    "launch": ("kernels", "packed_bytes('3', 4)"),
    "qllm": ("runtime.launcher_env", "env_rank(1, 2, 3)"),
    "adapters": ("io.files", "sha256(3)"),
    "layers": ("comm.collectives", "COLLECTIVES.no_such_method()"),
    "comm": ("quant.affine", "Scheme.parse(4)"),
    "runtime": ("config", "check_mode(3, mode='bf16')"),
    "io": ("temporary", "beside(3.5)"),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> str:
    """What mypy says of a copy of the package with such a module in every room."""
    place = tmp_path_factory.mktemp("types")
    for name in ("megatron_lowbit", "kernels", "launch", "slurm"):
        (place / name).symlink_to(ROOT / name)
    (place / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    package = place / "megatron_lowbit"
    package.unlink()
    package.mkdir()
    for entry in (ROOT / "megatron_lowbit").iterdir():
        room = package / entry.name
        if entry.name not in ACROSS or entry.is_symlink():
            room.symlink_to(entry.resolve())
            continue
        room.mkdir()
        for file in entry.iterdir():
            (room / file.name).symlink_to(file)
    launch = package / "launch"
    launch.unlink()
    launch.mkdir()
    for file in (ROOT / "launch").iterdir():
        (launch / file.name).symlink_to(file)
    for room, (module, call) in ACROSS.items():
        name = call.partition("(")[0].partition(".")[0]
        text = f"from megatron_lowbit.{module} import {name}\n\n\ndef wrong() -> None:\n    {call}\n"
        (package / room / "seeded.py").write_text(text)
    files = [str(package / room / "seeded.py") for room in ACROSS]
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *files]
    done = subprocess.run(command, cwd=place, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # make check runs mypy anyway
@pytest.mark.xdist_group("mypy")
@pytest.mark.parametrize("room", ACROSS)
def test_a_wrong_call_is_seen(room, errors):
    assert f"{room}/seeded.py:5: error" in errors, errors


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "megatron_lowbit" / "py.typed").exists()
