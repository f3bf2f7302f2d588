"""Cases of a test that `make test-all` alone runs, beside those that look at the same code every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(always: Iterable[str], cases: Iterable[str]) -> list[Any]:
    """Return the cases, marked slow but for those of `always`, which have to be among them."""
    wanted, names = set(always), list(cases)
    assert wanted <= set(names), f"no such case: {wanted - set(names)}"
    return [name if name in wanted else pytest.param(name, marks=pytest.mark.slow) for name in names]


def slow(*values: Any) -> Any:
    """Return one case of several parameters, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
