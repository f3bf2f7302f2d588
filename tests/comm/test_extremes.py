"""Partial sums of 333,824 (seen in the field; float16 ends at 65,504), NaN and Inf in every mode and dtype."""

from __future__ import annotations

import pytest
import rank_cases
import torch
from torch import Tensor

from megatron_lowbit.comm.build_plan import synthetic_plan
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, CommMode

HUGE, NAN, INF, MINUS_INF, TWICE = range(5)  # the tokens; the others are plain
STOCK: tuple[CommMode, ...] = ("native", "bf16")
LOW_BIT: tuple[CommMode, ...] = ("one_shot", "two_shot", "exact_sum", "auto")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COSTS = CostTable(2, 64, {"one_shot": ((64, 0.5),), "bf16": ((64, 1.0),)})  # so that auto is one_shot


def partial_sums(dtype: torch.dtype) -> Tensor:
    """[2, 9, 64]; in float16 a partial sum of 333,824 is Inf before anything is sent."""
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    x[1, HUGE, 5] = 333_824
    x[0, NAN, 6], x[1, INF, 7], x[1, MINUS_INF, 8] = torch.nan, torch.inf, -torch.inf
    x[:, TWICE, 9] = 40_000  # each fits float16, their sum does not
    return x.to(dtype)


@pytest.mark.parametrize(
    "config", [CommConfig(preset="paper"), CommConfig(preset="paper", bf16_fraction=0), CommConfig()]
)
def test_never_a_finite_value_for_what_is_not_and_never_a_wrong_one_uncounted(two_ranks, config):
    generator = torch.Generator().manual_seed(1)
    plan = synthetic_plan(torch.randn(2, 400, 64, generator=generator), config)
    cases = [(mode, partial_sums(dtype)) for mode in (*STOCK, *LOW_BIT) for dtype in DTYPES]
    ranks = two_ranks.run(rank_cases.extremes, plan, cases, COSTS)
    for (mode, partials), (y, counts), (other, _) in zip(cases, *ranks, strict=True):
        case, dtype = (mode, partials.dtype), partials.dtype
        virtual = VirtualReducer(plan, mode, costs=COSTS)
        again = virtual.all_reduce(list(partials))
        for twin in (other, again):
            assert torch.equal(y.nan_to_num(7.0), twin.nan_to_num(7.0)) and torch.equal(y.isnan(), twin.isnan()), case
        assert y.dtype == dtype and y[5:].isfinite().all(), case
        exact = partials.double().sum(0)
        if mode in STOCK:
            assert torch.equal(y.isnan(), exact.isnan()) and not y[INF, 7].isfinite(), case
            assert y[TWICE, 9].isinf() == (dtype == torch.float16), case
            assert counts.values == 0, case
            continue
        broken = ~exact.isfinite().all(1)
        assert y[broken].isnan().all() and not y[~broken].isnan().any(), case
        total = virtual.saturation()
        assert total.nonfinite >= broken.sum() == 3 + (dtype == torch.float16), case
        far = ~((y - exact)[~broken].abs() <= 0.5 * exact[~broken].abs() + 2)
        if plan.first.per_token and mode != "exact_sum":
            # A token's step follows its largest value: its other values are lost in that step, and it alone is counted.
            assert far.any(1).sum() <= total.saturated - total.nonfinite > 0, (case, far.sum(), total)
            largest = partials.double().abs().amax((0, 2))[~broken]
            assert ((y - exact)[~broken].abs().amax(1) <= 0.25 * largest + 2)[
                exact[~broken].abs().amax(1) < 65504
            ].all()
        else:
            assert far.sum() <= total.saturated, (case, far.sum(), total)
        if dtype == torch.float16:
            assert y[TWICE, 9].isinf() or total.saturated >= 2, case
