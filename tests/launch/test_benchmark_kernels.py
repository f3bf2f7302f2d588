"""megatron-lowbit benchmark kernels: every op, measured against eager torch and a copy."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import COMMAND, run_here, run_there


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler is installed")
def test_rows(tmp_path):
    use = ["tokens=64", "features=192", "ranks=[1,3]", "repeats=3", "compile=false", f"output_dir={tmp_path}"]
    code, stdout, stderr = run_there(*COMMAND, "benchmark", "kernels", *use)
    assert code == 0, stderr
    assert "requantize" in stdout
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    ops = [("pack", 1), ("unpack", 1), ("unpack", 3), ("requantize", 1), ("requantize", 3)]
    exact = [(f"int{bits}", op, ranks) for bits in (8, 16) for op, ranks in (("encode", 1), ("decode", 3))]
    expected = [(format, *op) for format in ("paper", "default") for op in ops] + exact
    assert [(row["format"], row["op"], row["ranks"]) for row in rows] == expected
    for row in rows:
        assert [len(all) for all in row["seconds"].values()] == [3, 3, 3, 3], "kernel, copy, clone, eager"
        median = row["median_seconds"]
        assert row["eager_speedup"] == median["eager"] / median["kernel"] and row["compile_speedup"] is None
        # Two bf16 tensors for a copy; the op's own bytes are between one and that of its ranks' messages and a result.
        share = row["bytes"] / median["kernel"] * median["copy"] / (4 * 64 * 192)
        assert row["copy_share"] == pytest.approx(share)
        assert 0 < row["bytes"] <= (3 + max(2, row["ranks"])) * 64 * 192


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ranks=[0]", "ranks"),
        ("tokens=0", "tokens"),
        ("tp=2", "tp=2 changes nothing here, where no model runs; leave it out"),
        ("bits=4", "unknown config key 'bits'"),
    ],
)
def test_bad_input(tmp_path, capsys, argument, message):
    assert run_here("benchmark", "kernels", argument, f"output_dir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
