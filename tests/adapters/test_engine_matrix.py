"""The table of docs/engines.md: every cell is what the engine does with a tiny model."""

import engine_matrix
import pytest
from commands import needs_deepspeed, needs_megatron

pytestmark = [needs_deepspeed, needs_megatron]


def test_every_model_has_a_row():
    assert list(engine_matrix.written()) == list(engine_matrix.MODELS)


@pytest.mark.parametrize("name", engine_matrix.MODELS)
def test_a_row_is_what_happens(name, two_ranks, tmp_path):
    assert engine_matrix.cells(name, two_ranks, tmp_path) == engine_matrix.written()[name]
