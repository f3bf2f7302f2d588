"""Megatron-Core's per-layer recipe file with the bits of an artifact: quantization_recipe.yaml.

    configs:
      W3A8: {scheme: W3A8, symmetric: false, zero_point: integer, shard_groups: 8}
    matchers:
      layer_0_linear_fc2: {config: W3A8, type: glob, pattern: "*decoder.layers.0.mlp.linear_fc2", enabled: true}

It is what `TransformerConfig.quant_recipe` takes (megatron.core.quantization: RecipeConfig). A model of our layer spec
that is built with it rounds a full-precision checkpoint to the same bits per layer, on load or in training. Megatron
numbers the layers of each pipeline stage from 0, so the file is for one stage.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_lowbit.adapters.megatron_names import PARTS, PATHS, SHARED, SHARED_ELSEWHERE
from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.io.files import discard, write_text
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

FILE = "quantization_recipe.yaml"


def write_recipe(checkpoint: LowBitCheckpoint, weights: WeightsConfig, folder: str | Path) -> None:
    """Write the recipe beside an artifact of scheme auto whose linears Megatron-Core has; else remove what is there.

    weights: how the linears were rounded.
    """
    path = Path(folder) / FILE
    found = None if checkpoint.allocation is None else recipe(checkpoint, weights)
    if found is None:
        discard(path)
        return
    write_text(path, yaml.safe_dump(found, sort_keys=False))  # the first matcher that fits counts


def recipe(checkpoint: LowBitCheckpoint, weights: WeightsConfig) -> dict[str, Any] | None:
    """Return the file's content; None for a model whose linears do not have the names of a Llama's."""
    roles = {leaf: role for role, (separate, fused) in PARTS.items() for leaf in (*separate, fused)}
    keys = "group_size", "symmetric", "zero_point"
    shared = {key: getattr(weights, key) for key in keys if getattr(weights, key) is not None}
    shared["shard_groups"] = checkpoint.shard_groups
    configs: dict[str, dict[str, Any]] = {}
    matchers: dict[str, dict[str, Any]] = {}
    for name, weight in checkpoint.linears.items():
        found = re.fullmatch(r".*\.(\d+)\.(.+)", name)
        role = None if found is None else roles.get(found[2].replace(SHARED_ELSEWHERE, SHARED))
        if found is None or role is None:
            return None
        number = found[1]
        scheme = f"W{weight.num_bits}A{checkpoint.scheme.act_bits}"
        configs[scheme] = {"scheme": scheme, **shared}
        matchers[f"layer_{number}_{role}"] = {
            "config": scheme,
            "type": "glob",
            "pattern": f"*decoder.layers.{number}.{PATHS[role]}",
            "enabled": True,
        }
    return {"configs": {name: configs[name] for name in sorted(configs)}, "matchers": matchers}
