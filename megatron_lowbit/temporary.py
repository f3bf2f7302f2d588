"""Names for what is not finished yet. Each says which process writes it, so that a later one can tell a dead owner's.

    .NAME.WHERE-PID-START-RANDOM.tmp       beside NAME, which it is renamed to when it is whole
    megatron-lowbit-WHERE-PID-START-RANDOM in the machine's folder for temporary files

WHERE is a digest of this boot of this machine and of the namespace of process ids: containers share process ids, and
two of them may work in one folder. START tells a process from an earlier one of the same number.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PATIENCE = 300.0  # seconds after which what another machine has not touched is taken for dead

_OWNER = r"([0-9a-f]{8})-(\d{1,9})-(\d{1,20}|x)-[0-9a-f]{8}"
_NAMED = re.compile(rf"\..+\.{_OWNER}\.tmp")
_SCRATCH = re.compile(rf"megatron-lowbit-{_OWNER}")
# Of earlier versions: .NAME.PID.tmp, .write-probe-PID, .lock.PID.probe, and what safetensors itself calls .tmpXXXXXX.
_NUMBERED = re.compile(r"\.(?:.+\.(\d{1,9})\.(?:tmp|probe)|write-probe-(\d{1,9}))")
_NAMELESS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


def beside(path: Path) -> Path:
    """Return a hidden name in the folder of `path`, which nobody else has, for a file or folder that becomes it."""
    return path.with_name(f".{path.name}.{_owner()}.tmp")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder of this process's own (mode 0700) for as long as the context lasts, and remove dead owners'."""
    machine = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        for found in machine.glob("megatron-lowbit-*"):
            owner = _SCRATCH.fullmatch(found.name)
            if owner and found.lstat().st_uid == os.geteuid() and _dead(*owner.groups()):
                remove(found)
    folder = machine / f"megatron-lowbit-{_owner()}"
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        remove(folder)


def remove_dead(folders: Iterable[Path], now: float | None = None, prefix: str = ".") -> None:
    """Delete what dead owners left half written in `folders`, whoever wrote it; never what a living one is writing.

    now: the time by the clock of the file system, from a caller that owns the folders. Without it, only what a dead
    process of this machine wrote is deleted; with it, also what nobody has touched for PATIENCE and no living process
    of this machine is known to own, and what earlier versions left.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.name.startswith(prefix) and _abandoned(path, now):
                    remove(path)


def remove(path: Path) -> None:
    """Delete a file or a whole folder; nothing happens where that is impossible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@functools.cache
def where() -> str:
    """Return what makes a process id unique: this boot of this machine, and the namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def start_of(pid: int) -> str | None:
    """Return when a process was started, in ticks of the machine; "x" where the machine does not say.

    None where there is no such process, or only its zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists() or not _runs(pid):
            return None
        return "x"
    return None if fields[0] in "ZX" else fields[19]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _owner() -> str:
    pid = os.getpid()
    return f"{_digest()}-{pid}-{start_of(pid)}-{secrets.token_hex(4)}"


def _digest() -> str:
    return hashlib.sha256(where().encode()).hexdigest()[:8]


def _dead(place: str, pid: str, start: str) -> bool:
    """Return whether the owner was a process of this machine and namespace, and is gone."""
    return place == _digest() and start_of(int(pid)) != start


def _abandoned(path: Path, now: float | None) -> bool:
    named, numbered = _NAMED.fullmatch(path.name), _NUMBERED.fullmatch(path.name)
    if named and named[1] == _digest():
        return _dead(*named.groups())
    if now is None or not (named or numbered or _NAMELESS.fullmatch(path.name)):
        return False
    if numbered and not named and start_of(int(numbered[1] or numbered[2])) is None:
        return True
    return now - path.lstat().st_mtime > PATIENCE
