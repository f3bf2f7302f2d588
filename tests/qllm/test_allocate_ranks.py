"""Ranks out of one budget: the spectra against float64 SVDs, the allocation against brute force, on 1 to 4 ranks."""

from __future__ import annotations

import itertools

import pytest
import rank_allocation_cases as cases
import torch
from torch import Tensor

from megatron_lowbit.config import CorrectionConfig, LowBitError
from megatron_lowbit.qllm.allocate_ranks import allocate_ranks
from megatron_lowbit.quant.affine import fake_quantize


@pytest.fixture(params=(1, 2, 4))
def run(request):
    """run(case, ...) on that many ranks: a list of their results."""
    if request.param == 1:
        return lambda case, *args: [case(0, 1, *args)]
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks").run


def expected_spectra() -> dict[str, Tensor]:
    """Squared singular values of E X^T, for X of all real tokens as the linears read it, times the mean square of
    J^T v per output, J written down by hand: d (o(q k)) = o(dq k) + o(q dk)."""
    weights = cases.weights()
    rounded = {name: fake_quantize(weight, 4) for name, weight in weights.items()}
    hidden, mask = cases.hidden_states()
    x = fake_quantize(hidden[mask], 4)
    q, k = (x @ rounded[name].T for name in ("q", "k"))
    inner = torch.cat([fake_quantize(part, 4) for part in (q * k).chunk(cases.SHARDS, 1)], 1)
    signs = []
    for window in range(cases.WINDOWS):
        generator = torch.Generator().manual_seed(window)
        signs.append(torch.randint(0, 2, (1, cases.LENGTH, cases.HIDDEN), generator=generator) * 2.0 - 1)
    v = torch.cat(signs)[mask].double()
    at_inner = v @ rounded["o"].double()
    grads = {"q": at_inner * k.double(), "k": at_inner * q.double(), "o": v}
    found = {}
    for name, read in (("q", x), ("k", x), ("o", inner)):
        error = (weights[name] - rounded[name]).double()
        singular = torch.linalg.svdvals(error @ read.double().T).square()
        found[name] = singular[: cases.HIDDEN] * grads[name].square().mean()
    return found


@pytest.mark.parametrize("parallel", ("tp", "dp"))
def test_spectra_and_ranks_on_ranks(run, parallel):
    expected = expected_spectra()
    alone = cases.chosen(0, 1, "tp", 2)
    assert sorted(alone["ranks"]) == ["k", "o", "q"] and len(set(alone["ranks"].values())) > 1
    for result in run(cases.chosen, parallel, 2):
        assert result["ranks"] == alone["ranks"]
        for name, spectrum in result["spectra"].items():
            # e = E x is a float32 sum of up to 32 terms: 2^-19 of the largest; float64 everywhere else.
            assert torch.allclose(spectrum, expected[name], rtol=1e-5, atol=2.0**-19 * expected[name][0].item()), name
            assert torch.allclose(spectrum, alone["spectra"][name], rtol=1e-9, atol=1e-12)
    taken = allocate_ranks(expected, {"q": (16, 32), "k": (16, 32), "o": (32, 16)}, 2)
    assert taken == alone["ranks"]


def test_an_input_that_is_not_finite(monkeypatch):
    hidden, mask = cases.hidden_states()
    hidden[2, 3, 4] = float("nan")
    monkeypatch.setattr(cases, "hidden_states", lambda: (hidden, mask))
    with pytest.raises(LowBitError, match="q is given NaN or Inf"):
        cases.chosen(0, 1, "tp", 2)


def taken_away(ranks: dict[str, int], spectra: dict[str, Tensor]) -> float:
    return sum(spectra[name][:rank].sum().item() for name, rank in ranks.items())


def brute_force(spectra: dict[str, Tensor], sizes: dict[str, tuple[int, int]], budget: int) -> float:
    """The most that any ranks within the budget take away."""
    names, total = list(sizes), budget * sum(map(sum, sizes.values()))
    best = 0.0
    for each in itertools.product(*(range(min(sizes[name]) + 1) for name in names)):
        ranks = dict(zip(names, each, strict=True))
        if sum(rank * sum(sizes[name]) for name, rank in ranks.items()) <= total:
            best = max(best, taken_away(ranks, spectra))
    return best


def spectra_of(sizes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(8, generator=generator, dtype=torch.float64).mul(4).exp().sort(descending=True).values
        for name in sizes
    }


@pytest.mark.parametrize("seed", range(8))
def test_with_equal_costs_no_allocation_takes_away_more(seed):
    sizes = {"a": (3, 6), "b": (6, 3), "c": (5, 4), "d": (4, 5)}  # 9 parameters each, ranks up to 3 or 4
    spectra = spectra_of(sizes, seed)
    for budget in (1, 2, 3, 4):
        ranks = allocate_ranks(spectra, sizes, budget)
        assert all(rank <= min(sizes[name]) for name, rank in ranks.items())
        # Sums of at most 14 float64 values, in another order.
        assert taken_away(ranks, spectra) == pytest.approx(brute_force(spectra, sizes, budget), rel=1e-14)


@pytest.mark.parametrize("seed", range(8))
def test_with_other_costs_it_is_short_by_less_than_one_rank(seed):
    """Dantzig's bound: by gain per parameter, less is lost than the first rank for which there was no room gives."""
    sizes = {"a": (3, 6), "b": (4, 4), "c": (5, 12), "d": (4, 5)}
    spectra = spectra_of(sizes, seed)
    for budget in (1, 2, 3):
        ranks = allocate_ranks(spectra, sizes, budget)
        left = budget * sum(map(sum, sizes.values())) - sum(rank * sum(sizes[name]) for name, rank in ranks.items())
        open_ = [name for name, rank in ranks.items() if rank < min(sizes[name])]
        assert left >= 0 and all(sum(sizes[name]) > left for name in open_), "room for one more"
        best, found = brute_force(spectra, sizes, budget), taken_away(ranks, spectra)
        largest = max((spectra[name][ranks[name]].item() for name in open_), default=0.0)
        assert best * (1 - 1e-14) - largest <= found <= best * (1 + 1e-14)


def test_what_has_no_error_gets_no_rank():
    sizes = {"exact": (4, 4), "rounded": (4, 4), "not rounded": (4, 4)}
    spectra = {"exact": torch.zeros(4).double(), "rounded": torch.tensor([3.0, 2.0, 0.0, 0.0]).double()}
    assert allocate_ranks(spectra, sizes, 4) == {"exact": 0, "rounded": 2, "not rounded": 0}


def test_equal_gains_go_to_the_first():
    sizes = {"b": (4, 4), "a": (4, 4)}
    spectra = dict.fromkeys(sizes, torch.ones(4).double())
    assert allocate_ranks(spectra, {**sizes, "c": (1, 3)}, 1) == {"b": 2, "a": 0, "c": 0}


@pytest.mark.parametrize("value", (0, -1, True, 1.5, "auto4"))
def test_a_rank_that_is_none(value):
    with pytest.raises(ValueError, match="rank"):
        CorrectionConfig.model_validate({"rank": value})
