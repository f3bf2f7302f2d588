"""Attention inside Megatron-Core: by torch's scaled_dot_product_attention, and quantized.

SdpaAttention takes the place of Megatron's DotProductAttention, which materializes all scores; it is what Hugging Face
models call too, so that the engines agree to the last bit. quantize() is for any core attention: Q and K after RoPE,
and V, per token and head (QLLM, arXiv 2310.08041).

Without a cache, and in the static engine, all three reach core_attention after RoPE and are quantized there. The
dynamic engine appends K and V to its paged cache after RoPE, so they are quantized on the way in, once, and Q on its
way to the flash kernel. The caches keep Megatron's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.adapters import patching
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import hadamard
from megatron_lowbit.quant.affine import fake_quantize


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return softmax(scale q k^T) v of the last tokens of each sequence.

    query: [tokens, batch, heads, d]; key, value: [length, batch, groups, d]; -> [tokens, batch, heads, d].
    """
    tokens, length = query.shape[0], key.shape[0]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    mask = None
    if 1 < tokens < length:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, 1 < tokens == length, scale=scale, enable_gqa=grouped)
    return y.permute(2, 0, 1, 3)


class SdpaAttention(nn.Module):
    """Causal core attention: query [tokens, batch, heads, d] -> [tokens, batch, heads * d].

    Masks are not looked at; raises LowBitError for packed sequences.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any):
        super().__init__()
        self.dropout = config.attention_dropout
        self.scale = options.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is not None:
            raise LowBitError("packed sequences need another core attention; rewrite Megatron's own spec")
        dropout = self.dropout if self.training else 0.0
        return causal_attention(query, key, value, self.scale, dropout).flatten(2)


def quantize(model: nn.Module, act_bits: int, rotated: bool = False) -> None:
    """Have the self-attention of every layer of a GPTModel quantize Q, K and V; undone by `remove`.

    rotated: whether Q and K are first multiplied by the Hadamard matrix of a head (R3 of qllm/rotation.py).
    """
    if act_bits == 16:
        return
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    found = [getattr(layer, "self_attention", None) for layer in layers]
    patching.undo_with(model, Quantized([a for a in found if hasattr(a, "linear_qkv")], act_bits, rotated))


class Quantized:
    """Have these self-attention modules quantize Q, K and V to act_bits, Q and K rotated first where `rotated` is set;
    call it to undo.

    What it sets holds the modules as data, so that a copy of the model computes with, and is undone by, its own.
    """

    def __init__(self, modules: Iterable[Any], act_bits: int, rotated: bool = False):
        self.modules = list(modules)
        self.handles = [
            module.core_attention.register_forward_pre_hook(partial(_quantize_inputs, act_bits, rotated))
            for module in self.modules
        ]
        for module in self.modules:
            for name, method in _METHODS.items():
                setattr(module, name, partial(method, module, act_bits, rotated))

    def __call__(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.modules:
            for name in _METHODS:
                delattr(module, name)


def _quantize_inputs(act_bits: int, rotated: bool, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Quantize the inputs of core_attention(query, key, value, ...) before it runs."""
    query, key, value = args[:3]
    rounded = (rounded_qk(query, act_bits, rotated), rounded_qk(key, act_bits, rotated), fake_quantize(value, act_bits))
    return (*rounded, *args[3:])


def rounded_qk(x: Tensor, act_bits: int, rotated: bool) -> Tensor:
    """Return Q or K [..., d] after RoPE as attention is to see it: rotated, where it is to be, and quantized."""
    return fake_quantize(hadamard(x, 1) if rotated else x, act_bits)


class _QuantizedAppend:
    """An inference context whose cache gets quantized K and V; everything else is the context's own."""

    def __init__(self, context: Any, act_bits: int, rotated: bool):
        self._context, self._act_bits, self._rotated = context, act_bits, rotated

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        key, value = rounded_qk(key, self._act_bits, self._rotated), fake_quantize(value, self._act_bits)
        self._context.append_key_value_cache(layer_number, key, value)


def _adjust_key_value(
    attention: Any, act_bits: int, rotated: bool, inference_context: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run Megatron's own method, with K and V quantized on their way into a paged cache."""
    if inference_context is not None and not inference_context.is_static_batching():
        inference_context = _QuantizedAppend(inference_context, act_bits, rotated)
    return type(attention)._adjust_key_value_for_inference(attention, inference_context, *args, **kwargs)


def _flash_decode_and_prefill(
    attention: Any, act_bits: int, rotated: bool, query: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run Megatron's own method, on a quantized query; K and V come quantized from the cache."""
    return type(attention).flash_decode_and_prefill(attention, rounded_qk(query, act_bits, rotated), *args, **kwargs)


# {method of Megatron's Attention: what takes its place}
_METHODS = {
    "_adjust_key_value_for_inference": _adjust_key_value,
    "flash_decode_and_prefill": _flash_decode_and_prefill,
}
