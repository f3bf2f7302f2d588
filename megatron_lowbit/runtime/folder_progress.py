"""A progress bar for what another library writes into a folder without telling how far it is."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_lowbit.runtime.metrics import on_a_terminal, progress

LOOK = 0.2  # seconds between two looks at the folder


@contextlib.contextmanager
def folder_progress(folder: Path, total: int, description: str, rank: int = 0) -> Iterator[None]:
    """Show which percent of `total` bytes in a folder is being written, within the context.

    On rank 0's standard error as it is at the beginning, where that is a terminal. Files may be a little larger or
    smaller than `total`: the bar ends when the context does.
    """
    if rank != 0 or not on_a_terminal():
        yield
        return
    ended = threading.Event()
    bar = progress(_percents(folder, total, ended), 100, description)
    next(bar)  # on this thread, which may send standard error elsewhere within the context
    watcher = threading.Thread(target=deque, args=(bar, 0), name="folder-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _percents(folder: Path, total: int, ended: threading.Event) -> Iterator[int]:
    """Yield 0 to 99, each when so much is there, or the writing has ended."""
    for percent in range(100):
        while 100 * _bytes(folder) < percent * total and not ended.wait(LOOK):
            pass
        yield percent


def _bytes(folder: Path) -> int:
    """Return the size of all files in a folder; 0 where one is renamed meanwhile: the next look will do."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0
