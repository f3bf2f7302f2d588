"""Channel reassembly as data against dense matrices S and R in float64 (QLLM, arXiv 2310.08041, eqs. 3 and 4)."""

import oracles
import pytest
import torch

from megatron_lowbit.layers.reassembled_norm import Reassembly
from megatron_lowbit.qllm.reassembly import build_plan, merge_error, num_splits
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

WIDTHS = (5, 8, 33, 64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier_max(features: int, outliers: int = 2) -> torch.Tensor:
    """max|x| per channel: 1 for all but the first odd ones, which make T = 3, 4, ... at a threshold of 1."""
    max_abs = torch.ones(features)
    for number in range(outliers):
        max_abs[2 * number + 1] = 2.5 + number
    return max_abs


def split_only(features: int) -> ReassemblyPlan:
    plan = build_plan(outlier_max(features, 1 if features < 8 else 2), 1.0, None)
    assert plan is not None
    return plan


def split_and_merged(features: int, seed: int = 0, outliers: int | None = None) -> ReassemblyPlan:
    """A plan that splits one or two channels and pays for them with merges chosen by a random distance."""
    outliers = (1 if features < 11 else 2) if outliers is None else outliers  # 5 added need 5 in set A
    half = normal(features, 50, seed=seed).double()
    plan = build_plan(outlier_max(features, outliers), 1.0, merge_error(half @ half.T, half @ half.T))
    assert plan is not None
    return plan


def two_into_one() -> ReassemblyPlan:
    """Channel 0 split in two, 1 and 3 both merged into 2, which is a group of three, 4 stays."""
    distance = torch.full((5, 5), 9.0, dtype=torch.float64)
    max_abs = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0])
    distance[1, 2] = distance[3, 2] = 1.0
    # Of the unsplit channels 1, 2, 3, 4 set A is 1, 3 and set B is 2, 4: both of A are nearest to 2.
    plan = build_plan(max_abs, 1.0, distance)
    assert plan is not None
    return plan


def dense(plan: ReassemblyPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """S [in, width] and R [width, in] in float64, written entry by entry.

    The coefficients are taken as the fractions they stand for: 1 over the whole number nearest to their inverse.
    """
    s = torch.zeros(plan.in_features, plan.width, dtype=torch.float64)
    r = torch.zeros(plan.width, plan.in_features, dtype=torch.float64)
    for src, dst, coefficient in zip(plan.src_idx, plan.dst_idx, plan.coefficient, strict=True):
        s[src, dst] += 1 / round(1 / coefficient.item())
        r[dst, src] += 1
    return s, r


PLANS = {f"split {width}": lambda width=width: split_only(width) for width in WIDTHS}
PLANS |= {f"split and merged {width}": lambda width=width: split_and_merged(width) for width in WIDTHS}
PLANS |= {"identity 7": lambda: ReassemblyPlan.identity(7), "two into one": two_into_one}


@pytest.mark.parametrize("name", PLANS)
def test_plan_is_its_dense_matrices(name):
    """x S and R W of the plan against matrix products; a float32 coefficient is within EPS32 of its fraction."""
    plan = PLANS[name]()
    s, r = dense(plan)
    x, w = normal(4, 3, plan.in_features, seed=1).double(), normal(6, plan.in_features, seed=2).double()
    bound = 2 * oracles.EPS32 * (x.abs() @ s)
    assert ((plan.activations(x) - x @ s).abs() <= bound).all()
    # The weights are only copied and added: exact in float64 but for the order of two or three terms.
    torch.testing.assert_close(plan.weights(w), w @ r.T, rtol=1e-15, atol=1e-15)
    assert plan.activations(x).shape == (4, 3, plan.width) and plan.weights(w).shape == (6, plan.width)


@pytest.mark.parametrize("name", PLANS)
def test_entries_are_ordered_as_promised(name):
    """Entries 0 .. width-1 go to channels 0 .. width-1, once each; every input channel is read, by known types."""
    plan = PLANS[name]()
    assert torch.equal(plan.dst_idx[: plan.width], torch.arange(plan.width))
    assert set(plan.src_idx.tolist()) == set(range(plan.in_features))
    assert plan.src_idx.dtype == plan.dst_idx.dtype == torch.int64 and plan.coefficient.dtype == torch.float32
    assert len(plan.src_idx) == len(plan.dst_idx) == len(plan.coefficient)


@pytest.mark.parametrize("width", WIDTHS)
def test_splitting_is_exact(width):
    """S R is the identity, so (x S)(R W)^T = x W^T; in float64 up to the plan's own float32 1/T."""
    plan = split_only(width)
    s, r = dense(plan)
    assert plan.width > plan.in_features
    torch.testing.assert_close(s @ r, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-15)
    x, w = normal(5, width, seed=3).double(), normal(6, width, seed=4).double()
    y = plan.activations(x) @ plan.weights(w).T
    bound = 2 * oracles.EPS32 * (x.abs() @ w.abs().T)
    assert ((y - x @ w.T).abs() <= bound).all()


def groups_of(plan: ReassemblyPlan) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for src, dst in zip(plan.src_idx.tolist(), plan.dst_idx.tolist(), strict=True):
        members.setdefault(dst, []).append(src)
    return [group for group in members.values() if len(group) > 1]


@pytest.mark.parametrize("name", [name for name in PLANS if "merged" in name or "into" in name])
def test_merge_error_is_the_papers(name):
    """x W^T - (x S)(R W)^T = sum over merged groups of (x_i - mean x)(W_i - mean W)."""
    plan = PLANS[name]()
    x, w = normal(5, plan.in_features, seed=5).double(), normal(6, plan.in_features, seed=6).double()
    expected = torch.zeros(5, 6, dtype=torch.float64)
    groups = groups_of(plan)
    assert groups
    for group in groups:
        x_g, w_g = x[:, group], w[:, group]
        expected += (x_g - x_g.mean(1, keepdim=True)) @ (w_g - w_g.mean(1, keepdim=True)).T
    error = x @ w.T - plan.activations(x) @ plan.weights(w).T
    # Only the float32 fractions 1/T and 1/|G| separate the two.
    size = max(len(group) for group in groups)
    assert ((error - expected).abs() <= 2 * size * oracles.EPS32 * (x.abs() @ w.abs().T)).all()
    assert error.abs().max() > 0.01, "the merge costs nothing here, so nothing was compared"


def test_several_channels_merge_into_one():
    """By hand: the mean of three activations, the sum of three weights."""
    plan = two_into_one()
    assert plan.width == plan.in_features == 5
    x = torch.tensor([[10.0, 20.0, 30.0, 70.0, 5.0]])
    w = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    # Sub-channels of 0 (T = 3) come first, then 2's group {1, 2, 3}, then 4.
    third = torch.tensor(10.0) * torch.tensor(1 / 3)
    torch.testing.assert_close(plan.activations(x), torch.tensor([[third, third, third, 40.0, 5.0]]))
    assert plan.weights(w).tolist() == [[1.0, 1.0, 1.0, 14.0, 16.0]]
    assert sorted(map(sorted, groups_of(plan))) == [[1, 2, 3]]


@pytest.mark.parametrize("features", (1, 2, 33))
def test_identity(features):
    plan = ReassemblyPlan.identity(features)
    x = normal(3, features)
    assert plan.is_identity and plan.in_features == plan.width == features
    assert torch.equal(plan.activations(x), x) and torch.equal(plan.weights(x), x)


def test_only_the_identity_is_the_identity():
    """Neither a wider plan, nor one of the same width, nor one whose coefficients carry a gain."""
    assert not split_only(8).is_identity
    assert not split_and_merged(8).is_identity and split_and_merged(8).width == 8
    assert not ReassemblyPlan.identity(3).fold(torch.tensor([1.0, 2.0, 1.0])).is_identity
    nothing_split = build_plan(torch.ones(4), 1.0, torch.zeros(4, 4))
    assert nothing_split is not None and nothing_split.is_identity


@pytest.mark.parametrize("name", PLANS)
def test_fold_is_the_gain_before_the_plan(name):
    """(n * gain) S = n (diag(gain) S), up to one float32 rounding of coefficient * gain and the original 1/T."""
    plan = PLANS[name]()
    n, gain = normal(4, plan.in_features, seed=7).double(), 1 + normal(plan.in_features, seed=8)
    s, _ = dense(plan)
    exact = (n * gain.double()) @ s
    folded = plan.fold(gain)
    bound = 3 * oracles.EPS32 * ((n * gain.double()).abs() @ s)
    assert ((folded.activations(n) - exact).abs() <= bound).all()
    assert (folded.in_features, folded.width) == (plan.in_features, plan.width)
    assert torch.equal(plan.coefficient, PLANS[name]().coefficient), "fold changed the plan it was called on"
    assert folded.coefficient.dtype == torch.float32 and plan.fold(gain.bfloat16()).coefficient.dtype == torch.float32


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_shard_undoes_join(size):
    """Slices with their own plans, joined and sharded again; and the joined plan is the slices' plans side by side."""
    parts = [split_and_merged(11, seed=seed, outliers=1 + seed % 2) for seed in range(size)]
    whole = ReassemblyPlan.join(parts)
    assert whole.in_features == whole.width == 11 * size
    x, w = normal(3, 11 * size, seed=9), normal(6, 11 * size, seed=10)
    side_by_side = [p.activations(x_s) for p, x_s in zip(parts, x.chunk(size, 1), strict=True)]
    assert torch.equal(whole.activations(x), torch.cat(side_by_side, 1))
    side_by_side = [p.weights(w_s) for p, w_s in zip(parts, w.chunk(size, 1), strict=True)]
    assert torch.equal(whole.weights(w), torch.cat(side_by_side, 1))
    for rank, part in enumerate(parts):
        again = whole.shard(rank, size)
        assert (again.in_features, again.width) == (11, 11)
        for name in ("src_idx", "dst_idx", "coefficient"):
            assert torch.equal(getattr(again, name), getattr(part, name)), name


def test_join_of_uneven_slices():
    """Slices of different widths, wider than they were: each keeps its own channels."""
    parts = [split_only(5), ReassemblyPlan.identity(3), split_and_merged(8)]
    whole = ReassemblyPlan.join(parts)
    assert (whole.in_features, whole.width) == (16, sum(part.width for part in parts))
    x = normal(2, 16)
    expected = torch.cat([p.activations(x_s) for p, x_s in zip(parts, x.split([5, 3, 8], 1), strict=True)], 1)
    assert torch.equal(whole.activations(x), expected)
    assert torch.equal(whole.dst_idx[: whole.width], torch.arange(whole.width))


def test_shards_of_shards():
    """Sharding by 4 is sharding by 2, twice: a rank's part is the same plan at every tensor-parallel size."""
    whole = ReassemblyPlan.join([split_and_merged(9, seed=seed) for seed in range(4)])
    for rank in range(4):
        direct, twice = whole.shard(rank, 4), whole.shard(rank // 2, 2).shard(rank % 2, 2)
        for name in ("src_idx", "dst_idx", "coefficient"):
            assert torch.equal(getattr(direct, name), getattr(twice, name))


def test_sub_channels_sum_back():
    """T copies of x * (1/T) add up to x: 1/T and each product are rounded once, and T - 1 additions are exact to
    float64. In float32, because a bf16 1/T is off by up to 2^-9 (3 bf16(1/3) = 1.00195)."""
    x = torch.cat([torch.ones(50, 1), normal(50, 1)], 1)
    for splits in range(1, 101):
        plan = build_plan(torch.tensor([1.0, splits - 0.5]), 1.0, None)
        assert plan is not None and plan.width == 1 + splits
        parts = plan.activations(x)
        assert torch.equal(parts[:, 0], x[:, 0])
        total = parts[:, 1:].double().sum(1)
        assert ((total - x[:, 1].double()).abs() <= 2.01 * oracles.EPS32 * x[:, 1].double().abs()).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_dtype_is_kept_and_arithmetic_is_not_in_it(dtype):
    """The mean of a group is rounded once, at the end, whatever the dtype of x."""
    plan = split_and_merged(33)
    x = normal(20, 33, seed=11).to(dtype)
    y = plan.activations(x)
    s, _ = dense(plan)
    exact = x.double() @ s
    terms = x.double().abs() @ s
    final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 0.0}[dtype]
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= final * exact.abs() * 1.001 + 6 * oracles.EPS32 * terms).all()


def test_module_survives_bfloat16():
    """Reassembly as a module: model.bfloat16() moves x, not the fractions, and state_dict stays free of the plan."""
    plan = split_and_merged(33)
    module = Reassembly(plan).bfloat16()
    assert torch.equal(module.coefficient, plan.coefficient) and module.coefficient.dtype == torch.float32
    x = normal(4, 33).bfloat16()
    assert torch.equal(module(x), plan.activations(x))
    assert not module.state_dict()
    assert torch.equal(module.plan().weights(x), plan.weights(x))


def test_plan_is_differentiable():
    """The gradient of x S is that of the dense product, merged entries included."""
    plan = split_and_merged(33)
    x = normal(4, 33, seed=12).double().requires_grad_()
    upstream = normal(4, plan.width, seed=13).double()
    plan.activations(x).backward(upstream)
    s, _ = dense(plan)
    assert x.grad is not None
    assert ((x.grad - upstream @ s.T).abs() <= 3 * oracles.EPS32 * (upstream.abs() @ s.T)).all()


def test_splits_of_these_plans():
    """The fixtures are what they say: T = 3 and 4, and as many merges as sub-channels were added."""
    assert num_splits(outlier_max(8), 1.0).tolist() == [1, 3, 1, 4, 1, 1, 1, 1]
    assert split_only(8).width == 8 + 2 + 3
    assert sum(len(group) - 1 for group in groups_of(split_and_merged(33))) == 5


def joined(*parts: ReassemblyPlan) -> ReassemblyPlan:
    return ReassemblyPlan.join(parts)


DENSE = PLANS | {
    "identity 1": lambda: ReassemblyPlan.identity(1),
    "joined": lambda: joined(*(split_and_merged(11, seed=seed, outliers=1 + seed % 2) for seed in range(4))),
    "joined, uneven": lambda: joined(split_only(5), ReassemblyPlan.identity(3), split_and_merged(8)),
    "joined groups of three": lambda: joined(two_into_one(), two_into_one()),
    "a shard of a joined one": lambda: joined(split_and_merged(9), split_and_merged(9, seed=1)).shard(1, 2),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_form_and_back(name):
    """A form of one shape per width, for checkpoints: every entry comes back, in its order and bit for bit."""
    plan = DENSE[name]()
    src, coefficient, merged = plan.dense()
    assert len(src) == len(coefficient) == plan.width and len(merged) == plan.in_features
    assert src.dtype == merged.dtype == torch.int64 and coefficient.dtype == torch.float32
    again = ReassemblyPlan.from_dense(src, coefficient, merged)
    assert (again.in_features, again.width) == (plan.in_features, plan.width)
    for leaf in ("src_idx", "dst_idx", "coefficient"):
        assert torch.equal(getattr(again, leaf), getattr(plan, leaf)), leaf
    assert again.is_identity == plan.is_identity


def test_dense_by_hand():
    """Channel 0 in three parts, then 2 with 1 and 3 merged into it, then 4."""
    src, coefficient, merged = two_into_one().dense()
    assert src.tolist() == [0, 0, 0, 2, 4] and merged.tolist() == [-1, 3, -1, 3, -1]
    torch.testing.assert_close(coefficient, torch.tensor([1 / 3] * 4 + [1.0]), rtol=1e-7, atol=0)


def test_dense_form_of_a_joined_plan_is_the_slices_side_by_side():
    """So a rank stores its own slice, counted from the first channel of all."""
    parts = [split_and_merged(11, seed=seed) for seed in range(3)]
    whole = joined(*parts).dense()
    for number, part in enumerate(parts):
        src, coefficient, merged = part.dense()
        mine = slice(11 * number, 11 * (number + 1))
        assert torch.equal(whole[0][mine], src + 11 * number) and torch.equal(whole[1][mine], coefficient)
        assert torch.equal(whole[2][mine], torch.where(merged < 0, merged, merged + 11 * number))
