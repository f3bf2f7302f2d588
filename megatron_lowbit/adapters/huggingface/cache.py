"""KV caches that grow in place, and that hold K and V packed where attention quantizes them.

A DynamicLayer of transformers copies all of K and V for every token that is generated (torch.cat). A GrowingLayer has
room for the tokens to come, and writes only the new ones. A PackedLayer keeps codes in such room.

Both are what takes the place of a DynamicLayer that an attention module meets empty, so `generate` and every cache that
is made for the model have them. Layers that keep a sliding window stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lowbit.kernels import decode_tokens, encode_tokens
from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.quant.input_clipping import WHOLE, Clip

QUANTIZED = "_lowbit_quantized"  # on a K or V that comes from a PackedLayer
SPARE_TOKENS = 64  # room for tokens to come: all of a cache is copied once in so many tokens, not for each


class Room:
    """Memory [batch, heads, tokens, width] of which the first `used` tokens are written."""

    def __init__(self, memory: Tensor):
        self.memory, self.used = memory, 0

    def write(self, rows: Tensor) -> Tensor:
        """Write the next tokens [batch, heads, new, width]; returns all that are written, a view."""
        begin, self.used = self.used, self.used + rows.shape[-2]
        self.memory[..., begin : self.used, :] = rows
        return self.memory[..., : self.used, :]

    def takes(self, past: Tensor, new: Tensor) -> bool:
        """Tell whether `past` is what was written, all of it and nowhere else, and `new` fits behind it.

        Else a cache was cropped, reordered, moved, or is a copy that shares this room; what is written stays then.
        """
        written = self.memory[..., : self.used, :]
        same = (past.data_ptr(), past.shape, past.stride()) == (written.data_ptr(), written.shape, written.stride())
        return same and past.device == new.device and self.used + new.shape[-2] <= self.memory.shape[-2]


def append(room: Room | None, past: Tensor, new: Tensor) -> tuple[Room | None, Tensor]:
    """Return (the room, past and new [batch, heads, tokens, width] one behind the other).

    There is no room, and torch.cat copies them or says what is wrong, where a backward pass may follow, which keeps
    what it was shown; where the two are not of one kind; and for a prompt: room in each layer while it runs leaves
    holes between its activations, and takes more time and memory than the copy at the first token behind it.
    """
    alike = (past.dtype, past.shape[:-2], past.shape[-1]) == (new.dtype, new.shape[:-2], new.shape[-1])
    if torch.is_grad_enabled() or not alike or not past.shape[-2]:
        return None, torch.cat([past, new], dim=-2)
    if room is None or not room.takes(past, new):
        tokens = past.shape[-2] + new.shape[-2] + SPARE_TOKENS
        with torch.inference_mode(False):  # a cache may go on outside the mode
            room = Room(new.new_empty((*new.shape[:-2], tokens, new.shape[-1])))
        room.write(past)
    return room, room.write(new)


class Layers(NamedTuple):
    """The two classes, which need transformers."""

    growing: type
    packed: type


@functools.cache
def layer_classes() -> Layers:
    """Return GrowingLayer and PackedLayer, made on first use: `import megatron_lowbit` must not import transformers.

    Whatever transformers does to a DynamicLayer along its first three dimensions (crop, reorder, repeat) it can do to
    these.
    """
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """A DynamicLayer with room for tokens to come: the same K and V."""

        key_room: Room | None = None
        value_room: Room | None = None

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = self.rows_of(key_states[..., :0, :], value_states[..., :0, :])
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            keys, values = self.rows_of(key_states, value_states)
            self.key_room, self.keys = append(self.key_room, self.keys, keys)
            self.value_room, self.values = append(self.value_room, self.values, values)
            return self.keys, self.values

        def reset(self) -> None:
            super().reset()
            self.key_room = self.value_room = None

        def rows_of(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
            """Return what is kept of new tokens."""
            return key_states, value_states

    class PackedLayer(GrowingLayer):
        """K and V as rows of bytes, uint8 [batch, heads, tokens, row_bytes] (kernels/token_rows.py); attention reads
        them decoded."""

        def __init__(self, num_bits: int, rotated: bool = False, clips: tuple[Clip, Clip] = (WHOLE, WHOLE)):
            super().__init__()
            self.num_bits, self.rotated, self.clips = num_bits, rotated, clips

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.head_dim, self.value_dim = key_states.shape[-1], value_states.shape[-1]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rows = super().update(key_states, value_states)
            decoded = []
            for packed, width in zip(rows, (self.head_dim, self.value_dim), strict=True):
                tensor = decode_tokens(packed, self.num_bits, width, self.dtype)
                setattr(tensor, QUANTIZED, True)  # rounding twice would be another rounding
                decoded.append(tensor)
            return decoded[0], decoded[1]

        def rows_of(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
            if self.rotated:
                key_states = hadamard(key_states, 1)
            of_keys, of_values = self.clips
            return encode_tokens(key_states, self.num_bits, *of_keys), encode_tokens(
                value_states, self.num_bits, *of_values
            )

    return Layers(GrowingLayer, PackedLayer)


def replace_empty_layer(cache: Any, index: int | None, make: Callable[[], Any]) -> None:
    """Put make() in place of a DynamicLayer of a DynamicCache, or where one would be added, as long as it is empty."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not isinstance(cache, DynamicCache) or index is None:
        return
    if index == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(make())
    elif index < len(cache.layers):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = make()
