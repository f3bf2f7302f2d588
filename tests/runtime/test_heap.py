"""Large tensors in mappings of their own, counted by glibc itself (mallinfo2)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, torch
from megatron_lowbit.runtime.heap import LARGE, map_large_tensors
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks mapped a b c d e".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
set_here = map_large_tensors() if sys.argv[1] == "set" else False
for _ in range(3):
    torch.empty(8 * LARGE, dtype=torch.uint8)  # when it is gone, glibc counts such a size as one for its heap
before = libc.mallinfo2().mapped
kept = torch.empty(2 * LARGE, dtype=torch.uint8)
print(set_here, libc.mallinfo2().mapped - before >= 2 * LARGE)
"""


def mapped(how: str, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env={**os.environ, **environ}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_large_tensors_are_mapped():
    assert mapped("set") == ["True", "True"]
    assert mapped("plain") == ["False", "False"], "glibc's own limit has grown: this test sees the difference"
    assert mapped("set", MALLOC_MMAP_THRESHOLD_="134217728") == ["False", "False"], "the user's own size stays"
