"""quant_linear on codes: exact, so that neither the batch nor the rows beside a row change a result."""

import pytest
import torch
from torch import Tensor

from megatron_lowbit.kernels import dequantize, pack_bits, quant_linear
from megatron_lowbit.kernels.packing import unpack_bits
from megatron_lowbit.quant.affine import choose_qparams, quantize

# (tokens, out, in, activation groups, weight group size)
SHAPES = [(1, 1, 2, 1, None), (5, 7, 88, 8, None), (3, 16, 96, 4, 12), (4, 6, 172, 4, None), (2, 3, 9000, 1, None)]
BITS = [(4, 4), (8, 4), (6, 6), (8, 8)]


def operands(shape: tuple, act_bits: int, weight_bits: int) -> tuple:
    tokens, out, features, groups, group_size = shape
    generator = torch.Generator().manual_seed(features + out)
    x = torch.randn(tokens, features, generator=generator) + 1  # a mean, so that zero points matter
    weight = torch.randn(out, features, generator=generator)
    x_scale, x_zero = choose_qparams(x, act_bits, group_size=features // groups)
    scale, zero = choose_qparams(weight, weight_bits, group_size=group_size)
    packed = pack_bits(quantize(weight, scale, zero, weight_bits), weight_bits)
    return quantize(x, x_scale, x_zero, act_bits), x_scale, x_zero, packed, scale, zero, weight_bits


def by_hand(codes: Tensor, x_scale: Tensor, x_zero: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int):
    """The same product of dequantized values in float64, one (s, S) pair per channel."""
    w = unpack_bits(packed, bits, codes.shape[1]).double()
    x = codes.double()
    wide = [t.double().repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (x_scale, x_zero, scale, zero)]
    return ((x - wide[1]) * wide[0]) @ ((w - wide[3]) * wide[2]).T


@pytest.mark.parametrize("act_bits, weight_bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, act_bits, weight_bits):
    """Whole numbers are exact; what is left is float64's rounding of four terms that may cancel."""
    args = operands(shape, act_bits, weight_bits)
    y, expected = quant_linear(*args, torch.float64), by_hand(*args)
    largest = args[1].max() * args[4].max() * 255 * 255 * shape[2]
    assert (y - expected).abs().max() <= 2.0**-50 * largest
    assert quant_linear(*args, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_batch_nor_neighbours_change_a_bit(shape):
    codes, x_scale, x_zero, packed, scale, zero, bits = operands(shape, 4, 4)
    whole = quant_linear(codes, x_scale, x_zero, packed, scale, zero, bits, torch.float32)
    for token in range(len(codes)):
        rows = slice(token, token + 1)
        alone = quant_linear(codes[rows], x_scale[rows], x_zero[rows], packed, scale, zero, bits, torch.float32)
        assert torch.equal(alone[0], whole[token])
    for row in range(len(packed)):
        rows = slice(row, row + 1)
        alone = quant_linear(codes, x_scale, x_zero, packed[rows], scale[rows], zero[rows], bits, torch.float32)
        assert torch.equal(alone[:, 0], whole[:, row])


def test_float64_partial_sums_add_up_to_the_whole():
    """What a float32 model's ranks exchange: their float64 sum rounds to what one rank computes."""
    codes, x_scale, x_zero, packed, scale, zero, bits = operands((64, 32, 96, 8, None), 4, 4)
    whole = quant_linear(codes, x_scale, x_zero, packed, scale, zero, bits, torch.float32)
    weight = unpack_bits(packed, bits, 96)
    for ranks in (2, 4, 8):
        total = torch.zeros(64, 32, dtype=torch.float64)
        for rank in range(ranks):
            mine = pack_bits(weight.chunk(ranks, 1)[rank].contiguous(), bits)
            x = [t.chunk(ranks, 1)[rank].contiguous() for t in (codes, x_scale, x_zero)]
            total += quant_linear(*x, mine, scale, zero, bits, torch.float64)
        assert torch.equal(total.float(), whole)


def test_a_constant_row_has_a_real_zero_point():
    x = torch.full((1, 8), 2.5)
    x_scale, x_zero = choose_qparams(x, 4)
    weight = torch.arange(16.0).view(2, 8)
    scale, zero = choose_qparams(weight, 8)
    packed = quantize(weight, scale, zero, 8)
    codes = quantize(x, x_scale, x_zero, 4)
    y = quant_linear(codes, x_scale, x_zero, packed, scale, zero, 8, torch.float64)
    expected = 2.5 * dequantize(packed, scale, zero).double().sum(1)[None]  # eight values that float32 has rounded
    torch.testing.assert_close(y, expected, rtol=8 * 2.0**-24, atol=0)
