"""Says for whom a rank waits: a collective that waits does not know who has not come.

Every BEAT seconds each rank tells the store where the ranks met how many steps it has taken (`distributed.steps`). A
rank that has taken none for REPORT_AFTER seconds looks at the others: who has taken fewer, and who has stopped telling.
The lowest rank of those that wait prints a line. The store is with rank 0; where it does not answer, that is rank 0.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta

from torch import distributed as dist

from megatron_lowbit.runtime import distributed

BEAT = 2.0  # seconds
SILENT = 5  # beats that a rank may miss
REPORT_AFTER = 30.0  # seconds of waiting before a rank says for whom; then twice as long each time


class Presence:
    """Show that this rank, one of `size`, is there. `suspects` says whom it waits for; `stop` ends its threads."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._over = threading.Event()
        self._seen: dict[int, tuple[str, int, str, float]] = {}  # {rank: (its last heartbeat, steps, host, since when)}
        self._mine, self._since = distributed.steps(), time.monotonic()  # my steps, and when they changed
        self._answered = time.monotonic()  # the store
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._report)]
        for thread in self._threads if size > 1 else ():
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)

    def suspects(self) -> str | None:
        """Return who keeps this rank waiting, as far as that can be known."""
        now, patience = time.monotonic(), SILENT * BEAT
        if now - self._answered > patience and self.rank != 0:
            return "rank 0, which gives no sign of life"
        silent = {other for other, (*_, since) in self._seen.items() if now - since > patience}
        behind = {other for other, (_, steps, *_) in self._seen.items() if steps < self._mine}
        who = silent or behind
        if not who:
            return None
        named = ", ".join(f"rank {other} on {self._seen[other][2]}" for other in sorted(who)[:8])
        more = f" and {len(who) - 8} more" if len(who) > 8 else ""
        return f"{named}{more}" + (", which gives no sign of life" if silent else "")

    def _first_of_those_that_wait(self) -> bool:
        now = time.monotonic()
        lower = [self._seen.get(other) for other in range(self.rank)]
        return all(beat is None or beat[1] < self._mine or now - beat[3] > SILENT * BEAT for beat in lower)

    def _beat(self) -> None:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store: dist.Store = dist.TCPStore(host, port, timeout=timedelta(seconds=60), wait_for_workers=False)
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"lowbit/{restart}/steps", store)
            number = 0
            while not self._over.wait(BEAT if number else 0):
                number += 1
                now = time.monotonic()
                if (steps := distributed.steps()) != self._mine:
                    self._mine, self._since = steps, now
                store.set(str(self.rank), f"{number} {steps} {socket.gethostname()}")
                if now - self._since > REPORT_AFTER / 3:
                    self._look(store)
                self._answered = time.monotonic()
        except Exception:  # rank 0 has left; whatever is wrong there, the collectives tell
            return

    def _look(self, store: dist.Store) -> None:
        for other in range(self.size):
            if other == self.rank:
                continue
            if not store.check([str(other)]):  # it has never told: it ended, or was stopped, as soon as all had met
                self._seen.setdefault(other, ("", 0, "an unknown host", time.monotonic()))
            else:
                beat = store.get(str(other)).decode()
                if other not in self._seen or beat != self._seen[other][0]:
                    _, steps, host = beat.split(" ", 2)
                    self._seen[other] = beat, int(steps), host, time.monotonic()

    def _report(self) -> None:
        report_at, since = REPORT_AFTER, self._since
        while not self._over.wait(min(BEAT, 1.0)):
            if since != self._since:
                report_at, since = REPORT_AFTER, self._since
            waited = time.monotonic() - since
            if waited > report_at and (who := self.suspects()) and self._first_of_those_that_wait():
                report_at = 2 * waited
                print(
                    f"megatron-lowbit: rank {self.rank} has waited {waited:.0f} s for {who}",
                    file=sys.stderr,
                    flush=True,
                )


_here: Presence | None = None


def start(rank: int, size: int) -> None:
    """Begin, once the ranks have met."""
    global _here
    stop()
    _here = Presence(rank, size)


def stop() -> None:
    """End, before this rank leaves; nothing where it has not begun."""
    global _here
    if _here is not None:
        _here.stop()
    _here = None


def suspects() -> str | None:
    """Return who keeps this rank waiting, as far as that can be known."""
    return None if _here is None else _here.suspects()
