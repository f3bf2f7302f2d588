"""A rank that ends, or differs, in the middle of a collective: every other rank ends with one line that says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import rank_cases
import torch
import warm
from fault_cases import CULPRIT
from slow_cases import slow
from torch import Tensor

from megatron_lowbit.comm.agreement import digest
from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.config import CommConfig

MODES = ["one_shot", "two_shot", "exact_sum", "bf16"]
LOW_BIT = MODES[:3]
SITE = "model.layers.0.mlp.down_proj: "


def outcomes(folder: Path, case: str, modes: list[str], size: int) -> list[dict[str, dict]]:
    """{mode: what came of it} of each rank that lived."""
    script = Path(__file__).parents[1] / "helpers" / "fault_cases.py"
    ranks = [
        subprocess.Popen(
            [warm.python(), str(script), case, ",".join(modes), str(folder), str(rank), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        lines = []
        for process in ranks:  # they end by themselves: after gloo's time-outs, and without loops
            assert process.stdout is not None
            lines.append(process.stdout.readline())
        for process in ranks:
            process.communicate("", timeout=300)
        dead = {rank: process.returncode for rank, process in enumerate(ranks) if process.returncode}
        assert dead == ({CULPRIT: -9} if case == "killed" else {}), "a process ended that was not told to"
        return [json.loads(line) for line in lines if line]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def all_fail(said: list[dict[str, dict]], *phrases: str) -> None:
    for rank, by_mode in enumerate(said):
        for mode, outcome in by_mode.items():
            message = outcome.get("error", f"{mode}: rank {rank} went on with a sum")
            assert message.startswith(SITE) and message.count("\n") == 0
            assert all(phrase in message for phrase in phrases), message


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_is_killed_inside(tmp_path, mode):
    said = outcomes(tmp_path, "killed", [mode], 3)
    assert len(said) == 2
    all_fail(said, "of 3: another rank has ended or hangs", "gloo")


@pytest.mark.parametrize("case", ["plan", "bits"])
def test_a_rank_has_another_plan(tmp_path, case):
    all_fail(outcomes(tmp_path, case, LOW_BIT, 3), "rank 1 has another mode, plan, width or dtype than rank 0")


def test_a_rank_has_another_mode(tmp_path):
    all_fail(outcomes(tmp_path, "mode", MODES, 2), "rank 1 has another mode, plan")


@pytest.mark.parametrize(("case", "tokens"), [("more", "33, 66"), ("fewer", "33, 1"), ("new", "8, 9")])
def test_a_rank_has_other_tokens(tmp_path, case, tokens):
    """At the first call, or at a later one where all have new numbers: all are told the numbers."""
    all_fail(outcomes(tmp_path, case, MODES, 2), f"ranks 0 .. 1 hold {tokens} tokens; give every rank the same batch")


@pytest.mark.parametrize(
    ("size", "modes"), [(2, MODES[:1]), slow(2, MODES[1:2]), slow(3, MODES[2:])]
)  # every mode takes a time-out
def test_one_rank_changes_its_tokens(tmp_path, size, modes):
    """The others do not compare, since theirs stay as they were: all wait in vain, until the first gives up."""
    all_fail(outcomes(tmp_path, "later", modes, size), "or the ranks disagree on tokens or plan", "gloo")


@pytest.mark.parametrize(
    "config", [CommConfig(preset="paper"), CommConfig(scale="per_token"), CommConfig(bf16_fraction=0.0)]
)
@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_every_rank(two_ranks, mode, config):
    partials = torch.randn(2, 5, 66, generator=torch.Generator().manual_seed(0))
    plan = synthetic_plan(partials, config)
    partials[1, 3, 7] = torch.nan
    ranks = two_ranks.run(rank_cases.all_reduce, plan, partials, "plain", mode)
    y: Tensor = ranks[0]["y"]
    assert all(torch.equal(rank["y"].isnan(), y.isnan()) for rank in ranks)
    assert y.isnan().any(1).tolist() == [False, False, False, True, False]


def test_agreeing_costs_nothing_while_the_tokens_stay(two_ranks):
    for rank in two_ranks.run(rank_cases.agreements, synthetic_plan(torch.randn(2, 9, 66), CommConfig(preset="paper"))):
        assert rank == {"first": 2, "same": 0, "other": 2, "width": 16}


def test_a_digest_knows_values_from_shapes():
    x = torch.arange(6.0)
    all_different = [[x], [x.view(2, 3)], [x.int()], [x + 1], [x, "one_shot"], ["one_shot", x], []]
    assert len({digest(parts) for parts in all_different}) == len(all_different)
    assert digest([x.clone()]) == digest([x]) and 0 <= digest([x]) < 2**63
