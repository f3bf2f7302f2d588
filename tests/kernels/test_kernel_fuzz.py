"""Random calls of the C++ kernels: the bits of the reference, and nothing read or written out of bounds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_fuzz
import pytest

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler is installed")
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def test_the_bits_of_the_reference(monkeypatch):
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "cpu")
    done = kernel_fuzz.fuzz(200, 0)
    assert sum(done.values()) == 200 and min(done[op] for op in ("pack", "unpack", "requantize", "exact")) > 20


def sanitized(calls: int, cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    # libstdc++ too, because the sanitizer looks for what it wraps when the process starts.
    asks = ([COMPILER, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6"))
    libraries = [subprocess.run(ask, capture_output=True, text=True).stdout.strip() for ask in asks]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the compiler has no libasan")
    # Python and torch never free some memory; alloc_dealloc_mismatch is of libraries that bring their own new.
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1"
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    environ |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2", "PYTHONMALLOC": "malloc"}
    environ |= {"PYTHONPATH": str(Path(kernel_fuzz.__file__).parent)}
    command = [sys.executable, "-W", "ignore", kernel_fuzz.__file__, str(calls), "1", *SANITIZED, *more]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=3000)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Address and undefined behaviour, over 10,000 calls."""
    done = sanitized(10_000, tmp_path)
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
    done = sanitized(200, tmp_path / "cache", f"source={broken}", f"-I{kernel_fuzz.build.SOURCES['hybrid'].parent}")
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
