"""quant_linear on codes: the definition's bits, whatever the batch, the shard and the neighbours."""

import linear_oracle
import pytest
import torch
from torch import Tensor

from megatron_lowbit.kernels import dequantize, pack_bits, quant_linear, quantize_tokens
from megatron_lowbit.kernels.linear import round_to
from megatron_lowbit.kernels.packing import unpack_bits
from megatron_lowbit.quant.affine import choose_qparams, quantize

# (tokens, out, in, activation groups, weight group size)
SHAPES = [
    (1, 1, 2, 1, None),
    (5, 7, 88, 8, None),
    (3, 16, 96, 4, 12),
    (4, 6, 172, 4, None),
    (2, 3, 9000, 1, None),
    (3, 66, 120, 8, 40),  # groups of which neither holds the other
    (0, 3, 16, 1, None),
]
BITS = [(4, 4), (8, 4), (6, 6), (8, 8), (2, 2), (5, 3), (7, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(shape: tuple, weight_bits: int) -> tuple:
    """(x, packed, scale, zero_point, weight_bits): the arguments of quant_linear up to the activations' bits."""
    tokens, out, features, _, group_size = shape
    generator = torch.Generator().manual_seed(features + out)
    x = torch.randn(tokens, features, generator=generator) + 1  # a mean, so that zero points matter
    weight = torch.randn(out, features, generator=generator)
    scale, zero = choose_qparams(weight, weight_bits, group_size=group_size)
    return x, pack_bits(quantize(weight, scale, zero, weight_bits), weight_bits), scale, zero, weight_bits


def expected(args: tuple, act_bits: int, act_groups: int, dtype: torch.dtype) -> Tensor:
    x, packed, scale, zero, bits = args
    codes = unpack_bits(packed, bits, x.shape[1])
    return linear_oracle.quant_linear(x, codes, scale, zero, act_bits, act_groups, dtype)


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    view = {8: torch.int64, 4: torch.int32, 2: torch.int16}[actual.element_size()]
    same = (actual.view(view) == wanted.view(view)) | (actual.isnan() & wanted.isnan())
    assert same.all(), (actual[~same], wanted[~same])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_bits, weight_bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_the_definition(shape, act_bits, weight_bits, dtype):
    args = operands(shape, weight_bits)
    assert_same_bits(quant_linear(*args, act_bits, shape[3], dtype), expected(args, act_bits, shape[3], dtype))


AWKWARD = {
    "far from zero": lambda x: x * 1e-3 + 1e6,  # zero points of 5e8, which float32 does not multiply exactly
    "constant": lambda x: torch.full_like(x, 2.7),  # fractional zero points
    "zero": torch.zeros_like,
    "denormal": lambda x: x * 1e-40,
    "outliers": lambda x: x * torch.where(torch.arange(x.shape[1]) % 31 == 3, 1e4, 1.0),
    "one NaN": lambda x: x.index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(float("nan"))),
    "infinite": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(float("inf"))),
    "the whole range": lambda x: x * 1e38,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weight", (False, True))
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_values(kind, of_weight, dtype):
    """Activations, or a weight, of each kind: bit for bit, and NaN in no other token than its own."""
    shape = 4, 6, 172, 4, None
    x, packed, scale, zero, bits = operands(shape, 4)
    awkward = AWKWARD[kind]
    if of_weight:
        scale, zero = choose_qparams(awkward(dequantize(unpack_bits(packed, bits, 172), scale, zero)), bits)
    else:
        x = awkward(x)
    args = x, packed, scale, zero, bits
    y = quant_linear(*args, 8, 4, dtype)
    assert_same_bits(y, expected(args, 8, 4, dtype))
    if not of_weight:
        broken = y.isnan().all(1)
        assert broken.tolist() == x.isfinite().all(1).logical_not().tolist()


@pytest.mark.parametrize("tokens", (3, 16, 40))  # the CPU's ways for few, some and many
def test_products_that_float64_rounds(tokens):
    """Fused with the sum they are rounded once, and the definition rounds them twice: 16384 codes of 8 bits and zero
    points of 0 make brackets of 30 bits, and a scale just below 2^-7 has 24."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(tokens, 2 * 16384, generator=generator) * 0.38 + 1.52
    x[:, 0], x[:, 16384] = 0, 0  # the smallest of each group
    codes = torch.randint(200, 256, (80, x.shape[1]), dtype=torch.uint8, generator=generator)
    args = x, pack_bits(codes, 8), torch.ones(80, 1), torch.zeros(80, 1), 8
    assert_same_bits(quant_linear(*args, 8, 2, torch.float64), expected(args, 8, 2, torch.float64))


@pytest.mark.parametrize("group_size", (None, 40))
@pytest.mark.parametrize("tokens", (1, 5, 40))
def test_real_zero_points(tokens, group_size):
    """weights.zero_point=real: brackets are no whole numbers, and their products with scales are rounded."""
    x, packed, scale, zero, bits = operands((tokens, 70, 120, 3, group_size), 4)
    scale, zero = choose_qparams(dequantize(unpack_bits(packed, bits, 120), scale, zero), bits, real_zero=True)
    zero[::2] = zero[::2].round()  # beside whole ones
    args = x, packed, scale, zero, bits
    assert_same_bits(quant_linear(*args, 8, 3, torch.float64), expected(args, 8, 3, torch.float64))


def test_zero_is_zero():
    """Tokens of zeros, and weights of zeros, whose float corrections left 1e-14 in their place."""
    x, packed, scale, zero, bits = operands((4, 6, 172, 4, None), 4)
    x[1] = 0
    assert (quant_linear(x, packed, scale, zero, bits, 8, 4, torch.float64)[1] == 0).all()
    at_zero = pack_bits(zero.round().clamp(0, 15).to(torch.uint8).expand(6, 172).contiguous(), 4)
    assert (quant_linear(x, at_zero, scale, zero.round().clamp(0, 15), 4, 8, 4, torch.float64) == 0).all()


@pytest.mark.parametrize("act_bits", (4, 16))
@pytest.mark.parametrize("shape", SHAPES)
def test_neither_batch_nor_neighbours_change_a_bit(shape, act_bits):
    x, packed, scale, zero, bits = operands(shape, 4)
    groups = shape[3]
    whole = quant_linear(x, packed, scale, zero, bits, act_bits, groups, torch.float32)
    for token in range(len(x)):
        alone = quant_linear(x[token : token + 1], packed, scale, zero, bits, act_bits, groups, torch.float32)
        assert torch.equal(alone[0], whole[token])
    for row in range(len(packed)):
        rows = slice(row, row + 1)
        alone = quant_linear(x, packed[rows], scale[rows], zero[rows], bits, act_bits, groups, torch.float32)
        assert torch.equal(alone[:, 0], whole[:, row])


@pytest.mark.parametrize("act_bits", (4, 16))
def test_float64_partial_sums_add_up_to_the_whole(act_bits):
    """What a float32 model's ranks exchange: their float64 sum rounds to what one rank computes."""
    x, packed, scale, zero, bits = operands((64, 32, 96, 8, None), 4)
    whole = quant_linear(x, packed, scale, zero, bits, act_bits, 8, torch.float32)
    weight = unpack_bits(packed, bits, 96)
    for ranks in (2, 4, 8):
        total = torch.zeros(64, 32, dtype=torch.float64)
        for rank in range(ranks):
            mine = pack_bits(weight.chunk(ranks, 1)[rank].contiguous(), bits)
            slice_of_x = x.chunk(ranks, 1)[rank].contiguous()
            total += quant_linear(slice_of_x, mine, scale, zero, bits, act_bits, 8 // ranks, torch.float64)
        assert torch.equal(total.float(), whole)


@pytest.mark.parametrize("weight_bits", (2, 4, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_that_are_not_quantized(dtype, weight_bits):
    """Sums of float64 products; a backend's float32 sums of bf16 values err by an ulp of float32 per term."""
    x, packed, scale, zero, bits = operands((5, 7, 96, 1, 12), weight_bits)
    x = x.to(dtype)
    codes = unpack_bits(packed, bits, 96).double()
    wide = [t.double().repeat_interleave(12, 1) for t in (scale, zero)]
    terms = x.double().abs() @ ((codes + wide[1].abs()) * wide[0]).T
    y = quant_linear(x, packed, scale, zero, bits, 16, 1, torch.float64)
    ulp = 2.0**-24 if dtype == torch.bfloat16 else 2.0**-53
    assert ((y - x.double() @ ((codes - wide[1]) * wide[0]).T).abs() <= 2 * 96 * ulp * terms).all()


def test_a_constant_row_has_a_real_zero_point():
    x = torch.full((1, 8), 2.5)
    weight = torch.arange(16.0).view(2, 8)
    scale, zero = choose_qparams(weight, 8)
    packed = quantize(weight, scale, zero, 8)
    y = quant_linear(x, packed, scale, zero, 8, 4, 1, torch.float64)
    wanted = 2.5 * dequantize(packed, scale, zero).double().sum(1)[None]  # eight values that float32 has rounded
    torch.testing.assert_close(y, wanted, rtol=8 * 2.0**-24, atol=0)


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("bits", (2, 4, 6, 8))
def test_quantize_tokens(bits, groups):
    x = operands((5, 1, 172, 1, None), 4)[0]
    codes, scale, zero = quantize_tokens(x, bits, groups)
    wanted = linear_oracle.quantized_tokens(x.numpy(), bits, groups)
    assert (
        (codes.numpy() == wanted[0]).all() and (scale.numpy() == wanted[1]).all() and (zero.numpy() == wanted[2]).all()
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_clipped_constant_tokens(backend, monkeypatch):
    """Their zero points are not whole, and where little is left of a range, their codes are not 0."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", backend)
    x = torch.linspace(-40, 40, 161)[:, None].repeat(1, 24)
    for ratios in ((0.9, 0.9), (0.9, 0.8), (0.8, 0.9)):
        found = quantize_tokens(x, 4, 1, *ratios)
        wanted = linear_oracle.quantized_tokens(x.numpy(), 4, 1, ratios)
        assert all((mine.numpy() == theirs).all() for mine, theirs in zip(found, wanted, strict=True))
    assert quantize_tokens(x, 4, 1, 0.9, 0.9)[0].any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("groups", (1, 4))
def test_clipped_tokens(groups, backend, monkeypatch):
    """The two ends of every range multiplied in float32 before all else, by ratios that float32 does not hold exactly;
    ratios of 1 change no bit."""
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", backend)
    args = operands((6, 9, 172, groups, None), 4)
    x = args[0]
    plain = quantize_tokens(x, 4, groups)
    assert all(map(torch.equal, plain, quantize_tokens(x, 4, groups, 1.0, 1.0)))
    for ratios in ((0.9, 0.7), (1.0, 0.123), (1e-9, 1.0)):
        found = quantize_tokens(x, 4, groups, *ratios)
        wanted = linear_oracle.quantized_tokens(x.numpy(), 4, groups, ratios)
        assert all((mine.numpy() == theirs).all() for mine, theirs in zip(found, wanted, strict=True))
        assert not torch.equal(found[0], plain[0])
        packed, scale, zero, bits = args[1:]
        codes = unpack_bits(packed, bits, x.shape[1])
        for dtype in DTYPES:
            y = quant_linear(*args, 4, groups, dtype, *ratios)
            assert_same_bits(y, linear_oracle.quant_linear(x, codes, scale, zero, 4, groups, dtype, *ratios))


def test_one_rounding():
    """1 + 2^-8 + 2^-40 lies above the tie of bf16, and float32 would round it to the tie first."""
    y = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, -1 - 2.0**-8 - 2.0**-40], dtype=torch.float64)
    above = 1 + 2.0**-7
    assert round_to(y, torch.bfloat16).tolist() == [above, 1.0, -above]
    many = torch.randn(10000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert_same_bits(round_to(many, dtype), linear_oracle.rounded(many.numpy(), dtype))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_bits": 1}, "weight_bits=1 is not in 2..8"),
        ({"weight_bits": 16}, "weight_bits=16 is not in 2..8"),
        ({"act_bits": 9}, "act_bits=9 is not in 2..8 or 16"),
        ({"act_groups": 3}, "3 activation groups do not divide 88 inputs"),
        ({"low_ratio": 0.0}, "ratios 0.0 and 1.0 of a range are not above 0 and at most 1"),
        ({"high_ratio": 1.5}, "ratios 1.0 and 1.5 of a range"),
        ({"act_groups": 0}, "0 activation groups do not divide 88 inputs"),
        ({"scale": torch.ones(7, 3), "zero_point": torch.ones(7, 3)}, "3 weight groups do not divide 88 inputs"),
        ({"zero_point": torch.ones(7, 2)}, r"\[5, 88\], \[7, 1\], \[7, 2\] are not"),
        ({"x": torch.ones(5, 87)}, r"not uint8 \[7, 44\]|groups do not divide 87"),
        ({"packed_weight": torch.zeros(7, 43, dtype=torch.uint8)}, r"uint8 \[7, 43\] is not uint8 \[7, 44\]"),
        ({"packed_weight": torch.zeros(100, dtype=torch.uint8)}, "panels of 100 bytes are not those of a weight"),
        ({"packed_weight": torch.zeros(7, 44)}, "torch.float32 .* is not uint8"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, backend, monkeypatch):
    if backend == "reference" and "panels" in message:
        pytest.skip("the reference has no panels")
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", backend)
    names = ("x", "packed_weight", "scale", "zero_point", "weight_bits")
    arguments = dict(zip(names, operands((5, 7, 88, 8, None), 4), strict=True)) | {"act_bits": 8, "act_groups": 8}
    with pytest.raises(ValueError, match=message):
        quant_linear(**(arguments | change), dtype=torch.float32)
