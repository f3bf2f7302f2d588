"""Random products, rotations and token rows of the C++ kernels against the oracle, bit for bit:

    python linear_fuzz.py CALLS SEED [FLAG ...]

FLAGs are of the compiler, such as -fsanitize=address,undefined; the sanitizer then has to be in $LD_PRELOAD. One of the
form source=FILE names another linear.cpp.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import linear_oracle
import torch
from kernel_inputs import DTYPES, assert_same_bits
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.kernels import build, linear, panels
from megatron_lowbit.kernels.hadamard import hadamard_reference
from megatron_lowbit.kernels.token_rows import (
    decode_tokens_reference,
    encode_tokens_reference,
    round_tokens_reference,
)

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e38, -6e4, 1e-40, 5e-324]


def activations(tokens: int, inputs: int, dtype: torch.dtype, chance: random.Random) -> Tensor:
    """Gaussian, far from zero, with outliers, constant or denormal; with NaN and Inf here and there."""
    x = torch.randn(tokens, inputs)
    kind = chance.choice(["plain", "plain", "far", "outliers", "constant", "denormal", "wide"])
    if kind == "far":
        x = x * 10.0 ** chance.randint(-4, 1) + 10.0 ** chance.randint(0, 6)
    elif kind == "outliers":
        x[:, :: chance.randint(3, 40)] *= 1e4
    elif kind == "constant":
        x = x[:, :1].expand(tokens, inputs) if tokens else x
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "wide":
        x = x * 10.0 ** torch.randint(-30, 30, (tokens, 1))
    x = x.to(dtype).clone()
    for _ in range(chance.choice([0, 0, 0, 1, 5]) if x.numel() else 0):
        x.view(-1)[chance.randrange(x.numel())] = chance.choice(SPECIAL)
    if chance.random() < 0.2:
        wide = torch.full((tokens, inputs + chance.randint(1, 9)), torch.nan, dtype=dtype)
        wide[:, :inputs] = x
        return wide[:, :inputs]
    return x


def call(chance: random.Random) -> str:
    torch.manual_seed(chance.randrange(2**31))
    return chance.choices([product, rotation, token_rows], [8, 1, 1])[0](chance)


def token_rows(chance: random.Random) -> str:
    """Rows of bytes, and what they are decoded to, from a cache with room left; rounded in groups at once."""
    groups, bits, dtype = chance.choice([1, 1, 2, 8]), chance.randint(2, 8), chance.choice(DTYPES)
    tokens, width = chance.choice([1, 2, 5, 33, 300]), groups * chance.choice([1, 3, 8, 16, 63, 64, 65, 80, 128])
    x = activations(tokens, width, dtype, chance)
    ratios = chance.choice([(), (), (0.9, 0.75), (0.9, 0.9), (1.0, 2.0**-20)])
    room = torch.full((tokens + 3, kernels.packed_bytes(width, bits) + 8), 255, dtype=torch.uint8)
    room[:tokens] = rows = kernels.encode_tokens(x, bits, *ratios)
    wanted = encode_tokens_reference(x, bits, *ratios)
    assert torch.equal(rows[:, :-8], wanted[:, :-8])
    mine, theirs = (t[:, -8:].reshape(-1).clone().view(torch.float32).nan_to_num() for t in (rows, wanted))
    assert torch.equal(mine, theirs)  # whatever the sign of a zero
    decoded = kernels.decode_tokens(room[:tokens], bits, width, dtype)
    assert_same_bits(decoded, decode_tokens_reference(rows, bits, width, dtype))
    assert_same_bits(kernels.round_tokens(x, bits, groups, *ratios), round_tokens_reference(x, bits, groups, *ratios))
    return "token rows"


def rotation(chance: random.Random) -> str:
    """Odd factors below, at and above a register's lanes; few and many rows of them; with all that is awkward."""
    n = chance.choice([1, 3, 5, 7, 8, 9, 11, 15, 16, 17, 31, 33, 43, 64, 171]) << chance.randint(0, 5)
    groups, tokens = chance.choice([1, 2, 3]), chance.choice([0, 1, 2, 5, 33])
    x = activations(tokens, n * groups, chance.choice(DTYPES), chance)
    assert_same_bits(kernels.hadamard(x, groups), hadamard_reference(x, groups))
    return "rotation"


def product(chance: random.Random) -> str:
    act_groups, weight_groups = chance.choice([1, 1, 2, 4, 8]), chance.choice([1, 1, 1, 2, 3, 4])
    blocks = act_groups * weight_groups  # a multiple of the least that they have in common
    inputs = (
        blocks * chance.choice([1, 2, 3, 15, 16, 17, 43, 64, 65, 130])
        if blocks < 9
        else blocks * chance.choice([1, 5, 16])
    )
    if blocks == 1 and chance.random() < 0.1:  # tokens that tile registers take in parts
        inputs = chance.choice([2061, 4173, 8208])
    tokens = chance.choice([0, 1, 1, 2, 3, 4, 5, 6, 12, 13, 16, 17, 32, 33, 47])
    outputs = chance.choice([1, 3, 15, 16, 17, 63, 64, 65, 130])
    weight_bits, act_bits = chance.randint(2, 8), chance.choice([2, 3, 4, 5, 6, 7, 8, 8, 4, 16])
    dtype, out = chance.choice(DTYPES), chance.choice(DTYPES)
    x = activations(tokens, inputs, dtype, chance)
    least = chance.choice([0, 0, 0, 2**weight_bits - 1])  # all at their largest: what saturates would show
    codes = torch.randint(least, 2**weight_bits, (outputs, inputs), dtype=torch.uint8)
    scale = torch.rand(outputs, weight_groups) * 10.0 ** chance.randint(-3, 3)
    zero = torch.randint(0, 2**weight_bits, scale.shape).float()
    if chance.random() < 0.2:
        zero = torch.randn(scale.shape) * 10.0 ** chance.randint(0, 8)
    layout = weight_bits, inputs, kernels.blocks_of(act_bits, act_groups, weight_groups), act_bits == 16
    rows = kernels.pack_bits(codes, weight_bits)
    ordered = kernels.panels_of(rows, *layout)
    assert ordered is not None and torch.equal(kernels.rows_of(ordered, outputs, *layout), rows)
    ratios = chance.choice([(), (), (0.9, 0.75), (1.0, 2.0**-20)])
    y = kernels.quant_linear(x, ordered, scale, zero, weight_bits, act_bits, act_groups, out, *ratios)
    arguments = scale, zero, weight_bits, act_bits, act_groups
    odd = kernels.hadamard_obstacle(inputs, act_groups) is None and inputs // act_groups < 300  # the reference is slow
    if odd and act_bits < 16 and chance.random() < 0.3:
        how = weight_bits, act_bits, act_groups, out, *ratios
        wanted = kernels.quant_linear(hadamard_reference(x, act_groups), ordered, scale, zero, *how)
        assert_same_bits(kernels.rotated_linear(x, ordered, scale, zero, *how), wanted)
    if act_bits == 16:
        weight_only(x, ordered, rows, arguments, y, out)
        return "weight only"
    expected = linear_oracle.quant_linear(x, codes, scale, zero, act_bits, act_groups, out, *ratios)
    if out == torch.bfloat16:  # below 2^-126 the definition rounds twice (linear.round_to): the last bit may differ
        tiny = (expected != 0) & (expected.double().abs() < 2.0**-126)
        assert ((y.double() - expected.double())[tiny].abs() <= 2.0**-133).all()
        y, expected = y.masked_fill(tiny, 0), expected.masked_fill(tiny, 0)
    assert_same_bits(y, expected)
    return "codes"


def weight_only(x: Tensor, ordered: Tensor, rows: Tensor, arguments: tuple, y: Tensor, out: torch.dtype) -> None:
    """Compare with the reference, but for the rounding of every term, and with each token alone, bit for bit."""
    for token in range(min(len(x), 3)):
        alone = kernels.quant_linear(x[token : token + 1], ordered, *arguments, out)
        assert_same_bits(alone[0], y[token])
    exact = linear.quant_linear_reference(x, rows, *arguments, torch.float64)
    wide = kernels.quant_linear(x, ordered, *arguments, torch.float64)
    scale, zero, bits = arguments[:3]
    groups = x.shape[1] // scale.shape[1]
    largest = (2**bits + zero.double().abs()) * scale.double()
    terms = x.double().abs() @ largest.repeat_interleave(groups, 1).T
    ulp = 2.0**-24 if x.dtype == torch.bfloat16 else 2.0**-53
    tiny = 1e-37 * largest.sum(1)  # the bf16 instructions take denormals for zero
    finite = x.double().abs().amax(1, keepdim=True) < (1e30 if x.dtype == torch.bfloat16 else 1e300)
    good = (wide - exact).abs() <= 2 * x.shape[1] * (ulp * terms + tiny)
    assert (good | ~finite).all(), (wide - exact)[~(good | ~finite)]


def fuzz(calls: int, seed: int) -> Counter[str]:
    """How many calls of each kind were made; raises AssertionError, naming the call, for one that differs."""
    done: Counter[str] = Counter()
    for number in range(calls):
        chance = random.Random(f"{seed} {number}")
        torch.set_num_threads(chance.choice([1, 2]))
        try:
            done[call(chance)] += 1
        except AssertionError as error:
            raise AssertionError(f"call {number} of seed {seed} differs") from error
    torch.set_num_threads(1)
    return done


if __name__ == "__main__":
    calls, seed, *flags = sys.argv[1:]
    os.environ["MEGATRON_LOWBIT_KERNELS"] = "cpu"
    for flag in flags:
        if flag.startswith("source="):
            build.SOURCES["linear"] = Path(flag.removeprefix("source="))
        elif flag.startswith("-march="):
            build.FLAGS[:] = [flag if "-march" in each else each for each in build.FLAGS]
        else:
            build.FLAGS.append(flag)
    library = panels.linear_kernels.find()
    assert library is not None
    print(json.dumps({"path": library.lowbit_linear_path().decode(), "calls": fuzz(int(calls), int(seed))}), flush=True)
