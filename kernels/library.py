"""The C++ kernels of CPUs: found, or the reason why there are none.

Nothing is built at import; build.py says where a library is kept. Without a compiler, or where the build fails, the
torch reference runs, and one line says so.

$MEGATRON_LOWBIT_KERNELS   auto, the default: as above
                           reference: the torch reference
                           cpu: the C++ kernels or an error;  triton: what gpu.py makes of it
$CXX                       the compiler; else c++, else g++
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from typing import Any

from megatron_lowbit.kernels import build

logger = logging.getLogger("megatron_lowbit")

MODES = ("auto", "reference", "triton", "cpu")


class Library:
    """A library of kernels that is built and loaded when it is first asked for.

    name: of its source in csrc/; arguments: {function: argument types}; results: {function: type}, int where not
    given.
    """

    def __init__(self, name: str, arguments: dict[str, list[Any]], results: dict[str, Any] | None = None):
        self.name, self.arguments, self.results = name, arguments, results or {}
        self.loaded: list[ctypes.CDLL | Exception] = []  # the library, or why there is none; empty before the first use
        self._loading = threading.Lock()

    def find(self) -> ctypes.CDLL | None:
        """Return the kernels; None where the reference is to run. Raises RuntimeError where they were demanded."""
        mode = os.environ.get("MEGATRON_LOWBIT_KERNELS", "auto")
        if mode == "reference":
            return None
        if mode not in MODES:
            raise RuntimeError(f"MEGATRON_LOWBIT_KERNELS={mode}: use {', '.join(MODES[:-1])} or {MODES[-1]}")
        if not self.loaded:
            self._load(mode)
        loaded = self.loaded[0]
        if isinstance(loaded, ctypes.CDLL):
            return loaded
        if mode == "cpu":
            raise RuntimeError(f"MEGATRON_LOWBIT_KERNELS=cpu: {_one_line(loaded)}") from loaded
        return None

    def _load(self, mode: str) -> None:
        with self._loading:
            if self.loaded:
                return
            try:
                library = build.load(self.name)
                for name, types in self.arguments.items():
                    getattr(library, name).argtypes = types
                    getattr(library, name).restype = self.results.get(name, ctypes.c_int)
                self.loaded.append(library)
            except (OSError, RuntimeError) as error:
                self.loaded.append(error)
                if mode != "cpu":
                    logger.warning("CPU kernels: %s; the slower torch reference runs", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
