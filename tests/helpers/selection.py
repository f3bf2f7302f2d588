"""Which tests run, in what order and on which worker of pytest-xdist. A plugin of pytest, which conftest.py names.

`quick` marks, by itself, every test that starts neither processes nor ranks (`pytest -m quick`, `make test-quick`).
What takes longest begins first, so that the workers end together; tests marked `slow` come last, and with
`--minutes N` those that would begin later than that are skipped. `-n 3 --dist loadgroup` gives a file to one worker,
since its tests share what they have prepared; a slow test is by itself, unless `xdist_group` keeps several together.
"""

from __future__ import annotations

import functools
import inspect
import time
from pathlib import Path
from types import ModuleType

import pytest

LONGEST = ("launch", "runtime", "qllm", "adapters", "kernels")  # folders; all others after them
RANKS = {"one_rank", "two_ranks", "three_ranks", "four_ranks", "pool_of"}
PREPARED = RANKS | {"embedded_artifact", "needs_namespaces"}  # fixtures that start processes or run a command
STARTERS = ("commands", "forked", "rank_pool", "warm", "subprocess", "multiprocessing")  # modules whose use starts some
HELPERS = Path(__file__).parent
LATE = "the minutes for slow tests are over"

_began = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, metavar="N", help="skip slow tests that would begin after N minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_began] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for number, item in enumerate(items):
        assert isinstance(item, pytest.Function)
        if is_slow(item):
            if item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(f"slow{number}"))
        elif PREPARED.isdisjoint(item.fixturenames) and not starts_processes(item.module):
            item.add_marker("quick")
    items.sort(key=lambda item: (is_slow(item), turn(item)))


@functools.cache
def starts_processes(module: ModuleType) -> bool:
    """Return whether a test file uses one of STARTERS, by itself or through another of the helpers."""
    found = {value if isinstance(value, ModuleType) else inspect.getmodule(value) for value in vars(module).values()}
    used = [other for other in found if other is not None and other is not module]
    helpers = [other for other in used if Path(getattr(other, "__file__", None) or "").parent == HELPERS]
    return any(other.__name__ in STARTERS for other in used) or any(map(starts_processes, helpers))


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def turn(item: pytest.Item) -> int:
    """Return the place of a test's folder in LONGEST."""
    folder = item.path.parent.name
    return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and is_slow(item) and time.monotonic() - item.config.stash[_began] > 60 * minutes:
        pytest.skip(LATE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    late = sum(LATE in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if late:
        terminalreporter.write_line(f"{late} slow tests did not begin: {LATE}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Return what `--dist loadgroup` means here; None, for xdist's own, with another --dist."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByFileOrGroup(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    config.option.loadscopereorder = False  # they are in order
    return ByFileOrGroup(config, log)
