"""Random calls of the C++ kernels against the torch reference, bit for bit: python kernel_fuzz.py CALLS SEED [FLAG ...]

FLAGs are of the compiler, such as -fsanitize=address,undefined; the sanitizer then has to be in $LD_PRELOAD. One of the
form source=FILE names another hybrid.cpp.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from kernel_inputs import DTYPES, Plan, assert_same_bits, assert_same_messages
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.kernels import Format, build, cpu, exact, hybrid

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e38, -6e4, 1e-40, 5e-324]


def random_tiers(chance: random.Random) -> list[int]:
    """Bits and counts of at most 300 features; widths of bf16 first, where per-token scales look for them, or last."""
    widths = chance.sample([2, 3, 4, 5, 6, 7, 8], chance.randint(0, 4))
    widths = chance.choice([[16, *widths], widths or [4], [*widths, 16]])
    counts = [chance.choice([1, 2, 7, 31, 32, 33, 63, 64, 65]) for _ in widths]
    return [number for pair in zip(widths, counts, strict=True) for number in pair]


def spoiled(x: Tensor, chance: random.Random) -> Tensor:
    """With NaN, Inf and other extremes at random places, and sometimes with rows that lie apart."""
    x = x.clone()
    for _ in range(chance.choice([0, 0, 1, 9]) if x.numel() else 0):
        x.view(-1)[chance.randrange(x.numel())] = chance.choice(SPECIAL)
    if chance.random() < 0.2:
        wide = torch.full((x.shape[0], x.shape[1] + chance.randint(1, 9)), torch.nan, dtype=x.dtype)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    return x.t().contiguous().t() if chance.random() < 0.1 else x


def hybrid_call(chance: random.Random) -> str:
    tiers, per_token, tokens = random_tiers(chance), chance.random() < 0.5, chance.choice([0, 1, 2, 3, 4, 5, 9, 17])
    bf16_first = sorted(tiers[::2], key=lambda bits: bits != 16) == tiers[::2]
    dtype, ranks = chance.choice(DTYPES), chance.choice([1, 1, 2, 3, 4])
    torch.manual_seed(chance.randrange(2**31))
    plan = Plan(tiers, tokens, per_token and bf16_first, dtype, ranks, shuffled=chance.random() < 0.5)
    op = chance.choice(["pack", "unpack", "requantize"])
    if op == "pack":
        x, rank = spoiled(plan.x[chance.randrange(ranks)], chance), chance.randrange(ranks)
        assert_same_messages(
            kernels.hybrid_pack(x, *plan.qparams(rank)),
            hybrid.pack_reference(x, Format(*plan.qparams(rank))),
            *(plan.tiers, plan.per_token),
        )
        return op
    messages, all_ranks = plan.messages(), plan.qparams(slice(None))
    if chance.random() < 0.3:  # what no sender makes: any bytes are a message
        messages = torch.randint(0, 256, messages.shape, dtype=torch.uint8)
    if op == "unpack":
        out = chance.choice(DTYPES)
        ours = kernels.hybrid_unpack_reduce(messages, Format(*all_ranks), out)
        assert_same_bits(ours, hybrid.unpack_reduce_reference(messages, Format(*all_ranks), out))
        return op
    second = Plan(
        [16, 1, 4, len(plan.order) - 1] if len(plan.order) > 1 else [4, 1], 1, chance.random() < 0.5, dtype, 1
    )
    assert_same_messages(
        kernels.hybrid_unpack_reduce_requantize(messages, *all_ranks, *second.qparams(0)),
        hybrid.requantize_reference(messages, Format(*all_ranks), Format(*second.qparams(0))),
        *(second.tiers, second.per_token),
    )
    return op


def exact_call(chance: random.Random) -> str:
    features, tokens, bits = chance.choice([1, 2, 63, 64, 65, 130]), chance.choice([0, 1, 5, 9]), chance.choice([8, 16])
    torch.manual_seed(chance.randrange(2**31))
    center, step = 0.1 * torch.randn(features), 0.01 + torch.rand(features)
    ranks, dtype = chance.randint(1, 4), chance.choice(DTYPES)
    largest = (2 ** (bits - 1) - 1) // ranks
    x = spoiled((torch.randn(tokens, features) * largest * step).to(dtype), chance)
    ours, reference = (
        encode(x, center, step, largest, bits) for encode in (kernels.exact_encode, exact.encode_reference)
    )
    assert ours[0].dtype == reference[0].dtype
    assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])
    arguments = ranks * reference[0], ranks * center, step, bits, dtype
    assert_same_bits(kernels.exact_decode(*arguments), exact.decode_reference(*arguments))
    return "exact"


def fuzz(calls: int, seed: int) -> Counter[str]:
    """How many calls of each kind were made; raises AssertionError, naming the call, for one that differs."""
    done: Counter[str] = Counter()
    for number in range(calls):
        chance = random.Random(f"{seed} {number}")
        torch.set_num_threads(chance.choice([1, 2]))
        try:
            done[(exact_call if chance.random() < 0.25 else hybrid_call)(chance)] += 1
        except AssertionError as error:
            raise AssertionError(f"call {number} of seed {seed} differs from the reference") from error
    torch.set_num_threads(1)
    return done


if __name__ == "__main__":
    calls, seed, *flags = sys.argv[1:]
    for flag in flags:
        if flag.startswith("source="):
            build.SOURCES["hybrid"] = Path(flag.removeprefix("source="))
        else:
            build.FLAGS.append(flag)
    os.environ["MEGATRON_LOWBIT_KERNELS"] = "cpu"
    assert cpu._library() is not None
    print(json.dumps(fuzz(int(calls), int(seed))), flush=True)
