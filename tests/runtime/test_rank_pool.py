"""The pool of ranks that the distributed tests rest on: order, errors, deaths and time-outs."""

from __future__ import annotations

import os

import pytest
import rank_cases
from commands import gone
from rank_pool import RankPool


@pytest.fixture
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


def test_results_come_in_rank_order_from_processes_that_stay(two_ranks):
    assert two_ranks.run(rank_cases.echo, "a") == [(0, 2, "a"), (1, 2, "a")]
    first, again = two_ranks.run(rank_cases.environment), two_ranks.run(rank_cases.environment)
    assert first == again
    assert {rank["pid"] for rank in first}.isdisjoint({os.getpid()}) and len({rank["pid"] for rank in first}) == 2
    assert all((rank["threads"], rank["omp"], rank["backend"]) == (1, "1", "gloo") for rank in first)


def test_an_exception_reaches_the_test_and_the_pool_starts_anew(pool):
    with pytest.raises(ValueError, match="rank 1 was told to") as caught:
        pool.run(rank_cases.raise_on, 1)
    assert "raise_on" in caught.value.__notes__[0] and "rank 1 of 2" in caught.value.__notes__[0]
    assert pool.run(rank_cases.echo, 3) == [(0, 2, 3), (1, 2, 3)]
    with pytest.raises(RuntimeError, match=r"ended \(exit code 7\)"):
        pool.run(rank_cases.die_on, 0)
    ranks = [rank["pid"] for rank in pool.run(rank_cases.environment)]
    with pytest.raises(TimeoutError, match=r"\[0, 1\] of 2 gave no answer to sleep"):
        pool.run(rank_cases.sleep, 600.0, timeout=0.5)
    assert all(gone(pid) for pid in ranks), "ended, ten minutes before they would have been"


def test_a_function_that_workers_may_not_find(pool):
    with pytest.raises(ValueError, match="which workers can import"):
        pool.run(test_a_function_that_workers_may_not_find)
