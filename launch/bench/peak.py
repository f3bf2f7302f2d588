"""The most multiply-adds that one core does in a second, by instruction: what shares of a peak are shares of.

peak.cpp has a loop of each instruction. The best of several runs counts, in the CPU time of the thread, since no other
work makes a core faster.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_lowbit.kernels import build
from megatron_lowbit.temporary import scratch_folder

SOURCE = Path(__file__).with_name("peak.cpp")
LOOPS = (  # (instruction, what it multiplies), in the order of peak.cpp
    ("AMX tdpbusd", "int8"),
    ("AVX-512 vpdpbusd", "int8"),
    ("AVX2 integers", "int8"),
    ("AMX tdpbf16ps", "bf16"),
    ("AVX-512 vdpbf16ps", "bf16"),
    ("AVX-512 float32", "bf16"),  # what bf16 is multiplied in, where no instruction takes it
    ("AVX2 float32", "bf16"),
)
RUN_SECONDS = 0.02
RUNS = 10


def measure_peaks() -> dict[str, dict[str, float]]:
    """Return {int8 or bf16: {instruction: operations per second}}, two operations to a multiply-add.

    Instructions that this processor does not have are left out. Raises RuntimeError and OSError where the loops cannot
    be compiled.
    """
    with scratch_folder() as folder:
        library = folder / "peak.so"
        build._run([*build._compiler(), *build.FLAGS, str(SOURCE), "-o", str(library)])
        loop = ctypes.CDLL(str(library)).lowbit_peak  # stays mapped when its file is gone
    loop.argtypes, loop.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
    peaks: dict[str, dict[str, float]] = {"int8": {}, "bf16": {}}
    for number, (name, kind) in enumerate(LOOPS):
        if loop(number, 1):
            peaks[kind][name] = _best(partial(loop, number))
    return peaks


def _best(run: Callable[[int], float]) -> float:
    """Return the best rate of a loop: run(rounds) does that many and returns the operations."""
    rounds, rates = 1000, list[float]()
    while len(rates) < RUNS:
        start = time.thread_time()
        operations = run(rounds)
        seconds = time.thread_time() - start
        if seconds < RUN_SECONDS / 2:
            rounds *= 2
        else:
            rates.append(operations / seconds)
    return max(rates)
