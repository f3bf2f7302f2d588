"""A Hugging Face model without weights: its structure and buffers, for walking through its blocks one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _no_parameters() -> Iterator[None]:
    """Put parameters that are made inside on the meta device at once; buffers (rotary frequencies) stay real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is, is tied: it has to stay the same object
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(hf_config: Any, dtype: torch.dtype) -> Any:
    """Build the model without weights, for inference."""
    from transformers import AutoModelForCausalLM

    with _no_parameters():
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()


def stored_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return [(name, buffer)] of those that a checkpoint holds, such as a router's correction of its scores."""
    stored = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in stored]
