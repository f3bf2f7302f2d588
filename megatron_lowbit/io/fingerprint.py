"""Tells whether an artifact belongs to a model: shape fields of its config, and a checksum of every linear's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import LowBitError

_FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


Fingerprint = dict[str, Any]


def model_fingerprint(
    config: Any, weights: Mapping[str, Tensor], tp_group: dist.ProcessGroup | None = None
) -> Fingerprint:
    """Return the shape fields of a Hugging Face config and a checksum of each of the blocks' linears.

    weights: {fqn of a tensor-parallel linear: its weight, whole or this rank's shard}. A checksum sums the bit
    patterns of a weight in bf16, so it does not depend on the number of shards, nor on the dtype (a float32
    checkpoint loaded as float16 is the exception: rounding twice is another rounding). Values below float16's
    smallest normal count as 0.
    """
    return fingerprint_of({name: bit_sum(weight.detach()) for name, weight in weights.items()}, config, tp_group)


def fingerprint_of(sums: Mapping[str, Tensor], config: Any, tp_group: dist.ProcessGroup | None = None) -> Fingerprint:
    """Return the model_fingerprint from the bit sums {fqn: int64 scalar} of this rank's weights."""
    if not sums:
        raise LowBitError("the model has no tensor-parallel linears that megatron_lowbit knows")
    names = sorted(sums)
    total = torch.stack([sums[name] for name in names])
    if tp_group is not None:
        dist.all_reduce(total, group=tp_group)
    return {**fingerprint_fields(config), "weights": dict(zip(names, total.tolist(), strict=True))}


def fingerprint_fields(config: Any) -> dict[str, Any]:
    """Return the shape fields of a Hugging Face config."""
    return {name: value for name in _FINGERPRINT_FIELDS if (value := getattr(config, name, None)) is not None}


def bit_sum(weight: Tensor) -> Tensor:
    """Return the sum of the bit patterns in bf16, an int64 scalar; the sums of a weight's shards add up to its own."""
    return row_bit_sums(weight).sum()


def row_bit_sums(weight: Tensor) -> Tensor:
    """Return the bit_sum of every row of a weight [out, in]: int64 [out]."""
    rounded = weight.to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < 2.0**-14, 0, rounded)
    return rounded.contiguous().view(torch.int16).sum(-1, dtype=torch.int64)


def check_fingerprint(what: str, artifact: Fingerprint, model: Fingerprint) -> None:
    """Raise LowBitError naming what differs. Of the linears, those count that both know: an engine may hide some."""
    differing = [
        f"{key} {artifact.get(key)!r} there, {model.get(key)!r} here"
        for key in {**artifact, **model}
        if key != "weights" and artifact.get(key) != model.get(key)
    ]
    there, here = artifact["weights"], model["weights"]
    both = [name for name in here if name in there]
    changed = [name for name in both if here[name] != there[name]]
    if changed or not both:
        differing.append(
            f"other values in {len(changed)} of {len(both)} weights, the first {changed[0] if changed else '-'}"
        )
    if differing:
        raise LowBitError(f"{what} belongs to another model ({'; '.join(differing)}); calibrate and quantize this one")
