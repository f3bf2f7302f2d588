"""What quantization leaves as it is in a model's blocks, and why, in one line."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from megatron_lowbit.adapters.huggingface.apply import decoder_blocks, find_linears, model_config
from megatron_lowbit.adapters.huggingface.experts import replaced_tensors
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.say import say


def tell_full_precision(model: Any, experts: str) -> None:
    """Print, on rank 0, which weights of the blocks stay in full precision; nothing where all are quantized.

    experts: weights.experts.
    """
    parts = left_out(model, experts)
    if parts and env_rank() == 0:
        say(f"in full precision stay {'; '.join(parts)}")


def left_out(model: Any, experts: str = "none") -> list[str]:
    """Return `name, name (why)` for every reason; names within a block. experts: weights.experts."""
    prefix, blocks = decoder_blocks(model)
    known = replaced_tensors(model)
    linears, hidden = find_linears(model), model_config(model).hidden_size
    found: dict[str, dict[str, None]] = {}
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for name, parameter in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if parameter.ndim < 2 or (leaf == "weight" and f"{prefix}.{index}.{owner}" in linears):
                continue
            if f"{prefix}.{index}.{name}" in known:
                if experts != "none":
                    continue
                why = "experts that a router chooses; weights.experts quantizes them"
            else:
                why = _why(modules[owner], owner, parameter.ndim, hidden)
            found.setdefault(why, {})[owner if leaf == "weight" else name] = None
    return [f"{', '.join(names)} ({why})" for why, names in found.items()]


def _why(module: nn.Module, name: str, dims: int, hidden: int) -> str:
    if re.search(r"experts?(\.|$)", name) and dims == 3:
        return "experts that a router chooses"
    if re.search(r"router|(^|[._])gate(\.|$)", name) or (type(module) is not nn.Linear and "gate" in name):
        return "routers"
    if type(module) is not nn.Linear:
        return "no plain linears"
    if module.in_features != hidden:
        return "inputs other than the hidden states"
    return "of no pair that reads and writes the hidden states"
