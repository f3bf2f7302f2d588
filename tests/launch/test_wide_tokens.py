"""evaluate --token-ablation: tokens in two formats, at the bits of one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from commands import CALIBRATION, EVALUATION, run_here
from tiny_models import two_blocks

from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig
from megatron_lowbit.launch.studies.wide_tokens import VARIANTS, WideTokens, default_bits

COMMAND = ["evaluate", "--token-ablation", f"model={two_blocks()}", *CALIBRATION, *EVALUATION]
FEATURES = 128  # of the embedded model
TOKENS = 40


@pytest.fixture(scope="module")
def partials():
    """Return the partial sums of two ranks: every eighth token is eight times as large as the others."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.ones(TOKENS).index_fill(0, torch.arange(3, TOKENS, 8), 8.0)
    return [torch.randn(TOKENS, FEATURES, generator=generator) * sizes[:, None] for _ in range(2)]


@pytest.fixture(scope="module")
def plan(partials):
    return synthetic_plan(torch.stack(partials), CommConfig(mode="one_shot"))


def bf16(senders: int = 2) -> Codec:
    ones = torch.ones(senders, FEATURES)
    return Codec(ones, torch.zeros_like(ones), torch.full((FEATURES,), 16, dtype=torch.uint8))


@pytest.fixture(scope="module", params=["none", "W4A8"])
def rows(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    assert run_here(*COMMAND, "virtual_tp=2", f"weights.scheme={request.param}", f"output_dir={folder}") == 0
    return {row["name"]: row for row in json.loads((folder / "evaluate.json").read_text())["rows"]}


def test_rows(rows):
    assert list(rows) == ["full sums", "default", "0.0625 more bits", *VARIANTS]
    default = rows["default"]
    assert (default["kl_over_default"], default["kl_over_default_stderr"]) == pytest.approx((1, 0))
    for name in list(rows)[1:]:
        row = rows[name]
        assert math.isfinite(row["perplexity"]) and row["kl"] > 0 and row["kl_stderr"] > 0
        # The windows are of one length, so the ratio of sums is that of means.
        assert row["kl_over_default"] == pytest.approx(row["kl"] / default["kl"])
    assert rows["1/16 by error bf16"]["kl_over_default"] > 1.2, "half a bit of every other token is worth more"


def test_all_rows_have_the_same_bits(rows):
    usual = default_bits(FEATURES)
    assert usual == 4 + 12 * 2 / FEATURES
    for name in ("default", *VARIANTS):
        # A tier of every site gives up to 7 codes, of a bit or two, to whole words; 12 sites share what that leaves.
        assert usual - 0.02 < rows[name]["bits_per_value"] <= usual, name
    assert rows["0.0625 more bits"]["bits_per_value"] == pytest.approx(usual + 0.0625, abs=0.02)


@pytest.mark.parametrize("by", ["size", "error", "relative error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_widened_token_is_todays_message(by, dtype, partials, plan):
    own = [x.to(dtype).view(2, TOKENS // 2, FEATURES) for x in partials]
    today, reducer = VirtualReducer(plan, "one_shot"), WideTokens(plan.first, bf16(), 0.0, by)
    total = reducer.all_reduce(own)
    assert total.dtype == dtype and torch.equal(total, today.all_reduce(own))
    assert reducer.traffic == today.traffic


def test_all_widened_is_the_wide_format(partials, plan):
    reducer = WideTokens(plan.first, bf16(), 1.0, "size")
    rounded = [x.bfloat16().float() for x in partials]
    assert torch.equal(reducer.all_reduce(partials), rounded[0] + rounded[1])
    assert reducer.traffic.bytes == TOKENS * 2 * FEATURES + TOKENS // 8


@pytest.mark.parametrize("by", ["size", "error", "relative error"])
def test_each_rank_widens_its_worst_tokens(by, partials, plan):
    reducer = WideTokens(plan.first, bf16(), 1 / 8, by)
    for rank, x in enumerate(partials):
        exact = x.double()
        error = (WideTokens(plan.first, bf16(), 0.0, by).sent(x, rank).double() - exact).square().sum(1)
        size = exact.square().mean(1)  # s_t goes by the largest values, but not by a factor of eight
        score = {"size": size, "error": error, "relative error": error / size}[by]
        worst = torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, score.topk(TOKENS // 8).indices, True)
        assert torch.equal((reducer.sent(x, rank) == x.bfloat16()).all(1), worst)


def test_bytes_of_a_choice(partials, plan):
    wide = replace(plan.first, bits=torch.full((FEATURES,), 8, dtype=torch.uint8))
    reducer = WideTokens(plan.first, wide, 1 / 8, "relative error")
    reducer.all_reduce(partials)
    narrow_row = round(plan.first.bits_per_value() * FEATURES / 8)
    assert reducer.traffic.bytes == 35 * narrow_row + 5 * (1 + FEATURES) + 5, "5 of 40 in 8 bits, a bit for each"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "virtual_tp"),
        (["virtual_tp=2", "comm.bits=3"], "comm.*"),
        (["virtual_tp=2", "artifact=somewhere"], "artifact"),
        (["virtual_tp=2", "evaluation.kl_tokens=0"], "kl_tokens"),
        (["virtual_tp=2", "--comm-ablation"], "two tables"),
        (["virtual_tp=2", "correction.rank=2"], "correction.*"),
    ],
)
def test_refused(more, said, tmp_path, capsys):
    assert run_here(*COMMAND, *more, f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-lowbit: ") and said in line
