"""What quant_linear has to return, by another road: numpy's integers and Python's fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
LEAST_EXPONENT = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}


def quantized_tokens(
    x: np.ndarray, bits: int, groups: int, ratios: tuple[float, float] = (1.0, 1.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes int64 [tokens, in], scale, zero_point float32 [tokens, groups]) of QLLM's eq. 2, for float32 x.

    ratios: of the two ends of a range, multiplied in float32.
    """
    levels = np.float32(2**bits - 1)
    scale, zero = (np.zeros((len(x), groups), np.float32) for _ in range(2))
    codes = np.zeros(x.shape, np.int64)
    for token, row in enumerate(x):
        for group, columns in enumerate(np.split(np.arange(len(row)), groups)):
            low, high = row[columns].min(), row[columns].max()
            with np.errstate(all="ignore"):
                low, high = low * np.float32(ratios[0]), high * np.float32(ratios[1])
                step = high / levels - low / levels
                if step < np.finfo(np.float32).tiny:
                    step, offset = np.float32(1), -low
                else:
                    offset = -np.rint(low / step)
                if not np.isfinite(step):
                    step = offset = np.float32(np.nan)
                scale[token, group], zero[token, group] = step, offset
                whole = np.rint(offset)  # all of it, but of a constant token
                values = np.rint(row[columns] / step + (offset - whole)) + whole
            codes[token, columns] = np.nan_to_num(np.clip(values, 0, levels)).astype(np.int64)
    return codes, scale, zero


def product(
    codes: np.ndarray, s: np.ndarray, z: np.ndarray, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    """The definition in kernels/linear.py, float64 [tokens, out]: whole numbers in int64, the rest one operation of
    float64 at a time."""
    s, z, scale, zero = (t.astype(np.float64) for t in (s, z, scale, zero))
    groups, blocks = scale.shape[1], math.lcm(s.shape[1], scale.shape[1])
    parts = zip(np.split(codes, blocks, 1), np.split(weight, blocks, 1), strict=True)
    total = np.zeros((len(codes), len(weight)))
    for b, (x, w) in enumerate(parts):
        g, h = b * s.shape[1] // blocks, b * groups // blocks
        if b % (blocks // groups) == 0:
            inner = np.zeros_like(total)
        bracket = (x @ w.T).astype(np.float64) - z[:, g, None] * w.sum(1).astype(np.float64)
        rest = x.sum(1).astype(np.float64) - np.float64(x.shape[1]) * z[:, g]
        bracket = bracket - rest[:, None] * zero[:, h]
        inner = inner + s[:, g, None] * bracket
        if (b + 1) % (blocks // groups) == 0:
            total = total + inner * scale[:, h]
    return total


def rounded(y: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype` in one rounding, half to even, by fractions."""
    if dtype == torch.float64:
        return torch.from_numpy(y)
    return torch.tensor([_round(float(value), dtype) for value in y.flat], dtype=torch.float64).view(y.shape).to(dtype)


def _round(value: float, dtype: torch.dtype) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, LEAST_EXPONENT[dtype])
    unit = Fraction(2) ** (exponent - MANTISSA[dtype])
    nearest = round(Fraction(value) / unit) * unit  # Python's round is half to even
    return (
        math.copysign(float(nearest), value)
        if abs(nearest) <= Fraction(torch.finfo(dtype).max)
        else math.copysign(math.inf, value)
    )


def quant_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    act_bits: int,
    act_groups: int,
    dtype: torch.dtype,
    *ratios: float,
) -> Tensor:
    """y of kernels.quant_linear for x [tokens, in] and the weight's unpacked codes uint8 [out, in]."""
    tokens = quantized_tokens(x.float().numpy(), act_bits, act_groups, ratios or (1.0, 1.0))
    with np.errstate(all="ignore"):
        y = product(*tokens, codes.numpy().astype(np.int64), scale.numpy(), zero.numpy())
    return rounded(y, dtype)
