"""Sites whose values leave their calibrated ranges: all ranks change to bf16 in the same call, or none does."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import rank_cases
import sequence_parallel_cases
import torch
from commands import CALIBRATION, CALIBRATION_TEXT, EVALUATION, run_here
from slow_cases import slow, slow_but
from tiny_models import build, logits, make_artifact
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.adapters.huggingface.apply import apply_to_huggingface
from megatron_lowbit.adapters.patching import row_parallel_modules
from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.drift import DRIFT_INTERVAL
from megatron_lowbit.comm.plan import CommPlan, SitePlan
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, CommMode

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


SCHEDULE = [1, 2, 4, 8, 16, 32, 64, 128]  # of CALLS calls


def test_the_schedule_of_checks():
    guard = VirtualReducer(PLAN, "one_shot", 0.1).guard
    x = torch.zeros(1, 40)
    assert [number for number in range(1, 257) if guard.due(x)] == [*SCHEDULE, 192, 256]


# (drift from call, found at call): the first is met at once. Calls 17 .. 32, of which four are loud, hold 40 % of them.
@pytest.mark.parametrize(
    ("first", "found"), [(1, 1), slow(2, 2), (3, 4), slow(29, 32), (67, 128), slow(CALLS + 1, CALLS + 1)]
)
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_switch_at_the_same_call(two_ranks, mode, first, found):
    """One rank's drift is enough; the call that is checked is sent in bf16 already."""
    calls = stream(first - 1)
    ranks = two_ranks.run(rank_cases.drifting, PLAN, calls, mode, 0.0)
    for mine, theirs in zip(ranks[0]["sums"], ranks[1]["sums"], strict=True):
        assert torch.equal(mine, theirs)
    assert switched_at(mode, calls, ranks[0]["sums"]) == min(found - 1, CALLS)
    logged = [line for rank in ranks for line in rank["logged"]]
    assert ranks[1]["logged"] == [] and len(logged) == (found <= CALLS)
    assert all("model.layers.0: " in line and "comm.drift_threshold=0" in line for line in logged)
    checks = sum(number <= found for number in SCHEDULE)
    assert [rank["checks"] for rank in ranks] == [checks, checks]


def test_one_loud_call_of_many_is_no_drift():
    reducer, calls = VirtualReducer(PLAN, "one_shot", 0.1), stream(CALLS)
    for number, partials in enumerate(calls, 1):
        reducer.all_reduce([20 * x if number == 70 else x for x in partials])
    assert not reducer.saturation().bf16 and reducer.saturation().saturated > 100


def test_a_few_odd_tokens_are_no_drift():
    """Half of two tokens is nothing yet; half of forty is."""
    for tokens, drifts in ((2, False), (40, True)):
        reducer, partials = VirtualReducer(PLAN, "one_shot", 0.1), partial_sums(3, tokens)
        partials[:, : tokens // 2] *= 5
        reducer.all_reduce(list(partials))
        assert reducer.saturation().bf16 == drifts, (tokens, reducer.saturation())


def test_calls_that_the_guard_does_not_see_are_in_the_share():
    """A replayed CUDA graph encodes without it: many values of which few saturate, and a small call after them."""
    reducer = VirtualReducer(PLAN, "one_shot", 0.02)
    reducer.all_reduce(list(partial_sums(1, 400)))
    before = reducer.saturation()
    for number in range(20):
        for rank, x in enumerate(partial_sums(10 + number, 400)):
            reducer.formats.first().pack(x, rank)
    counts = reducer.saturation()
    assert counts.saturated - before.saturated > 0.02 * 5 * 40, "as many as would be a drift of the next call alone"
    reducer.all_reduce(list(partial_sums(2)))
    assert not reducer.saturation().bf16


@pytest.mark.parametrize("mode", MODES)
def test_virtual_ranks_switch_with_the_real_ones(two_ranks, mode, caplog):
    calls = stream(10)
    real = two_ranks.run(rank_cases.drifting, PLAN, calls, mode, 0.05)
    virtual = VirtualReducer(PLAN, mode, 0.05)
    virtual.set_site("model.layers.0")
    with caplog.at_level(logging.WARNING, "megatron_lowbit"):
        sums = [virtual.all_reduce(list(partials)) for partials in calls]
    assert all(torch.equal(a, b) for a, b in zip(sums, real[0]["sums"], strict=True))
    assert [record.getMessage() for record in caplog.records] == real[0]["logged"], "the share, too, is the same"
    assert virtual.saturation().saturated == sum(rank["saturated"] for rank in real) > 0
    sent = sum(partials[0].numel() for partials in calls)  # what is sent again in bf16 counts once
    assert [virtual.traffic.values, *(rank["values"] for rank in real)] == [sent] * 3


def test_per_token_scales_drift_when_values_are_far_from_all_that_was_calibrated(two_ranks):
    """Five times as large is what they follow; a hundred times is beyond 16 standard deviations."""
    plan = synthetic_plan(partial_sums(0, 400), CommConfig())
    for factor, checks, lines in ((1, len(SCHEDULE), 0), (20, 1, 1)):
        calls = [torch.stack([partials[0], factor * partials[1]]) for partials in stream(0)]
        ranks = two_ranks.run(rank_cases.drifting, plan, calls, "two_shot", 0.5)
        assert [rank["checks"] for rank in ranks] == [checks, checks]
        assert [len(rank["logged"]) for rank in ranks] == [lines, 0]


def test_what_cannot_drift_checks_nothing(two_ranks):
    plan = synthetic_plan(partial_sums(0, 400), CommConfig(preset="paper", bf16_fraction=1.0))
    for mode in MODES[:2]:
        for rank in two_ranks.run(rank_cases.drifting, plan, stream(0), mode, 0.0):
            assert rank["checks"] == 0 and rank["logged"] == []


def test_without_a_threshold_a_rank_warns_once(two_ranks):
    """It exchanges nothing for that, and goes on in low bits."""
    plan = synthetic_plan(partial_sums(0, 400), CommConfig(preset="paper", bf16_fraction=0.0))
    for mode in MODES[:2]:
        ranks = two_ranks.run(rank_cases.drifting, plan, stream(0), mode, None)
        assert [rank["checks"] for rank in ranks] == [0, 0]
        assert {len(rank["logged"]) for rank in ranks} <= {0, 1}
        (line,) = ranks[0]["logged"] or ranks[1]["logged"]
        assert line.startswith("model.layers.0: ") and "results suffer" in line


@pytest.mark.parametrize("mode", MODES)
def test_a_reduce_scatter_falls_back_too(two_ranks, mode):
    calls = [partials.repeat(1, 2, 1) for partials in stream(0)[:3]]
    for rank, result in enumerate(two_ranks.run(rank_cases.drifting, PLAN, calls, mode, 0.05, True)):
        for partials, y in zip(calls, result["sums"], strict=True):
            assert torch.equal(y, VirtualReducer(None, "bf16").all_reduce(list(partials)).chunk(2)[rank])
        assert result["checks"] == 1


def test_an_all_gather_falls_back_too(two_ranks):
    x = partial_sums(1, 8)[0]
    for factor, falls_back in ((1, False), (20, True)):
        for rank in two_ranks.run(sequence_parallel_cases.guarded_gathers, PLAN.second, factor * x):
            assert rank["bf16"] == falls_back and rank["checks"] == (1 if falls_back else 2)
            exact = torch.equal(rank["y"], (factor * x).bfloat16().float())
            assert exact == falls_back, "the call that is checked is sent in bf16 already"


def test_evaluate_counts_saturated_values(tmp_path):
    use = [
        "model=embedded",
        "virtual_tp=2",
        "comm.mode=one_shot",
        "comm.preset=paper",
        *EVALUATION,
        "calibration.samples=4",
    ]
    code = run_here("evaluate", *use, f"calibration.data={CALIBRATION_TEXT}", f"output_dir={tmp_path}")
    assert code == 0
    row = json.loads((tmp_path / "evaluate.json").read_text())["rows"][-1]
    assert isinstance(row["saturated"], int) and row["saturated"] > 0


def narrowed(plan: CommPlan, by: float) -> CommPlan:
    """The plan with all ranges so many times too small."""

    def of(site: SitePlan) -> SitePlan:
        codecs = [
            None if codec is None else replace(codec, scale=codec.scale / by) for codec in (site.first, site.second)
        ]
        assert codecs[0] is not None
        return replace(site, first=codecs[0], second=codecs[1], half_range=site.half_range / by)

    return replace(plan, sites={name: of(site) for name, site in plan.sites.items()})


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """An artifact of the embedded model with static ranges for two ranks."""
    folder = tmp_path_factory.mktemp("plan")
    use = ["model=embedded", "comm.preset=paper", "comm.tp_sizes=[2]", *CALIBRATION, f"output_dir={folder}"]
    assert run_here("calibrate", *use) == 0
    return folder


@pytest.mark.parametrize("mode", slow_but(["one_shot"], MODES))
def test_a_plan_eight_times_too_small_is_met_at_the_first_call(calibrated, tmp_path, mode, capfd):
    """evaluate makes fewer than 64 calls: it is as good as in bf16, and says why."""
    narrowed(CommPlan.load(calibrated, 2), 8).save(tmp_path)
    use = [f"artifact={tmp_path}", "model=embedded", "virtual_tp=2", *EVALUATION]
    rows = {}
    for name, options in {
        "guarded": [f"comm.mode={mode}"],
        "unguarded": [f"comm.mode={mode}", "comm.drift_threshold=none"],
        "bf16": ["comm.mode=bf16"],
    }.items():
        assert run_here("evaluate", *use, *options, f"output_dir={tmp_path / name}") == 0
        rows[name] = json.loads((tmp_path / name / "evaluate.json").read_text())["rows"][-1]
        said = capfd.readouterr().out
        assert ("fell back to bf16: model.layers.0." in said) == (name == "guarded")
    guarded, unguarded = rows["guarded"], rows["unguarded"]
    assert guarded["perplexity"] == pytest.approx(rows["bf16"]["perplexity"], rel=2e-3), "some sites stay in low bits"
    assert unguarded["perplexity"] > 1.5 * guarded["perplexity"], "the plan does harm"
    assert guarded["bf16_sites"] and not unguarded["bf16_sites"]
    assert unguarded["saturated_share"] > 0.1 and rows["bf16"]["saturated_share"] is None
    shares = unguarded["saturated_sites"]  # all sites encode as many values
    assert shares.keys() == unguarded["sites"].keys() and rows["bf16"]["saturated_sites"] == {}
    assert sum(shares.values()) / len(shares) == pytest.approx(unguarded["saturated_share"])
    metrics = [json.loads(line) for line in (tmp_path / "guarded" / "metrics.jsonl").read_text().splitlines()]
    assert [m["bf16_sites"] for m in metrics if "bf16_sites" in m] == [len(guarded["bf16_sites"])]


def test_generate_with_a_plan_eight_times_too_small(calibrated, tmp_path, capfd):
    narrowed(CommPlan.load(calibrated, 2), 8).save(tmp_path)
    use = [f"artifact={tmp_path}", "model=embedded", "virtual_tp=2", "prompt=Once upon a time", "max_new_tokens=20"]
    texts = {}
    for mode in ("bf16", "one_shot"):
        assert run_here("generate", *use, f"comm.mode={mode}", f"output_dir={tmp_path / mode}") == 0
        texts[mode] = json.loads((tmp_path / mode / "generate.json").read_text())["rows"][0]["text"]
        said = capfd.readouterr()
        assert ("fell back to bf16" in said.err) == (mode == "one_shot") and "fell back" not in said.out
    assert texts["one_shot"] == texts["bf16"]


def test_apply_warns_and_guards_where_it_is_told_to(caplog):
    model, artifact = build("llama"), make_artifact(build("llama"), "none", (2,))
    unguarded = CommConfig(mode="one_shot", drift_threshold=None)
    for given, threshold in ((None, None), ("one_shot", None), (CommConfig(), 0.1), (unguarded, None)):
        apply_to_huggingface(model, artifact, 2, given)
        modules = row_parallel_modules(model)
        assert modules and all(module.reducer.guard.threshold == threshold for module in modules.values())
        assert all(module.reducer.guard.site == name for name, module in modules.items())
    narrow = replace(artifact, plans={2: narrowed(artifact.plan(2), 1e6)})
    for given in (CommConfig(), None):
        caplog.clear()
        apply_to_huggingface(model, narrow, 2, given)
        with caplog.at_level(logging.WARNING, "megatron_lowbit"):
            for _ in range(2):
                logits(model)
        told = [record.getMessage().partition(":")[0] for record in caplog.records]
        found = lowbit.saturation(model)
        assert sorted(told) == sorted(modules) == sorted(found), "one warning for each site"
        assert all(site.saturated > 0.1 * site.values > 0 for site in found.values())
        assert all(site.bf16 == (given is not None) for site in found.values())
