"""Random calls of the C++ kernels: the bits of the reference, and nothing read or written out of bounds."""

from __future__ import annotations

import json
import os
import shutil

import kernel_fuzz
import pytest
from sanitizers import sanitized

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")


def test_the_bits_of_the_reference(monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    done = kernel_fuzz.fuzz(200, 0)
    assert sum(done.values()) == 200 and min(done[op] for op in ("pack", "unpack", "requantize", "exact")) > 20


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Address and undefined behaviour, over 10,000 calls."""
    done = sanitized(kernel_fuzz.__file__, 10_000, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(json.loads(done.stdout).values()) == 10_000


@pytest.mark.slow
def test_the_sanitizers_are_there(tmp_path):
    """One byte too far in the source is found."""
    broken = tmp_path / "hybrid.cpp"
    text = (kernel_fuzz.build.SOURCES["hybrid"]).read_text()
    line = "  total.store(tally);\n"
    assert text.count(line) >= 1
    broken.write_text(text.replace(line, line + "  reinterpret_cast<volatile char*>(tally)[24] = 1;\n"))
    done = sanitized(
        kernel_fuzz.__file__,
        200,
        tmp_path / "cache",
        f"source={broken}",
        f"-I{kernel_fuzz.build.SOURCES['hybrid'].parent}",
    )
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
