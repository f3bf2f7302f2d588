"""Sites whose values leave their calibrated ranges: all ranks change to bf16 in the same call, or none does."""

from __future__ import annotations

import json
import logging

import pytest
import rank_cases
import torch
from commands import EVALUATION, run_here
from tiny_models import build, make_artifact
from torch import Tensor

from megatron_lowbit.adapters.huggingface import apply_to_huggingface
from megatron_lowbit.adapters.patching import row_parallel_modules
from megatron_lowbit.collectives import VirtualReducer
from megatron_lowbit.config import CommConfig, CommMode
from megatron_lowbit.drift import DRIFT_INTERVAL
from megatron_lowbit.ranges import synthetic_plan

MODES = ["one_shot", "two_shot", "exact_sum"]
CALLS = 2 * DRIFT_INTERVAL + 3


def partial_sums(seed: int, tokens: int = 5) -> Tensor:
    """float32 [2, tokens, 40]."""
    return torch.randn(2, tokens, 40, generator=torch.Generator().manual_seed(seed))


PLAN = synthetic_plan(partial_sums(0, 400), CommConfig(preset="paper"))


def stream(drifted_from: int) -> list[Tensor]:
    """The partial sums of every call; from that one on rank 1's are five times as large."""
    calls = [partial_sums(1 + number) for number in range(CALLS)]
    for partials in calls[drifted_from:]:
        partials[1] *= 5
    return calls


def switched_at(mode: CommMode, calls: list[Tensor], sums: list[Tensor]) -> int:
    """The first call whose sum is that of bf16 values; all after it have to be, and all before it not."""
    low_bit, bf16 = VirtualReducer(PLAN, mode), VirtualReducer(None, "bf16")
    is_bf16 = []
    for partials, y in zip(calls, sums, strict=True):
        expected = low_bit.all_reduce(list(partials)), bf16.all_reduce(list(partials))
        assert torch.equal(y, expected[0]) or torch.equal(y, expected[1])
        is_bf16.append(torch.equal(y, expected[1]))
    assert is_bf16 == sorted(is_bf16)
    return is_bf16.index(True) if any(is_bf16) else CALLS


@pytest.mark.parametrize("drifted_from", [0, DRIFT_INTERVAL - 1, DRIFT_INTERVAL + 1, CALLS])
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_switch_at_the_same_call(two_ranks, mode, drifted_from):
    """One rank's drift is enough; one loud call in a window of 64 is not, and the window after it is judged anew."""
    calls = stream(drifted_from)
    ranks = two_ranks.run(rank_cases.drifting, PLAN, calls, mode, 0.05)
    for mine, theirs in zip(ranks[0]["sums"], ranks[1]["sums"], strict=True):
        assert torch.equal(mine, theirs)
    at = switched_at(mode, calls, ranks[0]["sums"])
    assert at == {0: DRIFT_INTERVAL, CALLS: CALLS}.get(drifted_from, 2 * DRIFT_INTERVAL)
    logged = [line for rank in ranks for line in rank["logged"]]
    assert ranks[1]["logged"] == [] and len(logged) == (at < CALLS)
    assert all("model.layers.0: " in line and "comm.drift_threshold=0.05" in line for line in logged)
    checks = at // DRIFT_INTERVAL if at < CALLS else CALLS // DRIFT_INTERVAL
    assert [rank["checks"] for rank in ranks] == [checks, checks]


@pytest.mark.parametrize("mode", MODES)
def test_virtual_ranks_switch_with_the_real_ones(two_ranks, mode, caplog):
    calls = stream(10)
    real = two_ranks.run(rank_cases.drifting, PLAN, calls, mode, 0.05)
    virtual = VirtualReducer(PLAN, mode, 0.05)
    virtual.at("model.layers.0")
    with caplog.at_level(logging.WARNING, "megatron_lowbit"):
        sums = [virtual.all_reduce(list(partials)) for partials in calls]
    assert all(torch.equal(a, b) for a, b in zip(sums, real[0]["sums"], strict=True))
    assert [record.getMessage() for record in caplog.records] == real[0]["logged"], "the share, too, is the same"
    assert virtual.saturation().saturated == sum(rank["saturated"] for rank in real) > 0


def test_rank1_scales_drift_when_values_are_far_from_all_that_was_calibrated(two_ranks):
    """Five times as large is what they follow; a hundred times is beyond 16 standard deviations."""
    plan = synthetic_plan(partial_sums(0, 400), CommConfig())
    for factor, checks, lines in ((1, 2, 0), (20, 1, 1)):
        calls = [torch.stack([partials[0], factor * partials[1]]) for partials in stream(0)]
        ranks = two_ranks.run(rank_cases.drifting, plan, calls, "two_shot", 0.5)
        assert [rank["checks"] for rank in ranks] == [checks, checks]
        assert [len(rank["logged"]) for rank in ranks] == [lines, 0]


@pytest.mark.parametrize(("fraction", "threshold"), [(1.0, 0.0), (0.0, None)])
def test_what_cannot_drift_checks_nothing(two_ranks, fraction, threshold):
    plan = synthetic_plan(partial_sums(0, 400), CommConfig(preset="paper", bf16_fraction=fraction))
    for mode in MODES[:2]:
        for rank in two_ranks.run(rank_cases.drifting, plan, stream(0), mode, threshold):
            assert rank["checks"] == 0 and rank["logged"] == []


def test_a_reduce_scatter_falls_back_too(two_ranks):
    calls = [partials.repeat(1, 2, 1) for partials in stream(0)]
    for rank, result in enumerate(two_ranks.run(rank_cases.drifting, PLAN, calls, "one_shot", 0.05, True)):
        bf16 = VirtualReducer(None, "bf16").all_reduce(list(calls[-1]))
        assert torch.equal(result["sums"][-1], bf16.chunk(2)[rank])
        assert result["checks"] == 1


def test_evaluate_counts_saturated_values(tmp_path):
    use = [
        "model=embedded",
        "virtual_tp=2",
        "comm.mode=one_shot",
        "comm.preset=paper",
        *EVALUATION,
        "calibration.samples=4",
    ]
    code = run_here("evaluate", *use, "calibration.data=stdlib:calibration", f"output_dir={tmp_path}")
    assert code == 0
    row = json.loads((tmp_path / "evaluate.json").read_text())["rows"][-1]
    assert isinstance(row["saturated"], int) and row["saturated"] > 0


def test_apply_guards_only_where_it_is_asked_to():
    model, artifact = build("llama"), make_artifact(build("llama"), "none", (2,))
    for given, threshold in (("one_shot", None), (CommConfig(mode="one_shot"), 0.1)):
        apply_to_huggingface(model, artifact, 2, given)
        modules = row_parallel_modules(model)
        assert modules and all(module.reducer.guard.threshold == threshold for module in modules.values())
        assert all(module.reducer.guard.site == name for name, module in modules.items())
