"""GPTQ: the codes of a plain loop that updates the inverse Hessian itself, without factors or blocks."""

from __future__ import annotations

import pytest
import torch
from slow_cases import slow
from torch import Tensor

from megatron_lowbit.quant.affine import choose_qparams, dequantize, quantize
from megatron_lowbit.quant.gptq import BLOCK, InverseFactor, gptq_codes


def inputs_of(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs, so that one channel can make up for another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    sizes = torch.rand(features, generator=generator, dtype=torch.float64) + 0.1
    return (torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing + 0.3) * sizes


def weight_of(outputs: int, features: int) -> Tensor:
    return torch.randn(outputs, features, generator=torch.Generator().manual_seed(1))


def by_hand(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order (arXiv 2210.17323, eq. 2 and 3): round a channel, move the others by
    what the inverse Hessian says, and take the channel out of the inverse by one step of Gaussian elimination."""
    count = weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    for j in sorted(range(count), key=lambda channel: -hessian[channel, channel].item()):
        g = j * scale.shape[1] // count
        s, z = scale[:, g].double(), zero[:, g].double()
        code = torch.round(left[:, j] / s + z).clamp(0, 2**bits - 1)
        error = (left[:, j] - (code - z) * s) / inverse[j, j]
        left -= error[:, None] * inverse[j][None]
        inverse -= inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j].item()
        inverse[j, :] = inverse[:, j] = 0  # exactly: what was rounded stays
        codes[:, j] = code.to(torch.uint8)
    return codes


def output_error(weight: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor], x: Tensor) -> float:
    return (x @ (dequantize(codes, *qparams).double() - weight.double()).T).square().sum().item()


@pytest.mark.parametrize(
    ("bits", "groups", "zero"), [(4, 1, "integer"), (3, 4, "real"), (2, 1, "symmetric"), slow(8, 4, "symmetric")]
)
def test_codes_of_the_plain_loop(bits, groups, zero):
    """More than two blocks, the last one short. Both are float64, so only a tie could tell them apart."""
    features = 2 * BLOCK + 64
    weight, x = weight_of(12, features), inputs_of(500, features)
    hessian = x.T @ x
    qparams = choose_qparams(weight, bits, zero == "symmetric", features // groups, real_zero=zero == "real")
    assert torch.equal(qparams[1], qparams[1].round()) == (zero != "real")
    codes = gptq_codes(weight, *qparams, bits, InverseFactor.of(hessian))
    assert codes.dtype == torch.uint8 and codes.is_contiguous()
    assert torch.equal(codes, by_hand(weight, *qparams, bits, hessian))
    nearest = quantize(weight, *qparams, bits)
    assert not torch.equal(codes, nearest)
    assert output_error(weight, codes, qparams, x) < 0.9 * output_error(weight, nearest, qparams, x)


def test_rows_are_rounded_by_themselves():
    weight, x = weight_of(6, 40), inputs_of(100, 40)
    factor, qparams = InverseFactor.of(x.T @ x), choose_qparams(weight, 4)
    whole = gptq_codes(weight, *qparams, 4, factor)
    rows = [gptq_codes(weight[i : i + 1], *(q[i : i + 1] for q in qparams), 4, factor) for i in range(6)]
    assert torch.equal(whole, torch.cat(rows))


def test_uncorrelated_inputs_leave_nearest():
    """A diagonal Hessian: no channel can make up for another, whatever their sizes."""
    weight, qparams = weight_of(5, 30), choose_qparams(weight_of(5, 30), 4)
    factor = InverseFactor.of(torch.diag(torch.arange(1.0, 31, dtype=torch.float64)))
    assert torch.equal(gptq_codes(weight, *qparams, 4, factor), quantize(weight, *qparams, 4))


def test_channels_without_input():
    """They are rounded to nearest, and change nothing of the others; where no channel has input, all are."""
    weight, x = weight_of(7, 32), inputs_of(80, 32)
    dead = torch.arange(32) % 3 == 0
    x[:, dead] = 0
    qparams = choose_qparams(weight, 4)
    nearest = quantize(weight, *qparams, 4)
    codes = gptq_codes(weight, *qparams, 4, InverseFactor.of(x.T @ x))
    assert torch.equal(codes[:, dead], nearest[:, dead]) and not torch.equal(codes, nearest)
    codes = gptq_codes(weight, *qparams, 4, InverseFactor.of(torch.zeros(32, 32, dtype=torch.float64)))
    assert torch.equal(codes, nearest)


@pytest.mark.parametrize("tokens", (1, 5))
def test_singular_hessians(tokens):
    """Fewer tokens than channels: the damping makes the factor exist, and the error falls."""
    weight, x = weight_of(10, 64), inputs_of(tokens, 64)
    qparams = choose_qparams(weight, 4)
    factor = InverseFactor.of(x.T @ x)
    assert torch.isfinite(factor.upper).all()
    codes = gptq_codes(weight, *qparams, 4, factor)
    nearest = quantize(weight, *qparams, 4)
    assert output_error(weight, codes, qparams, x) < 0.5 * output_error(weight, nearest, qparams, x)


def test_a_constant_channel_stays_exact():
    weight = weight_of(3, 16)
    weight[1] = 0.37
    x, qparams = inputs_of(50, 16), choose_qparams(weight, 4)
    codes = gptq_codes(weight, *qparams, 4, InverseFactor.of(x.T @ x))
    assert torch.equal(dequantize(codes, *qparams)[1], weight[1])
