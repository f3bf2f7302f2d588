"""What the versions of Megatron-Core differ in: all of it in the one that is installed, whichever that is."""

from __future__ import annotations

import logging

import megatron_version_cases as cases
import pytest
from commands import needs_megatron

pytestmark = needs_megatron


@pytest.mark.parametrize("size", [1, 2])
def test_everything_runs(pool_of, tmp_path, size):
    """The same tokens as transformers makes, by each engine, and the same logits from each kind of model."""
    for results in cases.run(pool_of(size), tmp_path / "checkpoint"):
        minor = int(results.pop("version").split(".")[1])
        has_llm = results.pop("MegatronLLM")
        assert has_llm is (True if minor >= 18 else None)
        assert all(value is True for value in results.values()), results


@pytest.mark.parametrize(("version", "rank", "warned"), [("0.21.0rc1", "0", 1), ("0.21.0", "1", 0), ("0.19.9", "0", 0)])
def test_a_version_never_tried_is_named(version, rank, warned, caplog, monkeypatch):
    from megatron_lowbit.adapters.megatron import versions

    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.WARNING, "megatron_lowbit"):
        versions.warn_untried(version)
    assert len(caplog.messages) == warned
    assert all(version in line and "0.16, 0.17, 0.18, 0.19, 0.20" in line for line in caplog.messages)
