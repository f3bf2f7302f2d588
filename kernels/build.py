"""Builds hybrid.cpp or linear.cpp at first use and loads it; the library is kept for the next process.

It is kept in $XDG_CACHE_HOME/megatron_lowbit (~/.cache by default), and what is loaded from there runs in this process.
So the folder has to be this user's and nobody else may write in it, nor in the file; where another user has made it,
a private folder of this user below the machine's folder for temporary files takes its place, and one line says so.

    NAME-KEY-SUM.so      NAME: hybrid or linear
                         KEY: a digest of the sources, the compiler and its version, the flags and the CPU
                         SUM: the SHA-256 of the library itself; a file that is not what its name says is built again
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_lowbit.temporary import beside, remove, remove_dead, scratch_folder

logger = logging.getLogger("megatron_lowbit")

_FOLDER = Path(__file__).with_name("csrc")
SOURCES = {name: _FOLDER / f"{name}.cpp" for name in ("hybrid", "linear")}
HEADERS = sorted(_FOLDER.glob("*.h"))
# No fast-math and no fused multiply-add: results are those of the torch reference.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-shared", "-fPIC", "-w"]
# For a compiler that hangs. A minute and a half of computing is enough, and on a busy machine that takes several times
# as long.
SECONDS = 900
_kept_open: list[int] = []  # the loader knows a library by its name, here the number of its descriptor


def load(name: str) -> ctypes.CDLL:
    """Load the library of that name, built first if need be. Raises RuntimeError and OSError where that is
    impossible."""
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    sources = [path.read_text() for path in (SOURCES[name], *HEADERS)]
    key = hashlib.sha256("\0".join([*sources, *compiler, version, *FLAGS, _cpu()]).encode()).hexdigest()[:24]
    stem = f"{name}-{key}"
    for folder in _folders():
        try:
            if not _is_private(folder):
                logger.warning(
                    "CPU kernels: %s belongs to another user or may be written by others, so nothing is loaded from it",
                    folder,
                )
                continue
            return _load_from(folder, stem) or _build_in(folder, stem, compiler)
        except OSError:  # a folder that cannot be written
            continue
    with scratch_folder() as folder:
        return _build_in(folder, stem, compiler)  # stays mapped when its file is gone


def _folders() -> Iterator[Path]:
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lowbit"
    yield Path(tempfile.gettempdir()) / f"megatron_lowbit-{os.geteuid()}"


def _is_private(folder: Path) -> bool:
    """Return whether the folder, made if need be, is this user's and only he may write in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    if found.st_mode & 0o022:  # made with a lenient umask: what others have put there is not ours
        folder.chmod(0o700)
    return True


def _load_from(folder: Path, stem: str) -> ctypes.CDLL | None:
    """Return the library of that name and key; None where there is none, or none that can be trusted."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):
            if library := _verified(path):
                return library
        remove(path)
    return None


def _verified(path: Path) -> ctypes.CDLL | None:
    """Load what was looked at, not what lies under its name a moment later; None for what is not ours, or damaged."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(opened, "rb", closefd=False) as file:
        found, total = os.fstat(opened), hashlib.file_digest(file, "sha256").hexdigest()
    ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    if not ours or path.stem.rpartition("-")[2] != total:
        os.close(opened)
        return None
    link = Path(f"/proc/self/fd/{opened}")
    if not link.exists():  # not Linux
        os.close(opened)
        return ctypes.CDLL(str(path))
    _kept_open.append(opened)
    return ctypes.CDLL(str(link))


def _build_in(folder: Path, stem: str, compiler: list[str]) -> ctypes.CDLL:
    """Let one of the processes that start together build, while the others wait; then load what was built."""
    with _one_at_a_time(folder):
        if library := _load_from(folder, stem):
            return library
        remove_dead([folder])
        unfinished = beside(folder / f"{stem}.so")
        try:
            _run([*compiler, *FLAGS, str(SOURCES[stem.partition("-")[0]]), "-o", str(unfinished)])
            unfinished.chmod(0o700)
            with open(unfinished, "rb") as file:
                total = hashlib.file_digest(file, "sha256").hexdigest()
            path = folder / f"{stem}-{total}.so"
            os.replace(unfinished, path)
        finally:
            remove(unfinished)
        library = _verified(path)
        if library is None:
            raise RuntimeError(f"{str(path)!r} is not what was built a moment ago")
        return library


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++"):
        if found := shutil.which(name):
            return [found]
    raise RuntimeError("no C++ compiler is installed (c++ or g++)")


def _run(command: list[str]) -> str:
    """Return what a command prints. Raises RuntimeError where it fails or takes longer than SECONDS."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:  # not to be taken for a cache that cannot be written
        raise RuntimeError(f"{command[0]} does not run ({error.strerror})") from error
    with process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started: c++ has cc1plus compile
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{command[0]} took longer than {SECONDS} s") from error
            raise
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with status {process.returncode} {errors.strip()}".strip())
    return output


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; without locks, each process builds its own."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cpu() -> str:
    """Return what -march=native looks at: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in wanted}))
