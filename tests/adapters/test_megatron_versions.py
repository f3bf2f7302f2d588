"""What the versions of Megatron-Core differ in: all of it in the one that is installed, whichever that is."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import megatron_llm_cases as llm_cases
import megatron_version_cases as cases
import pytest
import torch
from commands import needs_megatron
from ports import free_port
from tiny_models import build, make_artifact

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_threads_of_a_server_find_the_stand_in():
    """Megatron's servers step their engine in a thread; afterwards "cuda" is refused there again."""
    from megatron_lowbit.adapters.megatron import cpu_shims

    def made() -> str:
        with ThreadPoolExecutor(1) as pool:
            try:
                return str(pool.submit(torch.zeros, 1, device="cuda").result().device)
            except (AssertionError, RuntimeError):
                return "refused"

    with cpu_shims.engines():
        assert made() == "cpu"
    assert made() == "refused"


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:cpu"])
def test_a_device_that_is_made_of_its_name(name):
    """0.19's engine compares the device of a prompt with f"cuda:{torch.cuda.current_device()}"."""
    from megatron_lowbit.adapters.megatron import cpu_shims

    with cpu_shims.cuda_is_cpu():
        assert torch.device(name) == torch.zeros(1).device and torch.device("meta").type == "meta"


@pytest.mark.slow
@pytest.mark.skipif(llm_cases.lacking() is not None, reason=str(llm_cases.lacking()))
def test_its_own_server_and_coordinator(two_ranks):
    """MegatronLLM and MegatronAsyncLLM.serve with a patched model on two ranks: the tokens of transformers."""
    artifact = make_artifact(build("llama"), "W4A8", (2,))
    first, second = two_ranks.run(llm_cases.with_coordinator, artifact, free_port())
    expected = cases.by_transformers(artifact, 2)
    assert first == dict.fromkeys(("MegatronLLM", "MegatronAsyncLLM", "served"), expected)
    assert second == {"MegatronLLM": []}
