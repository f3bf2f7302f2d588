"""Round-to-nearest quantization of a whole model (QLLM, arXiv 2310.08041, eq. 2): the baseline of better methods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.quant.affine import PER_LINEAR, QuantizedWeight, Scheme, choose_qparams
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.clipping import clipped_qparams
from megatron_lowbit.quant.tp_sizes import default_shard_groups, widths_of
from megatron_lowbit.quant.weight_bits import Allocation
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress


def quantize_model(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    config: WeightsConfig,
    fingerprint: Fingerprint,
    dtype: torch.dtype | None = None,
    allocation: Allocation | None = None,
) -> LowBitCheckpoint:
    """Quantize the weights of `linears` ({fqn: module}) and keep every other tensor of `model`, stored as `dtype`.

    allocation: of scheme auto. Raises LowBitError for a scheme without quantized weights, for rounding that needs text,
    for NaN or Inf in any parameter, and for a group size that does not divide a weight's width.
    """
    scheme = Scheme.parse(config.scheme)
    if scheme.weight_bits == 16:
        raise LowBitError(
            f"weights.scheme={config.scheme} quantizes no weights; choose W4A16, W4A8, W4A4, W6A6 or W8A8"
        )
    for key, value in (("rounding", "gptq"), ("clipping", "learned")):
        if getattr(config, key) == value:
            raise LowBitError(
                f"weights.{key}={value} needs calibration text: quantize with weights.method=qllm and calibration.data"
            )
    if scheme.weight_bits == PER_LINEAR and allocation is None:
        raise LowBitError(
            f"weights.scheme={config.scheme} chooses bits on text: write an artifact with quantize, then pass artifact"
        )
    bits_of = {name: allocation.bits[name] if allocation else scheme.weight_bits for name in linears}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in linears and not torch.isfinite(parameter).all():
            raise LowBitError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized")
    qparams = partial(clipped_qparams if config.clipping == "mse" else choose_qparams, real_zero=config.real_zero)
    how = config.symmetric, config.group_size
    packed = {
        name: QuantizedWeight.from_float(module.weight, bits_of[name], *how, name, qparams)
        for name, module in progress(linears.items(), len(linears), f"rounding to {config.scheme}", env_rank())
    }
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        linear, _, leaf = name.rpartition(".")
        if (linear in packed and leaf == "weight") or tensor.data_ptr() in seen:
            continue  # a tied weight (lm_head on the embedding) is stored once
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    bits = scheme.act_bits if config.attention else 16
    hf_config = getattr(model, "config", None)
    groups = config.shard_groups or default_shard_groups(
        getattr(hf_config, "text_config", None) or hf_config, widths_of(linears.values())
    )
    about = (scheme, config.scheme, groups, fingerprint)
    return LowBitCheckpoint(packed, tensors, *about, attention_bits=bits, allocation=allocation)
