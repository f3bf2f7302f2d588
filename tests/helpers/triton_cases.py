"""Triton's kernels of the hybrid ops against torch's reference, bit for bit: `python triton_cases.py cpu|cuda [STEP]`.

On the CPU it needs TRITON_INTERPRET=1. STEP 3 takes every third case. Prints the number of cases; the first that
differs ends it with an error.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megatron_lowbit.kernels import Format, hybrid, triton_hybrid, wire_format

TILE = (2, 8)  # several tiles of tokens and blocks of features even in small tensors
WIDE_TILE = (2, 128)  # of rows with more groups than one; two of them at a time
PLANS = [  # tiers
    [4, 1],
    [16, 1],
    [16, 13],
    [16, 3, 4, 19],
    [4, 20, 16, 5, 2, 9],  # bf16 not in front
    [8, 17],
    [16, 2, 8, 3, 7, 9, 6, 5, 5, 1, 4, 7, 3, 11, 2, 6],
    *([bits, 21] for bits in (2, 3, 5, 6, 7)),
    [16, 4, 4, 114],  # more groups than one
    [4, 700],
]


def plan(tiers: list[int], senders: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero_point, order)"""
    g, features = torch.Generator().manual_seed(seed), sum(tiers[1::2])
    scale = torch.rand(senders, features, generator=g) * 0.4 + 0.05
    zero_point = torch.randn(senders, features, generator=g) * 2 + 4
    order = torch.randperm(features, generator=g)
    bf16 = order[: sum(count for bits, count in zip(tiers[::2], tiers[1::2], strict=True) if bits == 16)]
    scale[:, bf16], zero_point[:, bf16] = torch.inf, 0.0
    return scale.to(device), zero_point.to(device), order.to(device)


def inputs(tokens: int, features: int, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    x[:, features // 2 :] *= 1.3  # groups are unlike, by less than what a largest value may be above their mean
    if kind == "constant":
        x[:] = 0.75
    elif kind == "zeros" and tokens:
        x[0], x[1:, 64 : features // 2] = 0.0, 0.0
    elif kind == "saturated":
        x *= 1e4
    elif kind == "broken" and tokens:
        for token, bad in enumerate((float("nan"), float("inf"), float("-inf"))):
            x[token % tokens, (5 * token) % features] = bad
    return x.to(dtype)


def without_nan_bits(message: Tensor, tiers: list[int], per_token: bool) -> Tensor:
    """All bf16 NaN made one: which NaN it is differs between backends."""
    message, header = message.clone(), wire_format.header_bytes(tiers, per_token)
    spans = [(header + byte, size) for bits, _, _, byte, size in wire_format.tier_slices(tiers) if bits == 16 and size]
    for start, size in spans:
        value = message[:, start : start + size].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        value[value.isnan()] = float("nan")
        message[:, start : start + size] = value.view(torch.uint8)
    return message


def check_message(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tiers, per_token, case) -> None:
    assert torch.equal(ours[1], expected[1]), ("tally", case, ours[1], expected[1])
    same = torch.equal(*(without_nan_bits(message, tiers, per_token) for message in (ours[0], expected[0])))
    assert same, ("message", case)


def check(
    tiers: list[int], per_token: bool, tokens: int, ranks: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    case = (tiers, per_token, tokens, ranks, kind, dtype)
    scale, zero_point, order = plan(tiers, ranks, 1, device)
    zero_point *= kind != "zeros"
    tile = TILE if len(order) < 64 else WIDE_TILE
    sent = []
    for rank in range(ranks):
        x = inputs(tokens, len(order), kind if rank == 0 else "plain", dtype, rank).to(device)
        arguments = (x, Format(scale[rank], zero_point[rank], order, tiers, per_token))
        expected = hybrid.pack_reference(*arguments)
        check_message(triton_hybrid.pack(*arguments, tile=tile), expected, tiers, per_token, case)
        sent.append(expected[0])
    first = (torch.stack(sent), Format(scale, zero_point, order, tiers, per_token))
    ours = torch.empty(tokens, len(order), dtype=dtype, device=device)
    triton_hybrid.unpack_reduce(*first, ours, tile=tile)
    total = hybrid.unpack_reduce_reference(*first, dtype)
    assert torch.equal(ours.isnan(), total.isnan()) and torch.equal(ours.nan_to_num(), total.nan_to_num()), case
    features = len(order)
    second_tiers = [6, features] if per_token else [16, features // 3, 8, features - features // 3]
    second = plan(second_tiers, 1, 2, device)
    second_format = Format(second[0][0], second[1][0], second[2], second_tiers, not per_token)
    # One program takes all tiles, so that its scratch rows are used again.
    again = triton_hybrid.requantize(*first, second_format, tile=tile, programs=1)
    check_message(again, hybrid.requantize_reference(*first, second_format), second_tiers, not per_token, case)


def main(device: str, step: int = 1) -> None:
    cases = [(tiers, per_token, 3, 2, "plain", torch.float32) for tiers in PLANS for per_token in (False, True)]
    cases += [([4, 700], True, 3, 1, "zeros", torch.float32)]
    for tiers in ([16, 3, 4, 19], [4, 13], [4, 20, 16, 5, 2, 9]):
        for per_token in (False, True):
            cases += [(tiers, per_token, 3, 1, kind, torch.float32) for kind in ("constant", "saturated", "broken")]
            cases += [(tiers, per_token, 1, 1, "plain", dtype) for dtype in (torch.bfloat16, torch.float16)]
            cases += [
                (tiers, per_token, 0, 2, "plain", torch.float32),
                (tiers, per_token, 5, 4, "broken", torch.bfloat16),
            ]
    for case in cases[::step]:
        check(*case, device)
    print(len(cases[::step]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
