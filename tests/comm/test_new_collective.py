"""The collective that docs/extending.md adds: its lines, run as they stand there, on real ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import rank_cases
import torch

from megatron_lowbit.comm.collectives import COLLECTIVES
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommMode

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def lines():
    """The page's code; what it registers is taken out again."""
    section = PAGE.read_text().split("\n## A collective\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    before = dict(COLLECTIVES)
    yield code
    COLLECTIVES.clear()
    COLLECTIVES.update(before)


@pytest.mark.parametrize("size", [2, 4])
def test_the_pages_collective(size, lines, pool_of):
    partials = torch.randn(size, 8, 3, 16, generator=torch.Generator().manual_seed(0))
    ranks = pool_of(size).run(rank_cases.new_collective, lines, "gather_bf16", partials)
    exec(lines, {})
    reducer = VirtualReducer(None, "gather_bf16")
    simulated = reducer.all_reduce(list(partials))
    expected = partials.bfloat16().float()[0]
    for partial in partials[1:]:  # in rank order; torch sums so few values one after the other
        expected = expected + partial.bfloat16().float()
    for number, (whole, part, bits) in enumerate(ranks):
        assert torch.equal(whole, simulated) and torch.equal(part, whole.chunk(size)[number])
        assert torch.equal(whole, expected) and bits == 16
    assert COLLECTIVES["gather_bf16"].name == "gather_bf16"


def test_every_collective_has_a_key():
    """The names in comm.mode are those of the files, and auto."""
    assert {*get_args(CommMode)} == {*COLLECTIVES, "auto"}
