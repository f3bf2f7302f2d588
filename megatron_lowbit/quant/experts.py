"""The experts of a mixture of experts in codes: what a checkpoint stores of them.

transformers keeps the experts of a block in one tensor [experts, out, in] (or [experts, in, out]) per projection. Its
codes are those of one weight of experts * out rows: an output channel of an expert has its own scale and zero point,
and expert e is the e-th of equal shares of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.tensors import short_repr
from megatron_lowbit.kernels import pack_bits, quantize
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme, qparams_from_range, value_range
from megatron_lowbit.quant.clipping import best_ratios
from megatron_lowbit.quant.gptq import InverseFactor, gptq_codes


@dataclass(frozen=True)
class QuantizedExperts:
    """The projections of all experts.

    scheme: bits of their weights and inputs, such as "W4A16"; weights: {name of the projection's tensor in the Hugging
    Face model: QuantizedWeight of all experts, [experts * out, in]}.
    """

    scheme: str
    weights: dict[str, QuantizedWeight]

    __repr__ = short_repr

    @property
    def act_bits(self) -> int:
        """Return the bits of the experts' inputs."""
        return Scheme.parse(self.scheme).act_bits

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and zero points."""
        weights = self.weights.values()
        return sum(w.packed_weight.nbytes + w.scale.nbytes + w.zero_point.nbytes for w in weights)


def round_expert(
    weight: Tensor,
    config: WeightsConfig,
    name: str,
    squares: Tensor | None = None,
    factor: InverseFactor | None = None,
) -> QuantizedWeight:
    """Round the weight [out, in] of one expert to the bits of weights.experts.

    squares: float64 [in], of its own tokens, by which weights.clipping=mse weights errors; None: equally. factor: of
    its own Hessian, for weights.rounding=gptq; None: to nearest. Raises LowBitError for NaN or Inf, and for a group
    size that does not divide its width.
    """
    if not torch.isfinite(weight).all():
        raise LowBitError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized")
    if config.group_size is not None and weight.shape[1] % config.group_size:
        raise LowBitError(
            f"weights.group_size={config.group_size} does not divide the {weight.shape[1]} inputs of {name}"
        )
    bits = Scheme.parse(config.experts).weight_bits
    low, high = value_range(weight, config.group_size)
    if config.clipping == "mse":
        importance = None if squares is None else [squares]
        ratio = best_ratios([weight], low, high, bits, config.symmetric, importance, real_zero=config.real_zero)
        low, high = low * ratio, high * ratio
    pair = qparams_from_range(low, high, bits, config.symmetric, config.real_zero)
    codes = quantize(weight, *pair, bits) if factor is None else gptq_codes(weight, *pair, bits, factor)
    return QuantizedWeight(pack_bits(codes, bits), *pair, bits, weight.shape[1])


def stack_experts(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Return the weights [out, in] of all experts as one [experts * out, in]."""
    packed, scale, zero_point = (
        torch.cat([getattr(weight, leaf) for weight in weights]) for leaf in ("packed_weight", "scale", "zero_point")
    )
    return QuantizedWeight(packed, scale, zero_point, weights[0].num_bits, weights[0].in_features)
