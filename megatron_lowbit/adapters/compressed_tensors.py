"""An artifact in the format of compressed-tensors, which transformers and vLLM load: codes stay codes.

    W4A16, W8A16 ...    pack-quantized: codes and zero points of b bits, densely packed in int32
    W8A8                int-quantized: int8 weights with a scale per output channel, activations quantized per token

A code q of ours stands for scale * (q - z), one of theirs for scale * (q' - z') with q' = q - 2^(b-1), signed, and a
whole z' of b bits. What the format has no place for is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.kernels import pack_bits
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

PACKED, INT8 = "pack-quantized", "int-quantized"
INSTEAD = "export as huggingface"
# {what the formats have no place for: how to quantize without it}
NO_PLACE = {
    "bits of its own for every linear": "a scheme of equal bits",
    "reassembled channels": "reassembly.mode=none",
    "low-rank branches": "correction.mode=merged",
    "quantized Q, K and V": "weights.attention=false",
    "inputs rotated online": "weights.rotation=none",
    "clipped activations": "weights.clipping=none",
    "a quantized output projection": "weights.lm_head_bits=0",
    "quantized experts": "weights.experts=none",
    "several activation scales per token": "weights.shard_groups=1",
}


def check_exports(checkpoint: LowBitCheckpoint) -> str:
    """Return the format of an artifact. Raises LowBitError naming what no format of compressed-tensors can hold."""
    rotation, low_bit = checkpoint.rotation, checkpoint.scheme.act_bits < 16
    there = (
        checkpoint.allocation is not None,
        bool(checkpoint.reassembly),
        bool(checkpoint.low_rank),
        checkpoint.attention_bits < 16,
        rotation is not None and bool(rotation.inputs),
        bool(checkpoint.clipping),
        checkpoint.head is not None,
        checkpoint.experts is not None,
        low_bit and checkpoint.shard_groups > 1,
    )
    return _choose_format(checkpoint.scheme, there)


def check_settings(config: QuantizeConfig, qllm: bool) -> None:
    """Raise LowBitError, as check_exports does, for the artifact that quantize is going to write. qllm: its method."""
    weights, scheme = config.weights, Scheme.parse(config.weights.scheme)
    low_bit = scheme.act_bits < 16
    there = (
        weights.chooses_bits,
        qllm and config.reassembly.mode != "none",
        qllm and config.correction.mode == "branch",
        low_bit and (qllm if weights.attention is None else weights.attention),
        weights.rotation != "none",
        low_bit and qllm and weights.clipping != "none",
        weights.lm_head_bits > 0,
        weights.experts != "none",
        low_bit and weights.shard_groups != 1,
    )
    form = _choose_format(scheme, there)
    if form == INT8 and (not weights.symmetric or weights.group_size is not None):
        what = "weights without a zero point and with one scale per output channel; quantize with"
        raise LowBitError(f"{INT8} holds {what} weights.symmetric=true and without weights.group_size, or {INSTEAD}")
    if weights.real_zero:
        raise LowBitError(f"{PACKED} holds whole zero points; quantize without weights.zero_point=real, or {INSTEAD}")


def _choose_format(scheme: Scheme, there: Sequence[bool]) -> str:
    """Return the format of a scheme. there: whether each of NO_PLACE is in the artifact."""
    if scheme.act_bits not in (8, 16) or (scheme.act_bits == 8 and scheme.weight_bits != 8):
        found, fix = f"activations of {scheme.act_bits} bits", "W4A16, or with W8A8"
    elif any(there):
        found, fix = list(NO_PLACE.items())[there.index(True)]
    else:
        return PACKED if scheme.act_bits == 16 else INT8
    raise LowBitError(f"compressed-tensors has no place for {found}; quantize with {fix}, or {INSTEAD}")


def export_linear(name: str, weight: QuantizedWeight, packed: bool) -> dict[str, Tensor]:
    """Return {name of the file's tensor: tensor} of one linear. Raises LowBitError for zero points that do not fit."""
    bits, groups = weight.num_bits, weight.scale.shape[1]
    half = 2 ** (bits - 1)
    symmetric = is_symmetric(weight)
    if not packed:
        if not symmetric or groups > 1:
            what = "weights without a zero point" if not symmetric else "one scale per output channel"
            fix = "weights.symmetric=true" if not symmetric else "weights.group_size left out"
            raise LowBitError(f"{INT8} holds {what}: {name} has others; quantize with {fix}, or {INSTEAD}")
        codes = (weight.codes().to(torch.int16) - half).to(torch.int8)
        return {f"{name}.weight": codes, f"{name}.weight_scale": weight.scale}
    tensors = {
        f"{name}.weight_packed": _as_int32(weight.packed_weight),
        f"{name}.weight_scale": weight.scale,
        f"{name}.weight_shape": torch.tensor([len(weight.packed_weight), weight.in_features]),
    }
    if not symmetric:
        zeros = weight.zero_point
        if not torch.equal(zeros, zeros.round().clamp(0, 2 * half - 1)):
            raise LowBitError(
                f"{PACKED} holds whole zero points from 0 to {2 * half - 1}: {name} has others; quantize with "
                f"weights.symmetric=true, or {INSTEAD}"
            )
        # Packed along the output channels: the packed rows are those of the transposed zero points.
        tensors[f"{name}.weight_zero_point"] = _as_int32(pack_bits(zeros.T.to(torch.uint8).contiguous(), bits)).T
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def is_symmetric(weight: QuantizedWeight) -> bool:
    """Tell whether every zero point is the middle code."""
    return bool((weight.zero_point == 2 ** (weight.num_bits - 1)).all())


def describe(model: nn.Module, checkpoint: LowBitCheckpoint, form: str) -> dict[str, Any]:
    """Return the quantization_config that config.json gets."""
    weights = list(checkpoint.linears.values())
    groups = {weight.in_features // weight.scale.shape[1] for weight in weights}
    per_channel = all(weight.scale.shape[1] == 1 for weight in weights)
    if not per_channel and len(groups) > 1:
        raise LowBitError("linears have groups of several sizes; quantize with one weights.group_size")
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in checkpoint.linears]
    how: Mapping[str, Any] = {
        "num_bits": checkpoint.scheme.weight_bits,
        "type": "int",
        "symmetric": all(is_symmetric(weight) for weight in weights),
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else groups.pop(),
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    activations = None if form == PACKED else tokens
    group = {"targets": ["Linear"], "weights": how, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {"group_0": group},
    }


def _as_int32(packed: Tensor) -> Tensor:
    """Return rows of packed bytes as int32, the last of a row filled up with zeros."""
    return F.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
