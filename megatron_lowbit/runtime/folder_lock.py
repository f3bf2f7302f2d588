"""An output folder belongs to one running job: <output_dir>/.lock names it, and is gone when the job is.

The file is linked into place whole, which only one process can do. A lock whose owner is dead is taken over: on the
same host (same boot, same namespace of process ids) where no such process runs; from another host where nobody has
refreshed it for PATIENCE, or where it is this Slurm job's before it was requeued. Only the holder of a second file of
the same kind may remove a dead lock, and looks again before it does, so of two that come at once one wins. Whoever
takes the folder deletes what dead owners left half written in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_lowbit.config import LowBitError, unwritten
from megatron_lowbit.io.files import discard, parse_json
from megatron_lowbit.temporary import PATIENCE, beside, remove_dead, start_of, where

NAME = ".lock"
REFRESH = 30.0  # seconds


class FolderLock:
    """Only rank 0 calls `take`; `release` is for everyone."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.owner = _myself()
        self._held = False
        self._done = threading.Event()

    def take(self) -> None:
        """Take the folder. Raises LowBitError that names the job which owns the folder."""
        for _ in range(100):
            if self._link(self.path):
                self._held = True
                threading.Thread(target=self._refresh, daemon=True).start()
                self._clean()
                return
            found = _read(self.path)
            if found is None:  # released between two looks
                continue
            if not _dead(found, self.owner, self._age()):
                raise LowBitError(
                    f"output_dir {str(self.path.parent)!r} belongs to {_named(found)}; wait for it, or choose another "
                    f"output_dir (if that job is gone, delete {str(self.path)!r})"
                )
            if self._remove(found):
                print(f"took over {str(self.path.parent)!r} from {_named(found)}, which has ended without leaving it")
            time.sleep(0.05)
        raise LowBitError(f"cannot take {str(self.path)!r}: others keep taking it; choose another output_dir")

    def release(self) -> None:
        self._done.set()
        if self._held and _read(self.path) == self.owner:
            discard(self.path)
        self._held = False

    def _link(self, path: Path) -> bool:
        """Make `path`, holding who we are; False where it exists."""
        whole = beside(path)
        try:
            whole.write_text(json.dumps(self.owner) + "\n")
            try:
                os.link(whole, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                with contextlib.suppress(FileExistsError), open(path, "x") as file:
                    file.write(whole.read_text())
                    return True
                return False
            return True
        except OSError as error:
            raise unwritten(path, error) from None
        finally:
            discard(whole)

    def _remove(self, dead: dict[str, Any]) -> bool:
        """Remove a dead owner's lock; False where another process does."""
        guard = self.path.with_name(f"{NAME}-takeover")
        if not self._link(guard):
            self._remove_guard(guard)
            return False
        try:
            if _read(self.path) != dead:
                return False
            self.path.unlink()
            return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LowBitError(f"cannot remove {str(self.path)!r}: {error.strerror}; remove it") from None
        finally:
            discard(guard)

    def _remove_guard(self, guard: Path) -> None:
        """Remove a guard whose maker died in the middle. Only one process can rename it, and it looks again."""
        found = _read(guard)
        if found is None or not _dead(found, self.owner, self._age(guard)):
            return
        aside = beside(guard)
        with contextlib.suppress(OSError):
            os.rename(guard, aside)
            if _read(aside) != found:  # a living one's, made since
                os.link(aside, guard)
        discard(aside)

    def _clean(self) -> None:
        folder = self.path.parent
        folders = [folder, folder / "artifact", folder / "resume", *folder.glob("resume/ranges-*")]
        with contextlib.suppress(OSError):
            remove_dead(folders, self.path.stat().st_mtime)

    def _age(self, path: Path | None = None) -> float:
        """Return the seconds since the lock (or `path`) was refreshed, by the clock of its file system."""
        probe = beside(self.path)
        try:
            probe.touch()
            return probe.stat().st_mtime - (path or self.path).stat().st_mtime
        except OSError:
            return 0.0
        finally:
            discard(probe)

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH):
            with contextlib.suppress(OSError):
                if _read(self.path) == self.owner:
                    os.utime(self.path)


def _myself() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    slurm = {"job": job, "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))} if job else {}
    return {"host": socket.gethostname(), "where": where(), "pid": os.getpid(), "start": start_of(os.getpid()), **slurm}


def _read(path: Path) -> dict[str, Any] | None:
    """Return who a lock names: an empty dict where that cannot be read, None where there is no lock."""
    try:
        found = parse_json(path.read_bytes()[:65536])
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        return {}
    kinds = {"host": str, "where": str, "pid": int, "start": str, "job": str, "restarts": int}
    return found if all(type(found[key]) is kind for key, kind in kinds.items() if key in found) else {}


def _dead(found: dict[str, Any], me: dict[str, Any], age: float) -> bool:
    """Return whether the owner is known to be gone. One that cannot be read is taken for another host's."""
    if found.get("where") == me["where"] and "pid" in found:
        start = start_of(found["pid"])
        return found["pid"] == me["pid"] or start is None or start != found.get("start")
    if "job" in me and found.get("job") == me["job"] and found.get("restarts", 0) < me["restarts"]:
        return True
    return age > PATIENCE


def _named(owner: dict[str, Any]) -> str:
    job = f", Slurm job {owner['job'][:80]}" if owner.get("job") else ""
    name = f"process {str(owner.get('pid', '?'))[:20]} on {owner.get('host', 'an unknown host')[:80]}{job}"
    return " ".join(name.encode("ascii", "replace").decode().split())
