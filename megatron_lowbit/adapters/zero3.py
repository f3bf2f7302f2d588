"""Models under DeepSpeed's ZeRO stage 3, which spreads every parameter over the data-parallel ranks.

A module's own hooks gather its parameters when it runs, and let go of them afterwards; in between they are empty. So
values are read by `gathered`, a module that takes another's place is no longer under hooks, and one that keeps a spread
weight keeps the hooks of its original.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


def is_spread(parameter: Tensor | None) -> bool:
    """Tell whether a parameter is one of ZeRO stage 3."""
    return hasattr(parameter, "ds_id")


def is_zero3(model: nn.Module) -> bool:
    """Tell whether ZeRO stage 3 has spread a model's parameters."""
    return any(is_spread(parameter) for parameter in model.parameters())


def gathered(parameter: Any) -> Any:
    """Return a parameter as it is, or, of a spread one, its values as a new, frozen parameter: a collective call."""
    if parameter is None or not is_spread(parameter):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return nn.Parameter(parameter.data.clone(), requires_grad=False)


def without_hooks(module: nn.Module) -> nn.Module:
    """Take the hooks off a module and its parts, which hold no spread parameters any more."""
    for part in module.modules():
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
    return module


class SpreadShard(nn.Module):
    """Full-precision x_r W_r^T of one rank by the row-parallel layer that was there, without its all-reduce and bias.

    As DenseShard (layers/linear.py), for a weight that stays spread: the layer's hooks gather it at every call.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = copy.copy(layer)  # with the hooks of the original
        vars(self.layer)["_parameters"] = {**layer._parameters, "bias": None}
        self.layer.mp_group = None  # nothing to reduce over

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.layer(x)
