"""What ranks tell each other, as bytes: JSON, and tensors beside it in the format of safetensors.

Reading them runs no code, which unpickling would: whoever could reach a rank's port could run what he liked in it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_TEXT = "json"


def encode(value: Any) -> Tensor:
    """Return uint8 [bytes] that `decode` makes the value from.

    value: None, bool, int, float, str, a Tensor, and lists, tuples (lists when they are read) and dicts with str keys
    of these. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return _bytes(save({**tensors, _TEXT: _bytes(text)}))


def decode(message: Tensor) -> Any:
    """Return the value that `encode` was given; its tensors are on the CPU."""
    tensors = load(message.cpu().numpy().tobytes())
    return _value(json.loads(tensors.pop(_TEXT).numpy().tobytes()), tensors)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item, tensors) for key, item in value.items()}}
    raise TypeError(f"ranks tell each other plain values and tensors, not {type(value).__name__}")


def _value(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_value(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    return {key: _value(item, tensors) for key, item in plain["dict"].items()}
