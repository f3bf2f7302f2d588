"""Modules that carry out a reassembly or a low-rank correction, against the same arithmetic written down again."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm, rms_gain
from megatron_lowbit.qllm.reassembly import build_plan
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight, Scheme, choose_qparams, fake_quantize, quantize
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

HIDDEN = 33


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_plan(features: int = HIDDEN, merge: bool = True, seed: int = 0) -> ReassemblyPlan:
    """Splits channels 1 and 3 into 3 and 2, merges three others (unless not), by random distances."""
    max_abs = torch.ones(features)
    max_abs[1], max_abs[3] = 2.5, 1.5
    plan = build_plan(max_abs, 1.0, normal(features, features, seed=seed).abs() if merge else None)
    assert plan is not None and plan.width == features + (0 if merge else 3)
    return plan


def dense_s(plan: ReassemblyPlan) -> Tensor:
    """S [in, width], float64, with the float32 coefficients as they are."""
    s = torch.zeros(plan.in_features, plan.width, dtype=torch.float64)
    s.index_put_((plan.src_idx, plan.dst_idx), plan.coefficient.double(), accumulate=True)
    return s


def dense_r(plan: ReassemblyPlan) -> Tensor:
    r = torch.zeros(plan.width, plan.in_features, dtype=torch.float64)
    r.index_put_((plan.dst_idx, plan.src_idx), torch.ones(len(plan.src_idx), dtype=torch.float64), accumulate=True)
    return r


# Norms


def make_norm(kind: str, hidden: int = HIDDEN) -> nn.Module:
    norms = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "torch": nn.RMSNorm, "layer": nn.LayerNorm}
    norm = norms[kind](hidden, eps=1e-5)
    norm.weight.data.copy_(0.3 * normal(hidden, seed=3) + (0.0 if kind == "gemma2" else 1.0))
    if kind == "layer":
        norm.bias.data.copy_(normal(hidden, seed=4))
    return norm.requires_grad_(False)


def effective_gain(norm: nn.Module) -> Tensor:
    """What the norm multiplies by: Gemma's is 1 + weight."""
    assert isinstance(norm.weight, Tensor)
    return norm.weight.float() + (1.0 if isinstance(norm, Gemma2RMSNorm) else 0.0)


@pytest.mark.parametrize("kind", ("llama", "gemma2", "torch"))
@pytest.mark.parametrize("merge", (True, False))
def test_reassembled_norm_is_norm_then_plan(kind, merge):
    """gain folded into the gather: n(h) gain S, in float32 within the roundings of each of its four factors."""
    norm, plan = make_norm(kind), make_plan(merge=merge)
    module, h = ReassembledNorm(norm, plan), 3 * normal(4, 5, HIDDEN, seed=5)
    assert module.norm is None, "the gain was not folded"
    h64 = h.double()
    normed = h64 * torch.rsqrt(h64.square().mean(-1, keepdim=True) + 1e-5) * effective_gain(norm).double()
    exact, terms = normed @ dense_s(plan), normed.abs() @ dense_s(plan)
    y = module(h)
    assert y.shape == (4, 5, plan.width) and y.dtype == torch.float32
    # The mean of 33 squares, its root, the product with h, with the coefficient (itself a product), up to 3 additions.
    bound = (HIDDEN / 2 + 10) * oracles.EPS32 * terms
    assert ((y.double() - exact).abs() <= bound).all()
    assert ((y - plan.activations(norm(h))).abs() <= 2 * bound).all()


def test_layer_norm_runs_as_it_is():
    """A norm that is no RMSNorm has a mean and a bias, which do not fold: it runs, and the gather follows."""
    norm, plan = make_norm("layer"), make_plan()
    module, h = ReassembledNorm(norm, plan), normal(4, HIDDEN, seed=6)
    assert module.norm is norm and module.gain is None
    assert torch.equal(module(h), plan.activations(norm(h)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("kind", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("torch", 0.0)])
def test_rms_gain(kind, offset, dtype):
    """The gain is found out by what the norm computes, also where it computes in bf16."""
    norm = make_norm(kind, 64).to(dtype)
    found = rms_gain(norm)
    assert found is not None
    gain, eps = found
    assert eps == 1e-5 and gain.dtype == torch.float32
    assert torch.equal(gain, norm.weight.detach().float() + offset)


@pytest.mark.parametrize(
    "norm", [make_norm("layer"), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.Identity()], ids=str
)
def test_rms_gain_of_something_else(norm):
    assert rms_gain(norm) is None


class DoubledNorm(LlamaRMSNorm):
    """Looks like an RMSNorm, but is none: its output is twice that."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def test_rms_gain_is_told_by_the_output():
    norm = DoubledNorm(HIDDEN, 1e-5)
    norm.weight.data.copy_(1 + 0.3 * normal(HIDDEN, seed=3))  # at 1 everywhere, twice the weight is 1 + weight
    assert rms_gain(norm) is None
    plan, h = make_plan(), normal(2, HIDDEN)
    assert torch.equal(ReassembledNorm(norm, plan)(h), plan.activations(norm(h)))


@pytest.mark.parametrize("kind", ("llama", "gemma2"))
def test_bfloat16_keeps_gain_and_fractions(kind):
    """model.bfloat16() must not round 1/T or the gain; the output is the float32 result, rounded once."""
    norm, plan = make_norm(kind), make_plan()
    module = ReassembledNorm(norm, plan)
    h = normal(6, HIDDEN, seed=7).bfloat16()
    expected = module(h.float()).bfloat16()
    module.bfloat16()
    assert module.gain is not None and module.gain.dtype == torch.float32
    assert torch.equal(module.gain, effective_gain(norm))
    assert torch.equal(module.reassembly.coefficient, plan.coefficient)
    assert module.reassembly.coefficient.dtype == torch.float32
    y = module(h)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


# Deployed linears


@pytest.mark.parametrize("scheme", ("W4A16", "W4A8", "W4A4"))
@pytest.mark.parametrize("merge", (True, False))
def test_deployed_linear_with_plan(scheme, merge):
    """y = Q(x S) Q(R W)^T + b: x and W are reassembled by dense matrices here."""
    bits, plan = Scheme.parse(scheme), make_plan(merge=merge)
    w, x, bias = normal(7, HIDDEN, seed=8), normal(2, 5, HIDDEN, seed=9), normal(7, seed=10)
    reassembled = (w.double() @ dense_r(plan).T).float()
    weight = QuantizedWeight.from_float(reassembled, bits.weight_bits)
    y = QuantLinear(weight, bias, bits.act_bits, 1, plan)(x)
    xs = plan.activations(x)
    torch.testing.assert_close(xs.double(), x.double() @ dense_s(plan), rtol=1e-5, atol=1e-5)
    if bits.act_bits < 16:
        xs = fake_quantize(xs, bits.act_bits)
    terms = xs.double().abs() @ weight.dequantize().double().abs().T + bias.abs()
    exact = xs.double() @ weight.dequantize().double().T + bias
    assert y.shape == (2, 5, 7)
    assert ((y.double() - exact).abs() <= (plan.width + 4) * oracles.EPS32 * terms).all()


@pytest.mark.parametrize("scheme", ("W4A16", "W4A8", "W4A4"))
@pytest.mark.parametrize("with_plan", (True, False))
def test_deployed_linear_with_branch(scheme, with_plan):
    """y = Q(x S) Q(R W)^T + Q(x S) A^T B^T, the branch on the same quantized activations."""
    bits, plan = Scheme.parse(scheme), make_plan() if with_plan else None
    w, x = normal(7, HIDDEN, seed=11), normal(5, HIDDEN, seed=12)
    low_rank = LowRank(normal(3, HIDDEN, seed=13).bfloat16(), normal(7, 3, seed=14).bfloat16())
    weight = QuantizedWeight.from_float(w, bits.weight_bits)
    y = QuantLinear(weight, None, bits.act_bits, 1, plan, low_rank)(x)
    xs = x if plan is None else plan.activations(x)
    xs = xs if bits.act_bits == 16 else fake_quantize(xs, bits.act_bits)
    a, b, xs = low_rank.lora_a.double(), low_rank.lora_b.double(), xs.double()
    dense = weight.dequantize().double()
    exact = xs @ dense.T + xs @ a.T @ b.T
    terms = xs.abs() @ dense.abs().T + xs.abs() @ a.abs().T @ b.abs().T
    # 33 products and sums each; the branch has 3 more after them.
    assert ((y.double() - exact).abs() <= (HIDDEN + 8) * oracles.EPS32 * terms).all()
    assert (xs @ a.T @ b.T).abs().max() > 100 * HIDDEN * oracles.EPS32 * terms.max(), "the branch would not show"


@pytest.mark.parametrize("size", (1, 2, 3))
def test_branch_shards_add_up(size):
    """Rank by rank: outputs side by side for a column-parallel linear, partial sums for a row-parallel one."""
    features, outputs = 36, 12
    low_rank = LowRank(normal(4, features, seed=15).bfloat16(), normal(outputs, 4, seed=16).bfloat16())
    x = normal(5, features, seed=17).double()
    whole = x @ low_rank.lora_a.double().T @ low_rank.lora_b.double().T
    columns = [low_rank.shard_out(rank, size) for rank in range(size)]
    side_by_side = torch.cat([x @ part.lora_a.double().T @ part.lora_b.double().T for part in columns], 1)
    torch.testing.assert_close(side_by_side, whole, rtol=1e-13, atol=1e-13)
    rows = [low_rank.shard_in(rank, size) for rank in range(size)]
    partial = [
        x_r @ part.lora_a.double().T @ part.lora_b.double().T for x_r, part in zip(x.chunk(size, 1), rows, strict=True)
    ]
    torch.testing.assert_close(torch.stack(partial).sum(0), whole, rtol=1e-13, atol=1e-13)
    assert all(part.lora_b.shape == (outputs // size, 4) and part.lora_b.is_contiguous() for part in columns)
    assert all(part.lora_a.shape == (4, features // size) and part.lora_a.is_contiguous() for part in rows)


# ShardedLinear

IN, OUT, SHARDS = 24, 16, 4


def sharded(kind: str, weight: Tensor, bias: Tensor | None = None, shards: int = SHARDS) -> ShardedLinear:
    parts = [part.contiguous() for part in weight.chunk(shards, 0 if kind == "column" else 1)]
    return ShardedLinear("model.layers.0.mlp.some_proj", kind, parts, bias, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("with_bias", (True, False))
def test_sharded_linear_in_full_precision(kind, with_bias):
    w, x = normal(OUT, IN, seed=20), normal(2, 5, IN, seed=21)
    bias = normal(OUT, seed=22) if with_bias else None
    linear = sharded(kind, w, bias)
    y = linear(x)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    terms = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.abs())
    assert y.shape == (2, 5, OUT)
    assert ((y.double() - exact).abs() <= (IN + 2) * oracles.EPS32 * terms).all()
    torch.testing.assert_close(y, F.linear(x, w, bias), rtol=1e-5, atol=1e-5)


def sharded_plans(kind: str) -> list[ReassemblyPlan]:
    """One plan of all inputs, or one of each shard (of 6 channels: one split in two, one merged)."""
    if kind == "column":
        return [make_plan(IN, seed=1)]
    max_abs = torch.ones(IN // SHARDS)
    max_abs[2] = 1.5
    plans = [build_plan(max_abs, 1.0, normal(6, 6, seed=seed).abs()) for seed in range(SHARDS)]
    return [plan for plan in plans if plan is not None]


def train_a_little(linear: ShardedLinear, rank: int, branch: bool) -> None:
    """B starts at zero, where a correction would not show."""
    parameters = linear.add_low_rank(rank, branch, torch.Generator().manual_seed(0))
    for number, parameter in enumerate(parameters):
        parameter.data.add_(0.05 * normal(*parameter.shape, seed=30 + number))


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("scheme", ("W4A16", "W4A8", "W4A4"))
@pytest.mark.parametrize("group_size", (None, 3))
@pytest.mark.parametrize("correction", ("none", "merged", "branch"))
@pytest.mark.parametrize("reassembled", (False, True))
def test_training_forward_is_the_deployed_one(kind, scheme, group_size, correction, reassembled):
    """What is trained is what is deployed: the fake-quantized forward against packed() in a deployed linear."""
    w, x, bias = normal(OUT, IN, seed=23), normal(2, 5, IN, seed=24), normal(OUT, seed=25)
    bits, linear = Scheme.parse(scheme), sharded(kind, w, bias)
    plan = None
    if reassembled:
        linear.set_plans(sharded_plans(kind))
        plan = linear.whole_plan()
        assert plan is not None and not plan.is_identity and plan.in_features == IN
    if correction != "none":
        train_a_little(linear, 3, correction == "branch")
    linear.quantize(bits, WeightsConfig(scheme=scheme, group_size=group_size))
    with torch.no_grad():
        y = linear(x)
    packed, low_rank = linear.packed(), linear.low_rank()
    assert (low_rank is None) == (correction != "branch")
    assert packed.scale.shape == (OUT, 1 if group_size is None else IN // group_size)
    dim = 0 if kind == "column" else 1
    # Weights: the very numbers, to the last bit, for one min-max range per output channel or group.
    with torch.no_grad():
        assert torch.equal(packed.dequantize(), torch.cat(linear.effective_weights(), dim))
    act_groups = 1 if kind == "column" else SHARDS
    deployed = QuantLinear(packed, bias, bits.act_bits, act_groups, plan, low_rank)(x)
    # Codes of the activations are equal; the float32 sums are taken in another order.
    terms = (x.abs().amax() * packed.dequantize().abs().sum(1).amax()).item()
    if low_rank is not None:
        terms += (x.abs().amax() * (low_rank.lora_b.float().abs() @ low_rank.lora_a.float().abs()).sum(1).amax()).item()
    assert ((y - deployed).abs() <= 4 * (IN + 8) * oracles.EPS32 * terms).all()
    if correction == "merged":  # it does something
        plain = sharded(kind, w, bias)
        if reassembled:
            plain.set_plans(sharded_plans(kind))
        plain.quantize(bits, WeightsConfig(scheme=scheme, group_size=group_size))
        assert not torch.equal(plain.packed().packed_weight, packed.packed_weight)


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("group_size", (None, 3))
def test_a_candidate_is_scored_with_the_weights_it_would_deploy(kind, group_size):
    """weights_under: the bits of a linear that takes the plan for good; the one that was asked computes as before."""
    w, x = normal(OUT, IN, seed=40), normal(2, 5, IN, seed=41)
    scheme, config = Scheme.parse("W4A4"), WeightsConfig(scheme="W4A4", group_size=group_size)
    asked, deployed = sharded(kind, w), sharded(kind, w)
    before = asked(x)
    candidate = asked.weights_under(sharded_plans(kind), scheme, config)
    deployed.set_plans(sharded_plans(kind))
    deployed.quantize(scheme, config)
    with torch.no_grad():
        assert all(map(torch.equal, candidate, deployed.effective_weights()))
    assert torch.equal(asked(x), before) and asked.plans is None and not asked.quantized
    asked.freeze(candidate)
    with torch.no_grad():
        assert all(map(torch.equal, asked.effective_weights(), candidate))
    asked.unfreeze()
    assert torch.equal(asked(x), before)


@pytest.mark.parametrize("kind", ("column", "row"))
def test_whole_quantized_weight_is_that_of_the_unsharded_one(kind):
    """Cut into shards or not, one scale per output channel: the codes of QuantizedWeight.from_float."""
    w = normal(OUT, IN, seed=26)
    linear = sharded(kind, w)
    linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
    packed, whole = linear.packed(), QuantizedWeight.from_float(w, 4)
    for name in ("packed_weight", "scale", "zero_point"):
        assert torch.equal(getattr(packed, name), getattr(whole, name)), name


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("correction", ("none", "merged", "branch"))
def test_freeze_changes_nothing(kind, correction):
    """The same bits; and frozen weights are kept until unfreeze, which sees what was trained meanwhile."""
    linear, x = sharded(kind, normal(OUT, IN, seed=27)), normal(5, IN, seed=28)
    if correction != "none":
        train_a_little(linear, 2, correction == "branch")
    linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
    with torch.no_grad():
        before = linear(x)
        linear.freeze()
        assert torch.equal(linear(x), before)
        if correction == "merged":
            assert linear.lora_shared is not None and linear.lora_shards is not None
            for factor in (linear.lora_shared, *linear.lora_shards):
                factor.mul_(3)
            assert torch.equal(linear(x), before)
        linear.unfreeze()
        assert torch.equal(linear(x), before) == (correction != "merged")


def test_prepared_input_is_left_alone():
    """A column-parallel linear behind a norm that reassembled and quantized: it must not do so again."""
    linear, x = sharded("column", normal(OUT, IN, seed=29)), normal(5, IN, seed=30)
    linear.quantize(Scheme(8, 4), WeightsConfig(scheme="W8A8"))
    once = linear(fake_quantize(x, 4))
    linear.prepared = True
    x4 = fake_quantize(x, 4)
    weight = torch.cat(linear.effective_weights())
    torch.testing.assert_close(linear(x4), F.linear(x4, weight), rtol=1e-5, atol=1e-5)
    assert not torch.equal(linear(x), once)


def test_row_parallel_input_is_quantized_shard_by_shard():
    """Each shard of the input has its own scale per token, so an outlier costs its own shard only."""
    w, x = normal(OUT, IN, seed=31), normal(5, IN, seed=32)
    x[:, 0] *= 100
    linear = sharded("row", w)
    linear.quantize(Scheme(8, 4), WeightsConfig(scheme="W8A8"))
    scale, zero = choose_qparams(x, 4, group_size=IN // SHARDS)
    codes = quantize(x, scale, zero, 4).double().unflatten(1, (SHARDS, -1))
    xq = ((codes - zero.double()[..., None]) * scale.double()[..., None]).flatten(1)
    exact = xq @ linear.packed().dequantize().double().T
    torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=1e-3)
    one_scale = fake_quantize(x, 4).double() @ linear.packed().dequantize().double().T
    assert (exact - one_scale).abs().max() > 1


class RoundThrough(torch.autograd.Function):
    """The test's own straight-through quantizer, in float64: eq. 2 forward, the identity backward."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:  # type: ignore[override]
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        zero = -(low / scale).round()
        return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


@pytest.mark.parametrize("kind", ("column", "row"))
@pytest.mark.parametrize("branch", (False, True))
def test_gradients_of_the_factors(kind, branch):
    """A and B of all shards together, and x, against autograd on the unsharded layer in float64, whose quantizer is
    the test's own straight-through rounding."""
    w, rank = normal(OUT, IN, seed=33), 3
    linear = sharded(kind, w)
    train_a_little(linear, rank, branch)
    linear.quantize(Scheme(4, 16), WeightsConfig(scheme="W4A16"))
    assert linear.lora_shared is not None and linear.lora_shards is not None
    x, upstream = normal(5, IN, seed=34).requires_grad_(), normal(5, OUT, seed=35)
    parameters = [linear.lora_shared, *linear.lora_shards]
    x_grad, shared_grad, *shard_grads = torch.autograd.grad(linear(x), [x, *parameters], upstream)

    shards = torch.cat([p.detach() for p in linear.lora_shards], 0 if kind == "column" else 1)
    a, b = (linear.lora_shared, shards) if kind == "column" else (shards, linear.lora_shared)
    if branch:  # as it is stored: bf16, rounded straight through by the cast's own gradient
        a, b = a.bfloat16(), b.bfloat16()
    a64, b64 = (factor.detach().double().requires_grad_() for factor in (a, b))
    x64 = x.detach().double().requires_grad_()
    if branch:
        y = F.linear(x64, RoundThrough.apply(w.double(), 4)) + F.linear(F.linear(x64, a64), b64)
    else:
        y = F.linear(x64, RoundThrough.apply(w.double() + b64 @ a64, 4))
    expected = torch.autograd.grad(y, [x64, a64, b64], upstream.double())
    whole = torch.cat(shard_grads, 0 if kind == "column" else 1)
    found = (x_grad, shared_grad, whole) if kind == "column" else (x_grad, whole, shared_grad)
    # Sums of at most 24 float32 products; a branch's gradients are rounded to bf16 by the factors' cast.
    tolerance = 2.0**-7 if branch else 1e-5
    for name, mine, reference in zip(("x", "A", "B"), found, expected, strict=True):
        limit = (1e-5 if name == "x" else tolerance) * reference.abs().max().item()
        assert (mine.double() - reference).abs().max().item() <= limit, name
        assert reference.abs().max() > 0.1


def test_activation_rounding_passes_the_gradient_through():
    """d y / d x of a W4A4 linear is that of its quantized weight on the unrounded input."""
    w, upstream = normal(OUT, IN, seed=36), normal(5, OUT, seed=37)
    linear, x = sharded("row", w), normal(5, IN, seed=38).requires_grad_()
    linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
    (grad,) = torch.autograd.grad(linear(x), [x], upstream)
    expected = upstream.double() @ RoundThrough.apply(w.double(), 4)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_new_factors_change_nothing():
    """B starts at zero: A alone corrects nothing, merged or beside; and A is the same at every number of shards."""
    w, x = normal(OUT, IN, seed=39), normal(5, IN, seed=40)
    for kind in ("column", "row"):
        plain = sharded(kind, w)
        plain.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
        for branch in (False, True):
            whole = []
            for shards in (1, 2, 4):
                linear = sharded(kind, w, shards=shards)
                linear.add_low_rank(3, branch, torch.Generator().manual_seed(5))
                assert linear.lora_shared is not None and linear.lora_shards is not None
                whole.append(linear.lora_shared if kind == "column" else torch.cat(list(linear.lora_shards), 1))
                if shards == SHARDS:
                    linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
                    assert torch.equal(linear(x), plain(x))
            assert all(torch.equal(a, whole[0]) for a in whole[1:]) and whole[0].abs().max() <= IN**-0.5
            # Variance 1 / (3 in); its estimate from 72 uniform values has a standard deviation of 10 %.
            assert 0.5 < whole[0].var().item() * 3 * IN < 1.5


def test_factors_that_ran_away_are_reported():
    """NaN after training is named, not packed."""
    linear = sharded("column", normal(OUT, IN))
    train_a_little(linear, 2, False)
    assert linear.lora_shared is not None
    linear.lora_shared.data[0, 0] = torch.nan
    linear.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
    with pytest.raises(LowBitError, match="some_proj holds NaN or Inf"):
        linear.packed()
