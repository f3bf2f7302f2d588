"""The products that `benchmark linear` compares, each as calls on weights of their own.

    bf16          F.linear: what everything is compared with
    packed_bf16   oneDNN with a weight in its own order, as torch.compile's freezing makes it
    int_mm        torch._int_mm: int8 codes of both, int32 sums
    qlinear       onednn.qlinear_pointwise: uint8 activations with one scale, int8 weights, float32 results
    int4pack      torch._weight_int4pack_mm_for_cpu: bf16 activations, 4-bit weights in groups of 128
    W4A8, ...     QuantLinear, as users run it: from bf16 to bf16, activations quantized in it; `x8`: in 8 groups;
                  `rotated`: each group of the activations rotated first, in the same pass

int_mm and qlinear get activations that are quantized already and give no bf16, so their seconds leave out work that is
part of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lowbit.config import one_line
from megatron_lowbit.kernels.hadamard import hadamard_reference
from megatron_lowbit.kernels.linear import FLOAT_BITS, quant_linear_reference
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme

BASELINE = "bf16"
Call = Callable[[], Tensor]
Make = Callable[[Tensor], Call]  # from x [tokens, in]: a call that multiplies it with a weight that no other call has


@dataclass
class Way:
    """One way to multiply.

    kind: int8 or bf16, what it multiplies, and so whose peak counts. weight_bytes: what it has to read of its weight.
    make: makes the next call. check: of ours alone: says how a result agrees with the reference op, or raises
    RuntimeError.
    """

    name: str
    kind: str
    weight_bytes: int
    make: Make
    check: Callable[[Tensor], str] | None = None
    calls: list[Call] = field(default_factory=list)


def baseline(weight: Tensor) -> Way:
    """Return F.linear with weight, bf16 [out, in]."""
    return Way(BASELINE, "bf16", weight.nbytes, lambda x: partial(F.linear, x, weight.clone()))


def peer(name: str, weight: Tensor) -> Way:
    """Return what others offer; weight: bf16 [out, in]. Integers are random: no time depends on their values."""
    kind, bits, make = PEERS[name]
    return Way(name, kind, weight.numel() * bits // 8, partial(make, weight))


def _packed_bf16(weight: Tensor, x: Tensor) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def _int_mm(weight: Tensor, x: Tensor) -> Call:
    return partial(torch._int_mm, _random(x.shape, torch.int8), _random(weight.shape, torch.int8).t())


def _qlinear(weight: Tensor, x: Tensor) -> Call:
    outputs = len(weight)
    codes = torch.ops.onednn.qlinear_prepack(_random(weight.shape, torch.int8), [*x.shape])
    scale, zero_point = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    weights = codes, scale, zero_point, None
    output: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
    return partial(torch.ops.onednn.qlinear_pointwise, _random(x.shape, torch.uint8), 1.0, 0, *weights, *output)


def _int4pack(weight: Tensor, x: Tensor) -> Call:
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"{inputs} inputs are no multiple of its groups of {GROUP}")
    codes = torch.randint(16, weight.shape, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return partial(
        torch._weight_int4pack_mm_for_cpu, x, packed, GROUP, torch.ones(inputs // GROUP, outputs, 2, dtype=x.dtype)
    )


def _random(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, tuple(shape), dtype=dtype)


GROUP = 128
PEERS: dict[str, tuple[str, int, Callable[[Tensor, Tensor], Call]]] = {  # what is multiplied, bits of a weight, maker
    "packed_bf16": ("bf16", 16, _packed_bf16),
    "int_mm": ("int8", 8, _int_mm),
    "qlinear": ("int8", 8, _qlinear),
    "int4pack": ("bf16", 4, _int4pack),
}


def ours(scheme: str, groups: int, weight: QuantizedWeight, x: Tensor, rows: Tensor, rotated: bool = False) -> Way:
    """Return a QuantLinear of `weight`, checked against the reference op.

    x: bf16 [tokens, in], of which a call may get the first ones; rows: int64, tokens whose results are checked. A
    token's result is the same in any batch, so the reference computes these alone, once. rotated: a call multiplies
    each of the groups of x by an orthogonal matrix first (kernels/hadamard.py).
    """
    act_bits = Scheme.parse(scheme).act_bits

    def make(x: Tensor) -> Call:
        own = replace(weight, packed_weight=weight.packed_weight.clone())
        return partial(QuantLinear(own, None, act_bits, groups, rotated=rotated), x)

    parts = weight.packed_weight, weight.scale, weight.zero_point
    checked = hadamard_reference(x[rows], groups) if rotated else x[rows]
    expected = quant_linear_reference(checked, *parts, weight.num_bits, act_bits, groups, x.dtype)
    tolerance = float_tolerance(checked, weight, expected) if act_bits == FLOAT_BITS else None
    name = f"{scheme} x{groups}" if groups > 1 else scheme
    name += " rotated" if rotated else ""
    kind = "bf16" if act_bits == FLOAT_BITS else "int8"
    read = sum(tensor.nbytes for tensor in parts)
    return Way(name, kind, read, make, partial(compare, name, rows, expected, tolerance))


def compare(name: str, rows: Tensor, expected: Tensor, tolerance: Tensor | None, y: Tensor) -> str:
    """Return "bits" where the rows of y that it has are those expected, else "float32" where they are as near as sums
    in float32 have to be. Raises RuntimeError where they are neither.

    rows: int64, numbers of tokens; expected: [rows, out]; tolerance: float64 [rows, out], or None: bits alone will do.
    """
    there = rows < len(y)
    found, wanted = y[rows[there]], expected[there]
    if torch.equal(found, wanted):
        return "bits"
    wrong = found != wanted
    if tolerance is not None and found.shape == wanted.shape:
        wrong = ~((found.double() - wanted.double()).abs() <= tolerance[there])  # NaN is no neighbour
        if not wrong.any():
            return "float32"
    raise RuntimeError(f"{name}: {int(wrong.sum())} of {wrong.numel()} results are not those of the reference op")


def float_tolerance(x: Tensor, weight: QuantizedWeight, expected: Tensor) -> Tensor:
    """Return how far a result of unquantized activations may be off: float64 [tokens, out].

    Sums of k products in float32, in any order, are off by at most k 2^-24 / (1 - k 2^-24) of the sum of their sizes
    (Higham, Accuracy and Stability of Numerical Algorithms, 4.2), here |x| (w + |Z|) S, of which x.w and x.1 are
    summed apart; a few more roundings join them. Then both results are rounded to the output's dtype, each by half a
    unit in the last place.
    """
    scale, zero_point = weight.scale.double()[..., None], weight.zero_point.double().abs()[..., None]
    codes = weight.codes().double().unflatten(1, (weight.scale.shape[1], -1))
    sizes = x.double().abs() @ ((codes + zero_point) * scale).flatten(1).t()
    roundings = (x.shape[1] + 8) * 2.0**-24
    return roundings / (1 - roundings) * sizes + torch.finfo(expected.dtype).eps * expected.double().abs()


def reason(error: Exception) -> str:
    """Return why a way does not run: the kind of its error, and the first line of what it says."""
    return f"{type(error).__name__}: {one_line(error)}"[:200]
