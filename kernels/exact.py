"""Partial sums as integers that all ranks scale alike (exact_sum.py), in plain torch: the oracle of exact.h.

    code = clamp(round((x - center) / step), -largest, largest)         y = total step + center

A row has a code for every feature and a last one that is 1 if the token holds NaN or Inf, else 0. Codes of 8 bits
travel as int8; two of 16 bits as an int32, high * 2^16 + low, the latter zero where a row has an odd number of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake


def encode_reference(x: Tensor, center: Tensor, step: Tensor, largest: int, carrier_bits: int) -> tuple[Tensor, Tensor]:
    """Encode partial sums as integers whose sum is exact. x: float [tokens, E]; center, step: float32 [E]. Returns
    (int8 [tokens, E + 1] or int32 [tokens, ceil((E + 1) / 2)], int64 [3]: the values; of them those that lay beyond the
    largest code by more than half a step, or were NaN; the tokens that hold NaN or Inf).
    """
    exact = x.float()
    broken = (0 * exact).sum(1, keepdim=True).isnan()
    codes = torch.round((exact - center) / step)
    saturated = (~(codes.abs() <= largest)).sum()
    tally = torch.stack([torch.full_like(saturated, x.numel()), saturated, broken.sum()])
    codes = codes.nan_to_num_(0.0).clamp_(-largest, largest)
    whole = torch.cat([codes, broken], dim=1)
    if carrier_bits == 8:
        return whole.to(torch.int8), tally
    if whole.shape[1] % 2:
        whole = torch.nn.functional.pad(whole, (0, 1))
    high, low = whole.to(torch.int32).unflatten(1, (-1, 2)).unbind(2)
    return high * 2**16 + low, tally


exact_encode = define(
    "exact_encode(Tensor x, Tensor center, Tensor step, int largest, int carrier_bits) -> (Tensor, Tensor)",
    encode_reference,
)


def carrier_words(features: int, carrier_bits: int) -> int:
    """Return the number of integers of a row."""
    return features + 1 if carrier_bits == 8 else features // 2 + 1


@fake(exact_encode)
def _(x, center, step, largest, carrier_bits):
    words = carrier_words(x.shape[1], carrier_bits)
    codes = x.new_empty((x.shape[0], words), dtype=torch.int8 if carrier_bits == 8 else torch.int32)
    return codes, x.new_empty(3, dtype=torch.int64)


def decode_reference(total: Tensor, center: Tensor, step: Tensor, carrier_bits: int, dtype: torch.dtype) -> Tensor:
    """Decode the sum of all ranks' codes. total: sum of the ranks' codes; center float32 [E]: the sum of theirs.
    Returns [tokens, E] in `dtype`."""
    if carrier_bits == 16:
        low = ((total + 2**15) & (2**16 - 1)) - 2**15
        total = torch.stack([(total - low) >> 16, low], dim=2).flatten(1)
    features = step.shape[0]
    y = total[:, :features].float() * step + center
    return y.masked_fill(total[:, features : features + 1] != 0, torch.nan).to(dtype)


exact_decode = define(
    "exact_decode(Tensor total, Tensor center, Tensor step, int carrier_bits, ScalarType dtype) -> Tensor",
    decode_reference,
)


@fake(exact_decode)
def _(total, center, step, carrier_bits, dtype):
    return total.new_empty((total.shape[0], step.shape[0]), dtype=dtype)
