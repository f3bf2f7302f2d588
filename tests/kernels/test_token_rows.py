"""Tokens as rows of bytes, and rounded at once: the C++ kernels and the reference against independent quantizers."""

from __future__ import annotations

import linear_oracle
import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from megatron_lowbit.kernels import decode_tokens, encode_tokens, pack_bits, packed_bytes, round_tokens, token_rows
from megatron_lowbit.quant.affine import fake_quantize

F32 = torch.float32


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request, monkeypatch) -> None:
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, bits: int) -> Tensor:
    """Per row of the last dimension, by the independent float64 quantizer."""
    rows = x.double().numpy()
    scale, zero = oracles.qparams(rows.min(-1, keepdims=True), rows.max(-1, keepdims=True), bits)
    return torch.from_numpy((oracles.quantize(rows, scale, zero, bits) - zero) * scale)


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.9, 0.75)])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", (1, 8, 11, 64, 80, 200))
def test_rows_and_what_they_stand_for(bits, width, ratios):
    """The bytes of the oracle's codes, scale and zero point; decoded, (code - zero point) * scale in float32."""
    x = 3 * normal(10, width, seed=bits) + 1
    codes, scale, zero = (torch.from_numpy(t) for t in linear_oracle.quantized_tokens(x.numpy(), bits, 1, ratios))
    rows = encode_tokens(x, bits, *ratios)
    assert rows.dtype == torch.uint8 and rows.shape == (10, packed_bytes(width, bits) + 8)
    assert torch.equal(rows[:, :-8], pack_bits(codes.to(torch.uint8), bits))
    assert torch.equal(rows[:, -8:].clone().view(F32), torch.cat([scale, zero], 1))
    wanted = (codes.float() - zero) * scale
    for dtype in (F32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(decode_tokens(rows, bits, width, dtype), wanted.to(dtype))
    assert torch.equal(round_tokens(x, bits, 1, *ratios), wanted)
    if width > 1 and ratios == (1, 1):
        # Half a step off, and half a step more where the rounded zero point cuts an end off; eq. 2's own numbers.
        step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
        assert ((wanted - x).abs() <= 1.001 * step).all()
        torch.testing.assert_close(wanted.double(), rounded(x, bits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", (1, 3))
def test_rounded_in_groups(groups, dtype):
    """Each slice by its own range, in float32 whatever the dtype."""
    x = normal(4, 5, 72).to(dtype)
    codes, scale, zero = linear_oracle.quantized_tokens(x.float().view(-1, 72).numpy(), 4, groups)
    wanted = (codes.astype(np.float32).reshape(20, groups, -1) - zero[:, :, None]) * scale[:, :, None]
    assert torch.equal(round_tokens(x, 4, groups), torch.from_numpy(wanted).view(4, 5, 72).to(dtype))


def test_views():
    """Transposed heads, as attention modules make them; values that lie apart; a cache whose room is not all used."""
    x = normal(2, 5, 4, 16, seed=3)
    view, apart = x.transpose(1, 2), x.transpose(-1, -2).contiguous().transpose(-1, -2)
    rows = encode_tokens(view, 4)
    assert torch.equal(rows, encode_tokens(view.contiguous(), 4)) and torch.equal(
        rows.transpose(1, 2), encode_tokens(apart, 4)
    )
    assert torch.equal(round_tokens(apart, 4, 2), round_tokens(x, 4, 2))
    room = torch.zeros((2, 4, 9, rows.shape[-1]), dtype=torch.uint8)
    room[..., :5, :] = rows
    wanted = decode_tokens(rows, 4, 16, F32)
    assert torch.equal(decode_tokens(room[..., :5, :], 4, 16, F32), wanted)
    assert torch.equal(decode_tokens(rows.transpose(0, 1), 4, 16, F32), wanted.transpose(0, 1))
    assert torch.equal(decode_tokens(rows[0, 0, 0], 4, 16, F32), wanted[0, 0, 0])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(encode_tokens(view.to(dtype), 4), encode_tokens(view.to(dtype).float(), 4))


def test_nothing():
    """No tokens: rows of the right width, to which others can be appended."""
    rows = encode_tokens(normal(2, 4, 0, 11), 3)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 4, 0, packed_bytes(11, 3) + 8)
    x = normal(2, 4, 3, 11)
    assert torch.equal(torch.cat([rows, encode_tokens(x, 3)], -2), encode_tokens(x, 3))
    assert decode_tokens(rows, 3, 11, F32).shape == (2, 4, 0, 11) and round_tokens(x[:, :, :0], 3, 1).shape == (
        2,
        4,
        0,
        11,
    )


def test_constant_rows_and_nan():
    """Equal values come back exactly, zero among them; a row with NaN or Inf stays NaN and says so to no other."""
    x = torch.tensor([[0.0], [0.6], [-2.7], [1e-40]]).repeat(1, 24)
    assert torch.equal(decode_tokens(encode_tokens(x, 4), 4, 24, F32), x) and torch.equal(round_tokens(x, 4, 2), x)
    for bad in (torch.nan, torch.inf):
        x = normal(3, 24, seed=4)
        x[1, 2] = bad
        for found in (decode_tokens(encode_tokens(x, 4), 4, 24, F32), round_tokens(x, 4, 1)):
            assert found[1].isnan().all() and torch.equal(found[::2], fake_quantize(x[::2], 4))
        assert round_tokens(x, 4, 2)[1, :12].isnan().all() and not round_tokens(x, 4, 2)[1, 12:].isnan().any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: encode_tokens(x, 9), "num_bits=9 is not in 2..8"),
        (lambda x: encode_tokens(x, 4, 0.0), "ratios 0.0 and 1.0"),
        (lambda x: round_tokens(x, 4, 3), "3 groups do not divide"),
        (lambda x: round_tokens(x, 1, 1), "num_bits=1 is not in 2..8"),
        (lambda x: decode_tokens(encode_tokens(x, 4), 4, 9, F32), r"are not uint8 \[..., 13\]"),
        (lambda x: decode_tokens(x, 4, 8, F32), "rows torch.float32"),
        (lambda x: decode_tokens(encode_tokens(x, 4), 9, 8, F32), "num_bits=9 is not in 2..8"),
    ],
)
def test_arguments_that_do_not_fit(call, says):
    with pytest.raises(ValueError, match=says):
        call(normal(2, 8))


def test_a_gradient_goes_straight_through():
    """What is asked for a gradient does not run the op, which has none."""
    x = normal(3, 8).requires_grad_()
    y = fake_quantize(x, 4)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8)) and torch.equal(y.detach(), fake_quantize(x.detach(), 4))
    assert token_rows.row_bytes(8, 4) == 12
