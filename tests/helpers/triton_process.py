"""Cases of Triton's kernels in a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def run(script: str, device: str, *arguments: str, timeout: int = 300) -> str:
    """Run a script of this folder on a device, cpu: interpreted; returns what it prints."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / script), device, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0" if device == "cuda" else "1", "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
