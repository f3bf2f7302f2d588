"""An output folder belongs to one running job: <output_dir>/.lock names it, and is gone when the job is.

The file is linked into place whole, which only one process can do. A lock whose owner is dead is taken over: on the
same host (same boot, same namespace of process ids) where no such process runs; from another host where nobody has
refreshed it for PATIENCE, or where it is this Slurm job's before it was requeued. Only the holder of a second file of
the same kind may remove a dead lock, and looks again before it does, so of two that come at once one wins.
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

from megatron_lowbit.config import LowBitError
from megatron_lowbit.files import discard

NAME = ".lock"
REFRESH, PATIENCE = 30.0, 300.0  # seconds


class FolderLock:
    """Only rank 0 calls `take`; `release` is for everyone."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.owner = _myself()
        self._held = False
        self._done = threading.Event()

    def take(self) -> None:
        """Raises LowBitError that names the job which owns the folder."""
        for _ in range(100):
            if self._link(self.path):
                self._held = True
                threading.Thread(target=self._refresh, daemon=True).start()
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
        whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
            raise LowBitError(f"cannot write {str(path)!r}: {error.strerror}") from None
        finally:
            discard(whole)

    def _remove(self, dead: dict[str, Any]) -> bool:
        """Remove a dead owner's lock; False where another process does."""
        guard = self.path.with_name(f"{NAME}-takeover")
        if not self._link(guard):
            with contextlib.suppress(OSError):
                if time.time() - guard.stat().st_mtime > PATIENCE:  # its maker died in the middle
                    discard(guard)
            return False
        try:
            if _read(self.path) != dead:
                return False
            discard(self.path)
            return True
        finally:
            discard(guard)

    def _age(self) -> float:
        """Seconds since the lock was refreshed, by the clock of its file system."""
        probe = self.path.with_name(f"{NAME}.{os.getpid()}.probe")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
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
    return {"host": socket.gethostname(), "where": _where(), "pid": os.getpid(), "start": _start(os.getpid()), **slurm}


def _where() -> str:
    """What makes a process id unique: this boot of this machine, and the namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _start(pid: int) -> str | None:
    """When a process was started, in ticks of the machine; None where there is no such process, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _dead(found: dict[str, Any], me: dict[str, Any], age: float) -> bool:
    if found.get("where") == me["where"]:
        start = _start(int(found.get("pid", 0)))
        return found.get("pid") == me["pid"] or start is None or start != found.get("start")
    if "job" in me and found.get("job") == me["job"] and found.get("restarts", 0) < me["restarts"]:
        return True
    return age > PATIENCE


def _named(owner: dict[str, Any]) -> str:
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}{job}"
