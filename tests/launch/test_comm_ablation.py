"""evaluate --comm-ablation: its rows, and what arithmetic says of them; the peers' scheme in one process."""

from __future__ import annotations

import json
import math

import pytest
import rank_cases
import tiny_models
import torch
from commands import CALIBRATION, EVALUATION, run_here
from tiny_models import two_blocks
from torch import nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.config import CommConfig, EvaluateConfig
from megatron_lowbit.launch.bench.peers import VirtualGroupInt4
from megatron_lowbit.launch.studies.comm_ablation import VARIANTS
from megatron_lowbit.launch.studies.synthetic import ScaledSite, measure_reducers, scaled_sites

NAMES = ["full precision", "bf16", "paper", "paper clipped", "paper without bf16", "static adaptive"]
NAMES += ["per-token uniform", "per-token adaptive", *(f"per-token adaptive two_shot {bits}" for bits in (4, 5, 6, 8))]
NAMES += ["exact_sum 8", "exact_sum 16", "group-32", "group-32 two hops"]
TESTED = ("paper", "per-token adaptive", "group-32", "group-32 two hops")
BEDS = ("first token x100", "1% of features x50")
SYNTHETIC = [f"synthetic, {bed}: {name}" for bed in BEDS for name in TESTED]
COMMAND = ["evaluate", "--comm-ablation", f"model={two_blocks()}", *CALIBRATION, *EVALUATION]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comm")
    assert run_here(*COMMAND, "virtual_tp=2", f"output_dir={folder}") == 0
    return {row["name"]: row for row in json.loads((folder / "evaluate.json").read_text())["rows"]}


def test_rows(rows):
    assert list(rows) == NAMES + SYNTHETIC
    full = rows["full precision"]
    assert (full["kl"], full["perplexity_change_percent"], full["sqnr_db"], full["worst_site"]) == (0, 0, None, None)
    for name in NAMES[1:]:
        row = rows[name]
        assert row["kl"] > 0 and math.isfinite(row["perplexity"])
        change = 100 * (row["perplexity"] - full["perplexity"]) / full["perplexity"]
        assert row["perplexity_change_percent"] == pytest.approx(change, abs=1e-9)
    for name in NAMES[1:] + SYNTHETIC:
        row = rows[name]
        assert row["worst_sqnr_db"] == row["sites"][row["worst_site"]] == min(row["sites"].values())
        assert row["sqnr_db"] == pytest.approx(sum(row["sites"].values()) / len(row["sites"]))
    assert all(rows[name]["perplexity"] is rows[name]["kl"] is None for name in SYNTHETIC)


def test_bits_are_of_all_hops(rows):
    features = 128  # of the embedded model
    expected = {
        "bf16": 16,
        "paper": 4 + 12 * 2 / features,  # floor(128 / 64) features in bf16
        "paper clipped": 4 + 12 * 2 / features,
        "paper without bf16": 4 + 8 / features,  # one byte tells whether a token is finite
        "per-token uniform": 4 + 12 * 2 / features + 8 / features,
        "exact_sum 8": 8 * (features + 1) / features,
        "exact_sum 16": 16 * (features + 2) / features,
        "group-32": 4.5,
        "group-32 two hops": 4.5 * 1.5,  # in the second, each of two ranks sends half
    }
    assert {name: rows[name]["bits_per_value"] for name in expected} == pytest.approx(expected)
    back = [rows[f"per-token adaptive two_shot {bits}"]["bits_per_value"] for bits in (4, 5, 6, 8)]
    assert back == sorted(back) and back[0] > rows["per-token adaptive"]["bits_per_value"]


def test_what_arithmetic_says(rows):
    sqnr = {name: row["sqnr_db"] for name, row in rows.items()}
    assert sqnr["bf16"] > 45, "eight significant bits"
    assert sqnr["bf16"] > max(sqnr[name] for name in NAMES[2:])
    assert sqnr["exact_sum 16"] > sqnr["exact_sum 8"]
    back = [sqnr[f"per-token adaptive two_shot {bits}"] for bits in (4, 5, 6, 8)]
    assert back == sorted(back) and back[-1] < sqnr["per-token adaptive"] + 0.1
    assert sqnr["group-32"] > sqnr["group-32 two hops"] + 1, "the sum is rounded again"
    for bed in BEDS:
        paper = rows[f"synthetic, {bed}: paper"]
        assert paper["unscaled_sqnr_db"] < paper["sqnr_db"], "steps as wide as an outlier's serve the outlier"
    # A group's scale knows of no other token, where a static range has to hold them all.
    unscaled = {name: rows[f"synthetic, {BEDS[0]}: {name}"]["unscaled_sqnr_db"] for name in TESTED}
    assert unscaled["group-32"] > unscaled["paper"] + 10
    assert abs(unscaled["group-32"] - sqnr["group-32"]) < 1


@pytest.mark.parametrize("shape", [(6, 64), (1, 5), (3, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_in_one_process_are_those_of_real_ranks(shape, dtype, two_ranks):
    generator = torch.Generator().manual_seed(3)
    partials = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    virtual = VirtualGroupInt4(hops=2)
    total = virtual.all_reduce(partials)
    assert total.dtype == dtype and total.shape == partials[0].shape
    for real in two_ranks.run(rank_cases.dynamic_groups, partials):
        assert torch.equal(real["sum"], total) and real["bytes"] == virtual.traffic.bytes


def test_one_hop_of_groups_rounds_once():
    x = torch.arange(-16, 16).float()[None] % 8  # codes 0 .. 7 of step 1: nothing is lost
    reducer = VirtualGroupInt4(hops=1)
    assert torch.equal(reducer.all_reduce([x, 2 * x, -x]), 2 * x)
    assert reducer.traffic.bytes == 18 and reducer.traffic.values == 32


def test_a_scaled_site_shows_scaled_partial_sums():
    torch.manual_seed(0)
    linear = nn.Linear(6, 200, bias=False, dtype=torch.float64)
    sites = scaled_sites({"site": linear}, seed=0)
    assert list(sites) == list(BEDS)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    seen = {}
    for bed, by_site in sites.items():

        def keep(module, inputs, output, bed=bed):
            seen[bed] = output, module.unscaled(output)

        handle = by_site["site"].register_forward_hook(keep)
        y = linear(x)
        handle.remove()
        assert torch.equal(y, linear(x)), "the model itself runs as it is"
    weight, exact = linear.weight.detach(), y.detach()
    first = exact.clone()
    first[:, 0] *= 100
    torch.testing.assert_close(seen[BEDS[0]][0].detach(), first)
    ratio = (sites[BEDS[1]]["site"].weight / weight)[:, 0]
    scaled = (ratio > 2).nonzero().flatten()
    assert len(scaled) == 2 and torch.allclose(ratio[scaled], ratio.new_tensor(50.0))
    usual, wide = exact.clone(), exact.clone()
    usual[..., scaled], wide[..., scaled] = 0, 50 * exact[..., scaled]
    torch.testing.assert_close(seen[BEDS[1]][0].detach(), wide)
    torch.testing.assert_close(seen[BEDS[1]][1].detach(), usual)
    first[:, 0] = 0
    torch.testing.assert_close(seen[BEDS[0]][1].detach(), first)


class Wrong:
    """A reducer whose sum is off by a known share: of every value, or of the first token's alone."""

    def __init__(self, share: float, first_only: bool):
        self.share, self.first_only = share, first_only

    def all_reduce(self, partials):
        exact = torch.stack(partials).double().sum(0)
        off = self.share * exact
        if self.first_only:
            off[:, 1:] = 0
        return exact + off


def test_known_errors_give_known_ratios():
    model = tiny_models.build("llama")
    linears = huggingface.row_parallel_sites(model)
    sites = {name: ScaledSite(linear, 100.0, torch.ones(64)) for name, linear in linears.items()}
    wrong = {"all": Wrong(0.01, False), "first": Wrong(0.1, True)}
    reducers = {name: dict.fromkeys(sites, reducer) for name, reducer in wrong.items()}
    measured = measure_reducers(model, sites, reducers, tiny_models.batches(), 2)
    for name in sites:
        assert measured["all"][name] == pytest.approx((40, 40))
        every, unscaled = measured["first"][name]
        assert every == pytest.approx(20, abs=0.1) and unscaled == 300


def test_no_variant_falls_back():
    assert all(isinstance(v, int) or v.mode == "bf16" or v.drift_threshold is None for v in VARIANTS.values())
    assert VARIANTS["per-token adaptive"] == CommConfig(mode="one_shot", drift_threshold=None), "the default scheme"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "virtual_tp"),
        (["virtual_tp=2", "weights.scheme=W4A4"], "weights.*"),
        (["virtual_tp=2", "comm.bits=3"], "comm.*"),
        (["virtual_tp=2", "artifact=somewhere"], "artifact"),
        (["virtual_tp=2", "--ablation"], "two tables"),
        (["virtual_tp=2", "correction.rank=2"], "correction.*"),
    ],
)
def test_refused(more, said, tmp_path, capsys):
    assert run_here(*COMMAND, *more, f"output_dir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-lowbit: ") and said in line


def test_off_by_default():
    assert not EvaluateConfig().comm_ablation
