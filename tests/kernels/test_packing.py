"""Dense packing of 2..8-bit codes against one big little-endian integer per row, and the fakes of all custom ops."""

import math

import numpy as np
import oracles
import pytest
import torch
from torch import library

from megatron_lowbit import kernels

BITS = range(2, 9)
# A run is 1, 2, 4 or 8 codes: lengths below, at, above and far from its multiples; 172 and 43 are a real MLP's shards.
LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 43, 172)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if codes.numel() > 1:  # both ends of the range are always there
        codes.view(-1)[0], codes.view(-1)[-1] = 2**bits - 1, 0
    return codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_match_the_oracle_and_round_trip(bits, length):
    codes = random_codes((3, length), bits)
    packed = kernels.pack_bits(codes, bits)
    expected = [oracles.pack_row(row, bits) for row in codes.tolist()]
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.tolist()] == expected
    assert packed.shape == (3, kernels.packed_bytes(length, bits))
    assert torch.equal(kernels.unpack_bits(packed, bits, length), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    assert torch.equal(kernels.unpack_bits(kernels.pack_bits(codes, bits), bits, 2**bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(9,), (0, 9), (1, 9), (2, 3, 9), (2, 0)])
def test_any_leading_dimensions(bits, shape):
    codes = random_codes(shape, bits)
    packed = kernels.pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], kernels.packed_bytes(shape[-1], bits))
    assert torch.equal(kernels.unpack_bits(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_non_contiguous_codes(bits):
    codes = random_codes((9, 4), bits).t()
    assert torch.equal(kernels.pack_bits(codes, bits), kernels.pack_bits(codes.contiguous(), bits))


def test_four_bits_low_nibble_first():
    assert kernels.pack_bits(torch.tensor([0x1, 0xA, 0xF], dtype=torch.uint8), 4).tolist() == [0xA1, 0x0F]


def test_six_bits_four_codes_in_three_bytes():
    # 000001 | 100010 << 6 | 000011 << 12 | 111111 << 18 = 0xFC3881, lowest byte first
    codes = torch.tensor([0b000001, 0b100010, 0b000011, 0b111111], dtype=torch.uint8)
    assert kernels.pack_bits(codes, 6).tolist() == [0x81, 0x38, 0xFC]


@pytest.mark.parametrize("bits", BITS)
def test_packed_bytes(bits):
    run = 8 // math.gcd(8, bits)  # the fewest codes that end on a byte
    for length in range(50):
        whole_runs = math.ceil(length / run)
        assert kernels.packed_bytes(length, bits) == whole_runs * run * bits / 8
    assert kernels.packed_bytes(101, 4) == 51 and kernels.packed_bytes(4, 6) == 3 and kernels.packed_bytes(5, 8) == 5


OPS = torch.ops.megatron_lowbit


def check_op(op, *args):
    """Schema, fake against real (shapes, strides, dtypes), and tracing with dynamic shapes."""
    result = library.opcheck(op.default, args, raise_exception=True)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bits", (3, 4, 6, 8))
@pytest.mark.parametrize("rows", (0, 1, 3))
def test_fake_of_pack_and_unpack(bits, rows):
    codes = random_codes((rows, 7), bits)
    check_op(OPS.pack_bits, codes, bits)
    check_op(OPS.unpack_bits, kernels.pack_bits(codes, bits), bits, 7)


@pytest.mark.parametrize(("tokens", "tiers"), [(3, [16, 2, 4, 7]), (0, [16, 2, 4, 7]), (1, [4, 9]), (2, [16, 9])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", (False, True))
def test_fakes_of_the_wire_format(tokens, tiers, dtype, per_token):
    scale, zero_point = torch.ones(2, 9), torch.full((2, 9), 8.0)
    x, format = torch.arange(tokens * 9, dtype=dtype).view(tokens, 9), (torch.arange(9), tiers, per_token)
    check_op(OPS.hybrid_pack, x, scale[0], zero_point[0], *format)
    messages = torch.stack([kernels.hybrid_pack(x, scale[r], zero_point[r], *format)[0] for r in range(2)])
    check_op(OPS.hybrid_unpack_reduce_into, messages, scale, zero_point, *format, torch.empty_like(x))
    second = scale[0], zero_point[0], torch.arange(9).flip(0), [8, 9], not per_token
    check_op(OPS.hybrid_unpack_reduce_requantize, messages, scale, zero_point, *format, *second)


@pytest.mark.parametrize("tokens", (0, 1, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_of_quant_linear(tokens, dtype):
    weight = (kernels.pack_bits(random_codes((5, 6), 4), 4), torch.ones(5, 1), torch.zeros(5, 1), 4)
    x = torch.from_numpy(np.arange(tokens * 6.0).reshape(tokens, 6)).to(dtype)
    check_op(OPS.quant_linear, x, *weight, 16, 1, dtype)
    check_op(OPS.quant_linear, x, *weight, 4, 2, dtype)
    check_op(OPS.quant_linear, x, *weight, 4, 2, dtype, 0.5, 0.75)
    check_op(OPS.quantize_tokens, x, 4, 2)
    check_op(OPS.quantize_tokens, x, 4, 2, 0.5, 0.75)
    check_op(OPS.round_tokens, x, 4, 2, 0.5, 0.75)
    check_op(OPS.encode_tokens, x, 4, 0.5, 0.75)
    check_op(OPS.decode_tokens, kernels.encode_tokens(x, 4), 4, 6, dtype)
    check_op(OPS.reassemble, x, torch.arange(6), torch.arange(6) % 4, torch.ones(6), 4, 1e-5)
