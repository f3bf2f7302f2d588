"""comm.mode=auto: what a cost table predicts and chooses, and that all ranks choose alike."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import rank_cases
import sequence_parallel_cases
import torch
from commands import COMMAND as LAUNCH
from commands import EVALUATION, SMALL_TEXT, needs_deepspeed, run_here, run_there

from megatron_lowbit.comm import autotune
from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, LowBitError

# exact_sum is the fastest up to 1 KiB, then bf16, and one_shot from about 4 KiB on.
TABLE = CostTable(
    2,
    64,
    {
        "bf16": ((2**10, 1e-4), (2**14, 1e-3)),
        "one_shot": ((2**10, 2e-4), (2**14, 5e-4)),
        "exact_sum": ((2**10, 9e-5), (2**14, 2e-3)),
    },
)
PLAN = synthetic_plan(torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)), CommConfig())


def test_seconds_between_and_beyond_the_measured_sizes():
    assert TABLE.seconds("bf16", 2**10) == 1e-4 and TABLE.seconds("bf16", 2**14) == 1e-3
    assert TABLE.seconds("bf16", 2**12) == pytest.approx(math.sqrt(1e-4 * 1e-3))
    assert TABLE.seconds("bf16", 2) == 1e-4, "latency"
    assert TABLE.seconds("bf16", 2**16) == pytest.approx(4e-3), "rate"


def test_choices():
    assert TABLE.choose(2**10) == "exact_sum" and TABLE.choose(2**14) == TABLE.choose(2**30) == "one_shot"
    assert TABLE.choose(2**10, ["one_shot", "two_shot"]) == "bf16"
    assert TABLE.choose(2**14, []) == "bf16"


@pytest.mark.parametrize(("seconds", "mode"), [(0.951, "bf16"), (0.949, "two_shot"), (1.0, "bf16"), (2.0, "bf16")])
def test_bf16_unless_another_mode_is_five_percent_faster(seconds, mode):
    assert CostTable(2, 64, {"bf16": ((64, 1.0),), "two_shot": ((64, seconds),)}).choose(64) == mode


def test_of_equals_the_first_is_taken_whatever_the_order():
    points = ((64, 0.5),)
    rows = {"exact_sum": points, "two_shot": points, "bf16": ((64, 1.0),)}
    assert CostTable(2, 64, rows).choose(64) == "two_shot"
    assert CostTable(2, 64, dict(reversed(rows.items()))).choose(64) == "two_shot"


def test_a_reduce_scatter_goes_by_the_costs_of_two_hops():
    """One-shot's cost does not halve as theirs do: where it alone is fast, a reduce-scatter stays in bf16."""
    rows = {"bf16": ((64, 1.0),), "one_shot": ((64, 0.5),), "two_shot": ((64, 2.0),)}
    reducer = VirtualReducer(PLAN, "auto", costs=CostTable(2, 64, rows))
    assert (reducer.choose(32).name, reducer.choose(32, scattered=True).name) == ("one_shot", "bf16")
    rows["two_shot"] = ((64, 0.8),)
    reducer = VirtualReducer(PLAN, "auto", costs=CostTable(2, 64, rows))
    assert (reducer.choose(32).name, reducer.choose(32, scattered=True).name) == ("one_shot", "two_shot")


def test_a_reduce_scatter_is_sent_as_it_is_chosen(two_ranks):
    costs = CostTable(2, 64, {"bf16": ((64, 1.0),), "one_shot": ((64, 0.5),), "two_shot": ((64, 2.0),)})
    partials = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    for whole, scattered in two_ranks.run(sequence_parallel_cases.scatter_by_costs, PLAN, partials, costs):
        assert (whole, scattered) == (4 * WireFormat(PLAN.first).row_bytes, 4 * 2 * 64), "one_shot's messages, and bf16"


def test_noise_speaks_for_bf16(monkeypatch):
    """bf16 counts with the second best of its five rounds, every other mode with the one in the middle."""
    monkeypatch.setattr(autotune, "HybridReducer", lambda plan, group, mode: mode)
    monkeypatch.setattr(autotune.dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(autotune.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(autotune, "slowest", lambda rounds, group: rounds)
    monkeypatch.setattr(autotune, "ROUNDS", (5, 5))
    rounds = {"bf16": [3.0, 1.0, 2.0, 5.0, 4.0], "one_shot": [5.0, 4.0, 1.0, 3.0, 2.0]}
    sent = []

    def one_round(reducers, number, inputs, group):
        sent.extend(inputs.values())
        return [rounds.get(mode, [9.0] * 5)[number] for mode in reducers]

    monkeypatch.setattr(autotune, "one_round", one_round)
    table = autotune.measure_costs(None, PLAN, [2**10])
    assert table.rows["bf16"] == ((2**10, 2.0),) and table.rows["one_shot"] == ((2**10, 3.0),)
    assert all(torch.equal(x, autotune.typical(PLAN.first, 8).bfloat16()) for x in sent)


def test_the_order_of_a_round_changes(monkeypatch):
    """Whoever comes next after one does not stay the same."""
    order: list[str] = []
    ways = {name: SimpleNamespace(all_reduce=lambda x, reuse, name=name: order.append(name)) for name in "abcd"}
    monkeypatch.setattr(autotune.dist, "barrier", lambda group: None)
    monkeypatch.setattr(autotune, "_wait", lambda x: None)
    for number in range(20):
        autotune.one_round(ways, number, dict.fromkeys(ways, torch.zeros(1)), None)
    rounds = [order[i : i + 4] for i in range(0, 80, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert {r[r.index("a") + 1] for r in rounds if r[-1] != "a"} == set("bcd")


@pytest.mark.parametrize("config", [CommConfig(), CommConfig(preset="paper")])
def test_tuning_sends_what_the_plan_is_made_for(config):
    """As wide as the calibrated values, whatever their feature's width is (here 1/8 to 8), and inside their ranges."""
    widths = torch.exp2(torch.linspace(-3, 3, 64))
    sample = torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(0)) * widths + 5 * widths
    plan = synthetic_plan(sample, config)
    values, format, coded = autotune.typical(plan.first, 4000), WireFormat(plan.first), plan.first.bits < 16
    ratio = (values.std(0) / sample[0].std(0))[coded]
    assert ratio.min() > 0.75 and ratio.max() < 1.5  # a static range: up to nine deviations
    format.pack(values, 0)
    assert format.tally[:, 1].sum() < 0.01 * values.numel()


def test_saved_and_loaded(tmp_path):
    TABLE.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == TABLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*costs"),
        ("[1]", "cannot read .*costs"),
        ('{"tp_size": 2, "features": 64}', "no cost table .KeyError: 'rows'.; write one with benchmark collectives"),
        ('{"tp_size": 2, "features": 64, "rows": {"bf16": [64]}}', "no cost table"),
        ('{"tp_size": 2, "features": 64, "rows": {"one_shot": [[64, 1]]}}', "has no bf16"),
        ('{"tp_size": 2, "features": 64, "rows": {"bf16": [[64, 1]], "ring": [[64, 1]]}}', "has the mode 'ring'"),
        ('{"tp_size": 2, "features": 64, "rows": {"bf16": [[64, 1], [32, 1]]}}', "needs ascending sizes"),
        ('{"tp_size": 2, "features": 64, "rows": {"bf16": [[64, 0]]}}', "with times above 0"),
        ('{"tp_size": 2, "features": 64, "rows": {"bf16": []}}', "with times above 0"),
    ],
)
def test_files_that_hold_no_table(tmp_path, text, message):
    if text is not None:
        (tmp_path / "costs.json").write_text(text)
    with pytest.raises(LowBitError, match=message) as caught:
        CostTable.load(tmp_path / "costs.json")
    assert "costs" in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_is_for_one_number_of_ranks():
    with pytest.raises(LowBitError, match="the cost table is for tp_size 4, there are 2 ranks"):
        VirtualReducer(PLAN, "auto", costs=CostTable(4, 64, TABLE.rows))
    with pytest.raises(LowBitError, match=r"comm\.mode=auto needs comm\.cost_table here"):
        VirtualReducer(PLAN, "auto")


@pytest.mark.parametrize(("tokens", "mode"), [(8, "exact_sum"), (16, "bf16"), (256, "one_shot")])
def test_auto_is_the_mode_it_chooses(two_ranks, tokens, mode):
    partials = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    expected = VirtualReducer(PLAN, mode).all_reduce(list(partials))
    assert VirtualReducer(PLAN, "auto", costs=TABLE).choose(64 * tokens).name == mode
    assert torch.equal(VirtualReducer(PLAN, "auto", costs=TABLE).all_reduce(list(partials)), expected)
    for rank in two_ranks.run(rank_cases.all_reduce, PLAN, partials, "plain", "auto", TABLE):
        assert torch.equal(rank["y"], expected)


def test_ranks_measure_the_same_table(two_ranks):
    tables = two_ranks.run(rank_cases.measured_costs, PLAN, [2**10, 100, 2**14])
    assert tables[0] == tables[1], "another table is another choice"
    assert (tables[0].tp_size, tables[0].features) == (2, 64)
    assert list(tables[0].rows) == ["bf16", "one_shot", "two_shot", "exact_sum"]
    for points in tables[0].rows.values():
        assert [size for size, _ in points] == [128, 2**10, 2**14], "whole tokens, at least one, ascending"


AUTO = ["model=embedded", "comm.mode=auto", *SMALL_TEXT, "dtype=float32"]


@needs_deepspeed
def test_evaluate_measures_on_its_ranks(tmp_path):
    code, _, stderr = run_there(*LAUNCH, "evaluate", *AUTO, "engine=deepspeed", "tp=2", f"output_dir={tmp_path}")
    assert code == 0, stderr
    full, auto = json.loads((tmp_path / "evaluate.json").read_text())["rows"]
    assert auto["name"] == "full precision + auto per-token tiered int4"
    assert 4 < auto["bits_per_value"] <= 16 and auto["perplexity"] < 1.1 * full["perplexity"]


def test_evaluate_with_a_table_on_virtual_ranks(tmp_path, capsys):
    TABLE.save(tmp_path / "costs.json")
    use = ["evaluate", *AUTO, "virtual_tp=2", f"output_dir={tmp_path}"]
    assert run_here(*use, f"comm.cost_table={tmp_path / 'costs.json'}") == 0
    row = json.loads((tmp_path / "evaluate.json").read_text())["rows"][-1]
    assert row["bits_per_value"] == pytest.approx(4 + 12 / 64, abs=0.1), "one_shot, at these sizes"
    capsys.readouterr()
    assert run_here(*use) == 2
    assert "comm.mode=auto needs comm.cost_table here" in capsys.readouterr().err
    assert run_here("evaluate", *EVALUATION, "model=embedded", "comm.cost_table=costs.json") == 2
    assert "cost_table needs mode=auto" in capsys.readouterr().err
