"""Quantized linears against exact integer arithmetic on their codes: every scheme, at every tensor-parallel size."""

import numpy as np
import oracles
import pytest
import torch

from megatron_lowbit import kernels
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.layers import linear
from megatron_lowbit.layers.linear import QuantLinear, QuantRowParallelLinear, activation_groups
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight, Scheme, choose_qparams, quantize

SCHEMES = ("W4A16", "W4A8", "W4A4", "W6A6", "W8A8")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integer_sums(x_minus_zero: np.ndarray, weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """(float64 x W^T, its terms' magnitudes summed), from exact sums of (code - zero point) over every weight group.

    x_minus_zero: int64 codes less their zero point, or float64 activations; [tokens, in].
    """
    groups = weight.scale.shape[1]
    codes = weight.codes().numpy().astype(np.int64).reshape(-1, groups, weight.in_features // groups)
    codes = codes - weight.zero_point.numpy().astype(np.int64)[..., None]
    x = x_minus_zero.reshape(len(x_minus_zero), groups, -1)
    scale = weight.scale.double().numpy()
    total = np.einsum("tgi,ogi->tog", x, codes)
    magnitude = np.einsum("tgi,ogi->tog", abs(x), abs(codes))
    return (total * scale).sum(-1), (magnitude * scale).sum(-1)


def oracle(x: torch.Tensor, weight: QuantizedWeight, act_bits: int, act_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(exact y, its terms' magnitudes summed); the activation slices are added up in float64."""
    assert (weight.zero_point == weight.zero_point.round()).all()
    if act_bits == 16:
        return integer_sums(x.double().numpy(), weight)
    scale, zero_point = choose_qparams(x, act_bits, group_size=x.shape[1] // act_groups)
    codes = quantize(x, scale, zero_point, act_bits)
    y = magnitude = 0.0
    for group, columns in enumerate(np.split(np.arange(x.shape[1]), act_groups)):
        shifted = np.zeros(x.shape, np.int64)
        zero = zero_point[:, group].numpy().astype(np.int64)
        shifted[:, columns] = codes[:, columns].numpy().astype(np.int64) - zero[:, None]
        part, part_magnitude = integer_sums(shifted, weight)
        act_scale = scale[:, group].double().numpy()[:, None]
        y, magnitude = y + part * act_scale, magnitude + part_magnitude * act_scale
    return y, magnitude


def float32_bound(in_features: int, magnitude: np.ndarray) -> np.ndarray:
    """A product for each of x^ and w^, their product, and `in_features` additions, in any order."""
    return (in_features + 4) * oracles.EPS32 * magnitude


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", (None, 11))
@pytest.mark.parametrize("act_groups", (1, 3))
@pytest.mark.parametrize("tokens", (1, 5))
def test_column_parallel(scheme, group_size, act_groups, tokens):
    bits = Scheme.parse(scheme)
    weight = QuantizedWeight.from_float(normal(7, 33), bits.weight_bits, group_size=group_size)
    bias, x = normal(7, seed=1), normal(tokens, 33, seed=2)
    y = QuantLinear(weight, bias, bits.act_bits, act_groups)(x)
    exact, magnitude = oracle(x, weight, bits.act_bits, act_groups)
    bias64 = bias.double().numpy()
    error = abs(y.double().numpy() - (exact + bias64))
    assert (error <= float32_bound(33, magnitude + abs(bias64))).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_dimensions_and_no_tokens(scheme):
    bits = Scheme.parse(scheme)
    module = QuantLinear(QuantizedWeight.from_float(normal(3, 8), bits.weight_bits), None, bits.act_bits)
    x = normal(2, 5, 8)
    y = module(x)
    assert y.shape == (2, 5, 3)
    # One token at a time: activations have a scale per token. float32 sums may be taken in another order.
    alone = torch.stack([module(token.unsqueeze(0))[0] for token in x.view(10, 8)]).view(2, 5, 3)
    torch.testing.assert_close(y, alone, rtol=0, atol=10 * oracles.EPS32 * 8 * x.abs().max().item())
    assert module(x[:, :0]).shape == (2, 0, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_activations(scheme):
    """Dequantized codes are multiplied in float32, activations of a weight-only scheme in bf16; the output is bf16."""
    bits = Scheme.parse(scheme)
    weight = QuantizedWeight.from_float(normal(7, 32), bits.weight_bits)
    x = normal(5, 32, seed=2).bfloat16()
    y = QuantLinear(weight, None, bits.act_bits)(x)
    assert y.dtype == torch.bfloat16
    exact, magnitude = oracle(x.float(), weight, bits.act_bits, 1)
    bound = float32_bound(32, magnitude)
    if bits.act_bits == 16:  # the dequantized weight is rounded to bf16 before it is multiplied
        bound = bound + oracles.EPS16 * magnitude
    assert (abs(y.double().numpy() - exact) <= bound + oracles.EPS16 * (abs(exact) + bound)).all()


def test_quant_linear_by_hand():
    """x = [7, -8], [15, 0], steps of 1 in 4 bits; W = [[2, -1], [0, 3]]."""
    packed = torch.tensor([[3 | 0 << 4], [1 | 4 << 4]], dtype=torch.uint8)  # low nibble first, zero point 1
    one = torch.ones(2, 1)
    x = torch.tensor([[7.0, -8.0], [15.0, 0.0]])
    for act_bits in (4, 16):
        y = kernels.quant_linear(x, packed, one, one, 4, act_bits, 1, torch.float32)
        assert y.tolist() == [[22.0, -24.0], [30.0, 0.0]]


@pytest.mark.parametrize("branch", [False, True])
def test_a_rotated_input_is_rotated_for_all_that_reads_it(branch):
    """The result, the low-rank branch and the gradient are those of the same linear behind the rotation itself."""
    weight = QuantizedWeight.from_float(normal(24, 88), 4)
    low_rank = LowRank(normal(3, 88, seed=1).bfloat16(), normal(24, 3, seed=2).bfloat16()) if branch else None
    rotated, plain = (QuantLinear(weight, None, 8, 2, low_rank=low_rank, rotated=rotated) for rotated in (True, False))
    results, gradients = [], []
    for run in (rotated, lambda x: plain(kernels.hadamard(x, 2))):
        x = normal(5, 88, seed=3).requires_grad_()
        with torch.no_grad():
            results.append(run(x))
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*results) and not torch.equal(results[0], plain(normal(5, 88, seed=3)))
    assert gradients[0] is not None and torch.equal(*gradients) and gradients[0].any()


def row_parallel_shards(weight: QuantizedWeight, act_bits: int, shard_groups: int, size: int) -> list:
    groups = activation_groups(weight.in_features, shard_groups)
    return [QuantLinear(weight.shard_in(r, size), None, act_bits, groups // size) for r in range(size)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("in_features", (64, 172))  # 172 at tp 4: 43 inputs each, which splits a packed byte
def test_row_parallel_agrees_at_every_size(scheme, in_features, monkeypatch):
    """The same activation codes, and the same sum within float32, at tp 1, 2 and 4."""
    bits = Scheme.parse(scheme)
    weight = QuantizedWeight.from_float(normal(5, in_features), bits.weight_bits)
    x = normal(3, in_features, seed=2) * torch.logspace(-1, 1, in_features)  # slices of the input differ in range
    exact, magnitude = oracle(x, weight, bits.act_bits, activation_groups(in_features, 8))
    seen: list[torch.Tensor] = []

    def record(x, *args):
        seen.append(kernels.quantize_tokens(x, *args[4:6])[0] if bits.act_bits < 16 else x)
        return kernels.quant_linear(x, *args)

    monkeypatch.setattr(linear, "quant_linear", record)
    for size in (1, 2, 4):
        seen.clear()
        shards = row_parallel_shards(weight, bits.act_bits, 8, size)
        partials = [shard(x_r) for shard, x_r in zip(shards, x.chunk(size, 1), strict=True)]
        total = sum(partial.double().numpy() for partial in partials)
        assert (abs(total - exact) <= float32_bound(in_features, magnitude)).all()
        codes = torch.cat(seen, 1)
        if size == 1:
            expected = codes
        assert codes.dtype == (torch.uint8 if bits.act_bits < 16 else torch.float32)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("scheme", ("W4A16", "W4A8"))
def test_row_parallel_alone_adds_its_bias(scheme):
    bits = Scheme.parse(scheme)
    weight = QuantizedWeight.from_float(normal(5, 24), bits.weight_bits)
    bias, x = normal(5, seed=1), normal(2, 3, 24, seed=2)
    shard = QuantLinear(weight, None, bits.act_bits, 8)
    y = QuantRowParallelLinear([shard], None, bias)(x)
    exact, magnitude = oracle(x.view(6, 24), weight, bits.act_bits, 8)
    bias64 = bias.double().numpy()
    error = abs(y.view(6, 5).double().numpy() - (exact + bias64))
    assert (error <= float32_bound(24, magnitude + abs(bias64))).all()


def test_row_parallel_sums_virtual_ranks_before_its_bias():
    """bf16 partial sums, added up, rounded to bf16; then the bias, which must not be added once per rank."""
    weight = QuantizedWeight.from_float(normal(5, 24), 4)
    bias, x = normal(5, seed=1), normal(3, 24, seed=2)
    shards = row_parallel_shards(weight, 8, 8, 2)
    y = QuantRowParallelLinear(shards, VirtualReducer(None), bias)(x)
    partials = [shard(x_r).numpy() for shard, x_r in zip(shards, x.chunk(2, 1), strict=True)]
    rounded = [oracles.bf16_round(partial).astype(np.float32) for partial in partials]
    total = oracles.bf16_round(rounded[0] + rounded[1]).astype(np.float32) + bias.numpy()
    assert np.array_equal(y.numpy(), total)


@pytest.mark.parametrize(
    ("in_features", "shard_groups", "expected"),
    [(64, 8, 8), (172, 8, 4), (6, 8, 2), (43, 8, 1), (1, 8, 1), (12, 6, 6), (9, 6, 3), (8, 3, 1), (7, 1, 1)],
)
def test_activation_groups(in_features, shard_groups, expected):
    assert activation_groups(in_features, shard_groups) == expected
