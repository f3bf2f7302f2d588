"""The affine quantizer (QLLM, arXiv 2310.08041, eq. 2).

    X_q = clamp(round(X / alpha) + beta, 0, 2^b - 1)       alpha = (max X - min X) / (2^b - 1)
    X^  = alpha * (X_q - beta)                             beta  = -round(min X / alpha)

weights.zero_point=real leaves out the rounding of beta, for weights:

    X_q = clamp(round(X / alpha + beta), 0, 2^b - 1)       beta  = -min X / alpha

Both ends of a range are codes then, so 2 of its n values have no error: the squared error is 2/n smaller (6 % in groups
of 32). What was in such codes before, with the same groups, comes back. 0 is no code any more.

`alpha` is the scale and `beta` the zero point, one pair per row of the last dimension: an output channel of a weight
[out, in], a token of an activation [tokens, in], or a group of `group_size` features inside either. Codes are uint8 in
[0, 2^b - 1] for the symmetric quantizer too, whose scale is max|X| / (2^(b-1) - 1) and whose zero point is 2^(b-1).

All arithmetic is float32, whatever the input's dtype. A constant row gets scale 1 and the real-valued zero point
-min X, so it comes back exactly, not as NaN. NaN or Inf in a row makes that row NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.tensors import check_scale, check_tensor, short_repr
from megatron_lowbit.kernels import dequantize, pack_bits, packed_bytes, quantize, quantizer, round_tokens, unpack_bits
from megatron_lowbit.kernels.quantizer import unclamped_codes
from megatron_lowbit.quant.input_clipping import WHOLE, Clip
from megatron_lowbit.quant.range_gradient import scale_of, through_ranges, with_scale

PER_LINEAR = 0  # weight_bits of a scheme in which each linear has its own


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations; 16 means: not quantized. weight_bits may be PER_LINEAR."""

    weight_bits: int
    act_bits: int

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Parse `none`, `W<bits>A<bits>` (each 2 to 8 or 16) or `autoA<bits>` (PER_LINEAR). Raises LowBitError."""
        if name == "none":
            return cls(16, 16)
        if name.startswith("autoA"):
            return cls(PER_LINEAR, cls.parse(f"W8{name.removeprefix('auto')}").act_bits)
        weight, _, act = name.removeprefix("W").partition("A")
        if not (name.startswith("W") and weight.isdecimal() and act.isdecimal()):
            raise LowBitError(f"scheme {name!r} is not of the form W4A8 (weight bits, activation bits)")
        for bits in (int(weight), int(act)):
            if bits != 16:
                check_bits(bits)
        return cls(int(weight), int(act))


def check_bits(num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise LowBitError(f"num_bits={num_bits} is not in 2..8")


def qparams_from_range(
    min_vals: Tensor, max_vals: Tensor, num_bits: int, symmetric: bool = False, real_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), float32, shaped like `min_vals` and `max_vals`; codes are 0 .. 2^num_bits - 1 (eq.
    2). real_zero: the zero point is not rounded; a symmetric one has none."""
    check_bits(num_bits)
    low, high = min_vals.float(), max_vals.float()
    if not symmetric:
        return quantizer.qparams_from_range(low, high, num_bits, real_zero)
    largest = torch.maximum(low.abs(), high.abs())
    levels = 2**num_bits - 2  # -(2^(b-1) - 1) .. 2^(b-1) - 1, mirrored around the zero point
    scale, _ = quantizer.usable_step(largest / levels - -largest / levels)
    return scale, torch.full_like(scale, 2 ** (num_bits - 1))


def choose_qparams(
    x: Tensor,
    num_bits: int,
    symmetric: bool = False,
    group_size: int | None = None,
    clip: Clip = WHOLE,
    real_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the min-max (scale, zero_point) of x [..., features]: float32 [..., groups], groups = features /
    group_size or 1. clip: what is left of the two ends of a range."""
    low, high = value_range(x, group_size)
    return qparams_from_range(low * clip[0], high * clip[1], num_bits, symmetric, real_zero)


def value_range(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (smallest, largest) value of every row and group of x [..., features]: float32 [..., groups]."""
    grouped = _grouped(x, group_size)
    return grouped.amin(-1).float(), grouped.amax(-1).float()


class _StraightThrough(torch.autograd.Function):
    """Forward the quantized value; backward the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor) -> Tensor:  # type: ignore[override]
        return quantized

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with the gradient going to x as it is."""
    return _StraightThrough.apply(x, quantized)


def fake_quantize(
    x: Tensor,
    num_bits: int,
    symmetric: bool = False,
    group_size: int | None = None,
    clip: Clip = WHOLE,
    real_zero: bool = False,
) -> Tensor:
    """Return dequantize(quantize(x)) in x's dtype, with the straight-through gradient (identity)."""
    differentiable = torch.is_grad_enabled() and (x.requires_grad or through_ranges())
    if not (differentiable or symmetric or real_zero) and x.numel():
        check_bits(num_bits)
        groups = 1 if group_size is None else _grouped(x, group_size).shape[-2]
        return round_tokens(x, num_bits, groups, *clip)
    with torch.no_grad():
        scale, zero_point = choose_qparams(x, num_bits, symmetric, group_size, clip, real_zero)
    if through_ranges() and not symmetric:
        scale = scale_of([x], scale, *value_range(x, group_size), num_bits)
    return fake_quantize_with(x, scale, zero_point, num_bits)


def fake_quantize_with(x: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Quantize and dequantize x [..., features] with given qparams [..., groups]."""
    with torch.no_grad():
        grouped = x.detach().float().unflatten(-1, (scale.shape[-1], -1))
        step, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        # In place on one copy: training does this to every weight in every step.
        values = unclamped_codes(grouped, step, zero_point).clamp_(0, 2**num_bits - 1)
        quantized = values.sub_(zero_point).mul_(step).flatten(-2).to(x.dtype)
    if scale.requires_grad:
        return with_scale(x, quantized, scale)
    return straight_through(x, quantized)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out_features, in_features] in packed codes: what a checkpoint stores and a quantized linear reads.

    packed_weight: uint8 [out_features, row_bytes]; scale, zero_point: float32 [out_features, groups].
    """

    packed_weight: Tensor
    scale: Tensor
    zero_point: Tensor
    num_bits: int
    in_features: int

    __repr__ = short_repr

    def validate(self, name: str) -> None:
        """Raise ValueError, naming the tensor, where dtypes, shapes or scales cannot be those of a weight."""
        row_bytes = packed_bytes(self.in_features, self.num_bits)
        check_tensor(f"{name}.packed_weight", self.packed_weight, torch.uint8, (None, row_bytes))
        rows = self.packed_weight.shape[0]
        check_tensor(f"{name}.scale", self.scale, torch.float32, (rows, None), finite=True)
        check_tensor(f"{name}.zero_point", self.zero_point, torch.float32, self.scale.shape, finite=True)
        check_scale(f"{name}.scale", self.scale)
        if self.in_features % self.scale.shape[1]:
            groups = self.scale.shape[1]
            raise ValueError(f"{name}.scale has {groups} groups, which do not divide {self.in_features} inputs")

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        weight: Tensor,
        num_bits: int,
        symmetric: bool = False,
        group_size: int | None = None,
        name: str = "weight",
        qparams: Callable[[Tensor, int, bool, int | None], tuple[Tensor, Tensor]] = choose_qparams,
    ) -> QuantizedWeight:
        """Round `weight` to the nearest code. Raises LowBitError where it holds NaN or Inf, naming it.

        qparams: chooses the scale and the zero point (clipping.py has another way).
        """
        if not torch.isfinite(weight).all():
            raise LowBitError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized")
        if group_size is not None and weight.shape[1] % group_size:
            raise LowBitError(f"weights.group_size={group_size} does not divide the {weight.shape[1]} inputs of {name}")
        scale, zero_point = qparams(weight, num_bits, symmetric, group_size)
        codes = quantize(weight, scale, zero_point, num_bits)
        return cls(pack_bits(codes, num_bits), scale, zero_point, num_bits, weight.shape[1])

    def codes(self) -> Tensor:
        """Unpack the codes: uint8 [out_features, in_features]."""
        return unpack_bits(self.packed_weight, self.num_bits, self.in_features)

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for: float32 [out_features, in_features]."""
        return dequantize(self.codes(), self.scale, self.zero_point)

    def shard_out(self, rank: int, size: int) -> QuantizedWeight:
        """Return rank `rank`'s share of the output channels (column-parallel)."""
        rows = self.packed_weight.shape[0]
        if rows % size:
            raise LowBitError(f"{rows} output channels do not divide among {size} ranks; choose another tp")
        packed, scale, zero = (
            t.chunk(size)[rank].contiguous() for t in (self.packed_weight, self.scale, self.zero_point)
        )
        return QuantizedWeight(packed, scale, zero, self.num_bits, self.in_features)

    def take_out(self, outputs: Tensor) -> QuantizedWeight:
        """Return the weight of some output channels, int64 [n], in their order."""
        packed, scale, zero = (
            t.index_select(0, outputs.to(t.device)) for t in (self.packed_weight, self.scale, self.zero_point)
        )
        return QuantizedWeight(packed, scale, zero, self.num_bits, self.in_features)

    def shard_in(self, rank: int, size: int) -> QuantizedWeight:
        """Return rank `rank`'s share of the input features (row-parallel).

        Unpacked, sliced and repacked, since a shard boundary may split a packed byte; of one rank the weight itself,
        which stays where it is. One scale per output channel is the same on all ranks; group scales are sliced with
        their groups. Raises LowBitError where the shard would split a group.
        """
        groups = self.scale.shape[1]
        if self.in_features % size:
            raise LowBitError(f"{self.in_features} input features do not divide among {size} ranks; choose another tp")
        if groups > 1 and groups % size:
            raise LowBitError(
                f"{groups} weight groups do not divide among {size} ranks; choose another weights.group_size"
            )
        if size == 1:
            return self
        return self.take_in(torch.arange(self.in_features).chunk(size)[rank])

    def take_in(self, inputs: Tensor) -> QuantizedWeight:
        """Return the weight of some input features, int64 [n], in their order; those of a group of scales together.

        Raises LowBitError where they split a group.
        """
        groups = self.scale.shape[1]
        packed = pack_bits(self.codes().index_select(1, inputs.to(self.packed_weight.device)), self.num_bits)
        scale, zero = self.scale, self.zero_point
        if groups > 1:
            taken = whole_slices(inputs, self.in_features // groups)
            if taken is None:
                raise LowBitError("the inputs split a group of weight scales; choose another weights.group_size")
            scale, zero = (t.index_select(1, taken.to(t.device)) for t in (scale, zero))
        return QuantizedWeight(packed, scale, zero, self.num_bits, len(inputs))


@dataclass(frozen=True)
class LowRank:
    """The branch of a linear: lora_a bf16 [rank, in_features], lora_b bf16 [out_features, rank]."""

    lora_a: Tensor
    lora_b: Tensor

    __repr__ = short_repr

    def validate(self, name: str, in_features: int, out_features: int) -> None:
        """Raise ValueError, naming the tensor, where the factors do not fit a linear of these widths."""
        check_tensor(f"{name}.lora_a", self.lora_a, torch.bfloat16, (None, in_features), finite=True)
        rank = self.lora_a.shape[0]
        check_tensor(f"{name}.lora_b", self.lora_b, torch.bfloat16, (out_features, rank), finite=True)

    def shard_out(self, rank: int, size: int) -> LowRank:
        return LowRank(self.lora_a, self.lora_b.chunk(size)[rank].contiguous())

    def take_out(self, outputs: Tensor) -> LowRank:
        return LowRank(self.lora_a, self.lora_b.index_select(0, outputs.to(self.lora_b.device)))

    def shard_in(self, rank: int, size: int) -> LowRank:
        return LowRank(self.lora_a.chunk(size, dim=1)[rank].contiguous(), self.lora_b)

    def take_in(self, inputs: Tensor) -> LowRank:
        return LowRank(self.lora_a.index_select(1, inputs.to(self.lora_a.device)), self.lora_b)


def whole_slices(index: Tensor, width: int) -> Tensor | None:
    """Return which slices of `width` consecutive numbers, each from a multiple of it, an index int64 [n] is made of:
    int64 [n / width]; None where it is not made of such slices."""
    if len(index) % width:
        return None
    slices = index[::width] // width
    made = (slices[:, None] * width + torch.arange(width, device=index.device)).flatten()
    return slices if torch.equal(made, index) else None


class Float32QParams(nn.Module):
    """A module whose `float32` buffers stay float32: model.bfloat16() moves them, but rounds nothing."""

    float32: tuple[str, ...] = ("scale", "zero_point")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32QParams:
        exact = {name: self._buffers[name] for name in self.float32 if name in self._buffers}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = self._buffers[name]
            if before is not None and moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    size = x.shape[-1] if group_size is None else group_size
    if x.shape[-1] % size:
        raise LowBitError(f"group_size={group_size} does not divide {x.shape[-1]} features")
    return x.unflatten(-1, (-1, size))
