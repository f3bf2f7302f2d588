"""The affine quantizer against eq. 2 of arXiv 2310.08041 in float64, and what rows that break eq. 2 become."""

import math
from functools import partial

import numpy as np
import oracles
import pytest
import torch

from megatron_lowbit import kernels
from megatron_lowbit.config import LowBitError
from megatron_lowbit.quant.affine import QuantizedWeight, choose_qparams, fake_quantize, qparams_from_range, quantize

BITS = range(2, 9)
ROWS = [  # rows, features, group_size; per channel where group_size is the width
    (1, 1, 1),
    (1, 7, 7),
    (6, 33, 33),
    (5, 12, 4),
    (3, 8, 1),
    (4, 172, 43),
]


def random_rows(rows: int, features: int, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(1)
    return x + offset * x.abs().amax(1, keepdim=True)


def roundtrip(x: torch.Tensor, bits: int, symmetric: bool = False, group_size: int | None = None) -> torch.Tensor:
    scale, zero_point = choose_qparams(x, bits, symmetric, group_size)
    return kernels.dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("offset", (0.0, 2.0, -3.0))  # rows that hold zero, all-positive rows, all-negative rows
@pytest.mark.parametrize(("rows", "features", "group_size"), [shape for shape in ROWS if shape[2] > 1])
def test_equation_2(bits, symmetric, offset, rows, features, group_size):
    x = random_rows(rows, features, offset)
    scale, zero_point = choose_qparams(x, bits, symmetric, group_size)
    codes = quantize(x, scale, zero_point, bits)
    assert scale.shape == zero_point.shape == (rows, features // group_size)
    assert scale.dtype == zero_point.dtype == torch.float32 and codes.dtype == torch.uint8

    groups = x.double().numpy().reshape(rows, -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    exact_scale, exact_zero = oracles.qparams(low, high, bits, symmetric)
    # float32 rounds two quotients and their difference; a difference of like signs magnifies the first two.
    magnified = 2 if symmetric else (abs(low) + abs(high)) / (high - low)
    scale_error = oracles.EPS32 * (1 + magnified * np.ones_like(low))
    assert (abs(scale.double().numpy() / exact_scale - 1) <= 1.01 * scale_error).all()

    # So a quotient is off by its share of that and one more rounding; it may round to the other side near a tie only.
    def far_from_ties(quotient, error):
        return abs(abs(quotient - np.floor(quotient)) - 0.5) > 1.01 * (error + oracles.EPS32) * abs(quotient)

    sure_zero = np.full_like(low, True, bool) if symmetric else far_from_ties(low / exact_scale, scale_error)
    assert np.array_equal(zero_point.numpy()[sure_zero], exact_zero[sure_zero])
    exact_codes = oracles.quantize(groups, exact_scale[..., None], exact_zero[..., None], bits)
    sure = far_from_ties(groups / exact_scale[..., None], scale_error[..., None]) & sure_zero[..., None]
    assert sure.mean() > 0.95
    assert np.array_equal(codes.numpy().reshape(groups.shape)[sure], exact_codes[sure])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("offset", (0.0, 2.0))
@pytest.mark.parametrize(("rows", "features", "group_size"), ROWS)
def test_error_is_at_most_half_a_step(bits, symmetric, offset, rows, features, group_size):
    x = random_rows(rows, features, offset)
    error = (roundtrip(x, bits, symmetric, group_size) - x).abs().double().view(rows, -1, group_size)
    groups = x.double().view(rows, -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = 2**bits - (2 if symmetric else 1)
    step = (2 * torch.maximum(low.abs(), high.abs()) if symmetric else high - low) / steps
    # Range ends clamp to codes within half a step of them, so there is no more than that anywhere. float32 adds a few
    # roundings of the quotients x/scale and low/scale, of the scale in them, and of the product.
    assert (error <= step / 2 + 8 * oracles.EPS32 * torch.maximum(low.abs(), high.abs())).all()


def test_an_example_by_hand():
    """Range -3 .. 12 in 4 bits: scale 1, zero point 3; halves go to the even neighbour."""
    x = torch.tensor([[-3.0, -2.5, -0.4, 0.5, 1.5, 7.6, 12.0]])
    scale, zero_point = choose_qparams(x, 4)
    assert scale.item() == 1 and zero_point.item() == 3
    codes = quantize(x, scale, zero_point, 4)
    assert codes.tolist() == [[0, 1, 3, 3, 5, 11, 15]]
    assert kernels.dequantize(codes, scale, zero_point).tolist() == [[-3.0, -2.0, 0.0, 0.0, 2.0, 8.0, 12.0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", (0.0, 2.0, -3.0))
@pytest.mark.parametrize(("rows", "features", "group_size"), [shape for shape in ROWS if shape[2] > 1])
def test_real_zero_points(bits, offset, rows, features, group_size):
    """Codes of float64, but near ties; both ends of a range have the first and the last code, and no error is above
    half a step."""
    x, levels = random_rows(rows, features, offset), 2**bits - 1
    scale, zero_point = choose_qparams(x, bits, group_size=group_size, real_zero=True)
    codes = quantize(x, scale, zero_point, bits).numpy().reshape(rows, -1, group_size)
    groups = x.double().numpy().reshape(rows, -1, group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    assert (codes[groups == low] == 0).all() and (codes[groups == high] == levels).all()
    exact = (groups - low) / (high - low) * levels
    # Scale, zero point, quotient and sum are of float32: each errs by a few of its roundings of |x| / scale.
    error = 8 * oracles.EPS32 * (abs(low) + abs(high)) / (high - low) * levels
    sure = abs(exact - np.floor(exact) - 0.5) > error
    assert sure.mean() > 0.95 and np.array_equal(codes[sure], np.round(exact)[sure])
    back = kernels.dequantize(torch.from_numpy(codes).view(rows, -1), scale, zero_point).double().numpy()
    assert (abs(back.reshape(groups.shape) - groups) <= (0.5 + error) * (high - low) / levels).all()


def test_codes_with_a_real_minimum_come_back():
    """Weights that were in 4 bits before, as scale * code + minimum in groups (GGUF's Q4_1): rounding with whole zero
    points moves them, with real ones only by float32's roundings."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    steps, least = torch.rand(2, 8, 4, 1, generator=generator) + 0.5
    x = (steps * codes - 8 * least).flatten(1)
    real, whole = (fake_quantize(x, 4, group_size=32, real_zero=real) for real in (True, False))
    torch.testing.assert_close(real, x, rtol=0, atol=16 * oracles.EPS32 * x.abs().max().item())
    assert (whole - x).abs().max() > 0.4 * steps.min()
    weight = QuantizedWeight.from_float(x, 4, False, 32, qparams=partial(choose_qparams, real_zero=True))
    assert torch.equal(weight.codes(), codes.flatten(1).to(torch.uint8)) and torch.equal(weight.dequantize(), real)


@pytest.mark.parametrize("group_size", (32, 128))
def test_what_real_zero_points_gain(group_size):
    """Two of n values of a group have no error, and the others' is the same: the squared error is 2 / n smaller. Over
    4,096 groups that difference, of errors that have little to do with each other, is known to about 0.01."""
    x = torch.randn(4096, group_size, generator=torch.Generator().manual_seed(0))
    real, whole = ((fake_quantize(x, 4, real_zero=real) - x).square().sum().item() for real in (True, False))
    assert real / whole == pytest.approx(1 - 2 / group_size, abs=0.01)


def test_symmetric_codes_mirror():
    x = torch.tensor([[-7.0, -3.0, 0.0, 3.0, 7.0]])
    scale, zero_point = choose_qparams(x, 4, symmetric=True)
    assert scale.item() == 1 and zero_point.item() == 8
    assert quantize(x, scale, zero_point, 4).tolist() == [[1, 5, 8, 11, 15]]


def test_per_token_is_per_row_of_any_leading_shape():
    x = random_rows(6, 8)
    scale, zero_point = choose_qparams(x.view(2, 3, 8), 8, group_size=4)
    flat_scale, flat_zero = choose_qparams(x, 8, group_size=4)
    assert torch.equal(scale, flat_scale.view(2, 3, 2)) and torch.equal(zero_point, flat_zero.view(2, 3, 2))
    codes = quantize(x.view(2, 3, 8), scale, zero_point, 8)
    assert torch.equal(codes, quantize(x, flat_scale, flat_zero, 8).view(2, 3, 8))
    assert torch.equal(kernels.dequantize(codes, scale, zero_point).view(6, 8), roundtrip(x, 8, group_size=4))


def test_no_tokens():
    x = torch.empty(0, 8)
    scale, zero_point = choose_qparams(x, 4, group_size=4)
    assert scale.shape == (0, 2) and quantize(x, scale, zero_point, 4).shape == (0, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", (0.0, -0.0, 0.3, 0.5, 1.5, 2.5, -100.4, 16777217.0, 3e38, -3e38, 1e-38, 1e-42))
def test_a_constant_row_comes_back_exactly(bits, value):
    x = torch.full((2, 5), value)
    x[1] = torch.linspace(-1, 1, 5)  # the neighbour is not constant
    assert torch.equal(roundtrip(x, bits)[0], x[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", (0.0, 0.3, -100.4, 3e38))
def test_a_constant_row_is_the_end_of_a_symmetric_range(bits, value):
    x = torch.full((1, 5), value)
    # scale = 2 a / (2^b - 2) and the product with (2^b - 2) / 2: three roundings
    torch.testing.assert_close(roundtrip(x, bits, symmetric=True), x, rtol=3 * oracles.EPS32, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_both_signs(bits):
    assert torch.equal(roundtrip(torch.tensor([[0.0, -0.0, 0.0]]), bits), torch.zeros(1, 3))
    mixed = roundtrip(torch.tensor([[0.0, -0.0, 3.0, -1.0]]), bits)
    assert mixed[0, 0] == mixed[0, 1] == 0  # the zero point is an integer, so zero is always a code


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("base", (1.0, -100.4, 1e6, 3e30))
@pytest.mark.parametrize("ulps", (1, 2, 3, 50, 1000, 100_000))
def test_a_nearly_constant_row_stays_in_its_range(bits, base, ulps):
    """Where a step is near float32's resolution, the error is at most the row's whole range (and no NaN)."""
    ulp = np.spacing(np.float32(abs(base)))
    x = torch.tensor([[base, base + ulp * (ulps // 2), base + ulp * ulps]])
    result = roundtrip(x, bits)
    spread = (x.amax() - x.amin()).item()
    # A step above the resolution costs half of it, plus the float32 roundings of two quotients and a product.
    assert (result - x).abs().max().item() <= spread + 4 * oracles.EPS32 * abs(base)


def test_a_nearly_constant_row_keeps_its_steps():
    """Half a step, and the float32 roundings of two quotients and a product; the worst found is 2.1 of these four."""
    for bits in BITS:
        for base in (1.0, -100.4, 3e30):
            for ulps in (1, 4, 50, 255, 600, 5000):
                start, ulp = np.float32(base), np.spacing(np.float32(abs(base)))
                x = torch.from_numpy(start + ulp * np.arange(0, ulps + 1, max(1, ulps // 50), dtype=np.float32))
                half_step = (x.amax() - x.amin()).item() / (2**bits - 1) / 2
                error = (roundtrip(x[None], bits)[0] - x).abs().max().item()
                assert error <= half_step + 4 * oracles.EPS32 * abs(base)


@pytest.mark.parametrize("bits", BITS)
def test_subnormal_range(bits):
    """Differences below float32's smallest normal number are lost, not turned into NaN."""
    x = torch.tensor([[0.0, 1e-42, 5e-40]])
    result = roundtrip(x, bits)
    assert (result - x).abs().max() <= 5e-40


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
def test_max_minus_min_beyond_float32(bits, symmetric):
    """max - min overflows float32, the scale must not. (The lowest 2- and 3-bit code of ±3e38 overflows too.)"""
    for edge in (2e38, 3e38):
        if edge == 3e38 and bits < 4 and not symmetric:
            continue
        x = torch.tensor([[-edge, 0.0, edge / 3, edge]])
        result = roundtrip(x, bits, symmetric).double()
        step = 2 * edge / (2**bits - (2 if symmetric else 1))
        assert ((result - x.double()).abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("symmetric", (False, True))
def test_qparams_are_float32_whatever_the_input(dtype, symmetric):
    x = random_rows(3, 16).to(dtype)
    for got, expected in zip(choose_qparams(x, 4, symmetric), choose_qparams(x.float(), 4, symmetric), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(roundtrip(x, 4, symmetric), roundtrip(x.float(), 4, symmetric))


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize(
    "bad",
    (
        [math.nan, 1.0, 2.0],
        [math.nan] * 3,
        [math.inf, 1.0, 2.0],
        [-math.inf, 1.0, 2.0],
        [-math.inf, 1.0, math.inf],
    ),
)
def test_nan_and_inf_make_their_row_nan(bad, symmetric):
    x = torch.tensor([[1.0, 2.0, 4.0], bad, [-1.0, 0.0, 1.0]])
    result = roundtrip(x, 4, symmetric)
    assert result[1].isnan().all()
    assert torch.equal(result[::2], roundtrip(x[::2], 4, symmetric))


@pytest.mark.parametrize("bits", (-4, 0, 1, 9, 16))
def test_bits_outside_2_to_8(bits):
    with pytest.raises(LowBitError, match=rf"num_bits={bits} .*2\.\.8"):
        qparams_from_range(torch.zeros(1), torch.ones(1), bits)
    with pytest.raises(LowBitError, match=f"num_bits={bits}"):
        fake_quantize(torch.ones(1, 2), bits)


def test_group_size_that_does_not_divide():
    with pytest.raises(LowBitError, match="group_size=5 does not divide 12"):
        choose_qparams(torch.ones(2, 12), 4, group_size=5)
    with pytest.raises(LowBitError, match=r"group_size=5 does not divide the 12 inputs of layers\.3\.up_proj"):
        QuantizedWeight.from_float(torch.ones(2, 12), 4, group_size=5, name="layers.3.up_proj")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("symmetric", (False, True))
def test_fake_quantize_value(dtype, symmetric):
    x = random_rows(4, 12).to(dtype)
    result = fake_quantize(x, 4, symmetric, group_size=6)
    assert result.dtype == dtype
    assert torch.equal(result, roundtrip(x, 4, symmetric, 6).to(dtype))
    assert not torch.equal(result, x)


def test_fake_quantize_gradient_is_the_identity():
    x = random_rows(3, 8)
    x[1] = 0.3  # a constant row too
    x.requires_grad_()
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    fake_quantize(x, 2).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_weight_with_nan_or_inf_names_its_layer(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(LowBitError, match=r"model\.layers\.0\.mlp\.down_proj holds NaN or Inf"):
        QuantizedWeight.from_float(weight, 4, name="model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("group_size", (None, 11))
def test_quantized_weight_is_the_quantizer_packed(bits, symmetric, group_size):
    x = random_rows(5, 33)
    weight = QuantizedWeight.from_float(x, bits, symmetric, group_size)
    assert weight.packed_weight.shape[1] == len(oracles.pack_row([0] * 33, bits))
    scale, zero_point = choose_qparams(x, bits, symmetric, group_size)
    assert torch.equal(weight.codes(), quantize(x, scale, zero_point, bits))
    assert torch.equal(weight.dequantize(), roundtrip(x, bits, symmetric, group_size))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", (None, 4))
@pytest.mark.parametrize("size", (1, 2, 3, 6))
def test_shard_out_is_a_slice(bits, group_size, size):
    weight = QuantizedWeight.from_float(random_rows(6, 20), bits, group_size=group_size)
    shards = [weight.shard_out(rank, size) for rank in range(size)]
    assert all(shard.packed_weight.shape[0] == 6 // size and shard.in_features == 20 for shard in shards)
    assert torch.equal(torch.cat([shard.dequantize() for shard in shards]), weight.dequantize())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("features", "group_size", "size"),
    [
        (172, None, 4),  # 43 inputs each: the boundary splits a packed byte
        (172, 43, 4),  # and a group each
        (24, 3, 4),  # two odd groups each
        (6, None, 6),  # one input each
        (24, 24, 2),  # one group that spans the shards, like a scale per channel
        (20, None, 1),
    ],
)
def test_shard_in_is_a_slice(bits, features, group_size, size):
    weight = QuantizedWeight.from_float(random_rows(3, features), bits, group_size=group_size)
    whole, width = weight.dequantize(), features // size
    for rank in range(size):
        shard = weight.shard_in(rank, size)
        assert shard.in_features == width
        assert torch.equal(shard.dequantize(), whole[:, rank * width : (rank + 1) * width])


def test_one_rank_copies_no_weight():
    """An artifact's weights are pages of its file, which a copy would double."""
    weight = QuantizedWeight.from_float(random_rows(3, 24), 4)
    assert weight.shard_in(0, 1).packed_weight.data_ptr() == weight.packed_weight.data_ptr()


def test_shard_in_does_not_split_a_group():
    weight = QuantizedWeight.from_float(random_rows(3, 24), 4, group_size=8)
    with pytest.raises(LowBitError, match="3 weight groups do not divide among 2 ranks"):
        weight.shard_in(0, 2)
