"""Fuzzers of the C++ kernels under the compiler's sanitizers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def sanitized(script: str, calls: int, cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a fuzzer of this folder with kernels that address and undefined-behaviour sanitizers watch."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    # libstdc++ too, because the sanitizer looks for what it wraps when the process starts.
    asks = ([compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6"))
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
    # The compiler itself is not watched: that takes several times as long.
    environ["CXX"] = shlex.join(["env", "-u", "LD_PRELOAD", compiler])
    environ |= {"PYTHONPATH": str(Path(script).parent)}
    command = [sys.executable, "-W", "ignore", script, str(calls), "1", *SANITIZED, *more]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=3000)
