"""Memory of large tensors, given back to the system as soon as they are gone."""

from __future__ import annotations

import ctypes
import os

LARGE = 2 * 2**20  # bytes; smaller ones are mapped so often that it takes longer than what is computed in them
_M_MMAP_THRESHOLD = -3  # malloc.h


def map_large_tensors() -> bool:
    """Have glibc map each block of LARGE bytes and more by itself, unless the user has set a size; returns whether.

    By default the first one that is freed raises its limit, up to 32 MiB, and activations lie among the weights. What
    is aligned, as all of torch's memory is, glibc before 2.38 takes from beyond what was freed: a 370M Llama that
    prefills 512 tokens held 120 MiB of holes.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
