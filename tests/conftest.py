"""Fixtures that all tests share: pools of real ranks, and a quiet, offline environment."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch, datasets or transformers: threads, CPU, no network, no cache outside the test run.
_CACHE = tempfile.TemporaryDirectory(prefix="lowbit-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # make test-gpu sets it
os.environ |= {"DS_ACCELERATOR": "cpu"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": _CACHE.name, "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"PYTHONSAFEPATH": "1"}  # of the commands that tests start
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # as if no launcher had started pytest
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from rank_pool import RankPool  # noqa: E402

torch.set_num_threads(1)
pytest_plugins = ["selection"]


_status = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    session.config.stash[_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End with pytest's own exit code. Tests of ranks that nobody answers leave threads that wait inside PyTorch's C++,
    and Python's end has crashed under one, after all tests had passed."""
    status = config.stash.get(_status, None)
    if status is not None:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pytest_collection_modifyitems(items):
    """Skip the tests of a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that PyTorch sees"))


# A file's ranks are its own: what a case leaves in them reaches no other file, and idle ranks poll their sockets.


@pytest.fixture(scope="module")
def one_rank():
    """A process group of one, for frameworks that do not run without."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def three_ranks():
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pool_of(request):
    """The pool of so many ranks: pool_of(2).run(...)."""
    return lambda size: request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, request) -> Path:
    """A folder that all workers of one `pytest -n` share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other worker is in here; the lock goes with the process, so that none is left behind."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def needs_namespaces(shared_folder):
    """Skips where this process cannot make network namespaces; one test at a time has them, for their links' sake."""
    from megatron_lowbit.launch.bench import netlab

    with one_at_a_time(shared_folder / "namespaces.lock"):
        reason = netlab.no_namespaces()
        if reason is None:  # root in a container may still not be allowed to
            made = netlab.call("up", "1", "1gbit")
            netlab.call("down")
            reason = f"cannot make network namespaces: {made.stderr.strip()}" if made.returncode else None
        if reason is not None:
            pytest.skip(reason)
        yield


@pytest.fixture(scope="session")
def embedded_artifact(shared_folder):
    """Folder of the embedded model at W4A4 with plans for two and eight ranks, made by the README's first command."""
    from commands import CALIBRATION, run_here

    folder, config = shared_folder / "embedded", Path(__file__).parents[1] / "configs" / "debug_cpu.yaml"
    settings = [*CALIBRATION[1:], "comm.tp_sizes=[2,8]", f"output_dir={folder}"]
    with one_at_a_time(shared_folder / "embedded.lock"):  # the first worker makes it for all
        if not (shared_folder / "embedded.done").exists():
            assert run_here("quantize", "--config", config, *settings) == 0
            (shared_folder / "embedded.done").touch()
    return folder


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What a terminal gets of progress bars."""
    from rich.console import Console

    from megatron_lowbit.runtime import metrics

    text = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda stderr: Console(file=text, force_terminal=True, width=80))
    return text
