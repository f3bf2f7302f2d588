"""Attention inside Megatron-Core: by torch's scaled_dot_product_attention, and quantized.

SdpaAttention takes the place of Megatron's DotProductAttention, which materializes all scores; it is what Hugging Face
models call too, so that the engines agree to the last bit. quantize() is for any core attention: Q and K after RoPE,
and V, per token and head (QLLM, arXiv 2310.08041).

Without a cache, and in the static engine, all three reach core_attention after RoPE and are quantized there. The
dynamic engine appends K and V to its paged cache after RoPE, so they are quantized on the way in, once, and Q on its
way to the flash kernel. The caches keep Megatron's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.megatron.layout import numbered_layers
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import hadamard
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.input_clipping import UNCLIPPED, Clip, Clips


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


def quantize(
    model: nn.Module,
    act_bits: int,
    clips: Callable[[int], Clips] = lambda _: UNCLIPPED,
    rotated: bool = False,
) -> None:
    """Have the self-attention of every layer of a GPTModel quantize Q, K and V; undone by `remove`.

    clips(block): what is left of the ends of their ranges, in the block of that number in the whole model.
    rotated: whether Q and K are first multiplied by the Hadamard matrix of a head (R3 of qllm/rotation.py).
    """
    if act_bits == 16:
        return
    found = [(getattr(layer, "self_attention", None), block) for _, block, layer in numbered_layers(model)]
    modules = [(attention, clips(block)) for attention, block in found if hasattr(attention, "linear_qkv")]
    patching.undo_with(model, Quantized(modules, act_bits, rotated))


class Quantized:
    """Have these self-attention modules, each with its clips, quantize Q, K and V to act_bits, Q and K rotated first
    where `rotated` is set; call it to undo.

    What it sets holds the modules as data, so that a copy of the model computes with, and is undone by, its own.
    """

    def __init__(self, modules: Iterable[tuple[Any, Clips]], act_bits: int, rotated: bool = False):
        how = [(module, HeadQuantizer(act_bits, *clips, rotated)) for module, clips in modules]
        self.modules = [module for module, _ in how]
        self.handles = [
            module.core_attention.register_forward_pre_hook(partial(_quantize_inputs, heads)) for module, heads in how
        ]
        for module, heads in how:
            for name, method in _METHODS.items():
                setattr(module, name, partial(method, module, heads))

    def __call__(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.modules:
            for name in _METHODS:
                delattr(module, name)


class HeadQuantizer(NamedTuple):
    """Quantize Q, K and V [..., d] as attention is to see them, after RoPE: per token and head, with their ranges
    clipped, Q and K rotated first where they are to be."""

    bits: int
    of_q: Clip
    of_k: Clip
    of_v: Clip
    rotated: bool

    def q(self, x: Tensor) -> Tensor:
        return fake_quantize(self._turned(x), self.bits, clip=self.of_q)

    def k(self, x: Tensor) -> Tensor:
        return fake_quantize(self._turned(x), self.bits, clip=self.of_k)

    def v(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, clip=self.of_v)

    def _turned(self, x: Tensor) -> Tensor:
        return hadamard(x, 1) if self.rotated else x


def _quantize_inputs(heads: HeadQuantizer, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Quantize the inputs of core_attention(query, key, value, ...) before it runs."""
    query, key, value, *rest = args
    return heads.q(query), heads.k(key), heads.v(value), *rest


class _QuantizedAppend:
    """An inference context whose cache gets quantized K and V; everything else is the context's own."""

    def __init__(self, context: Any, heads: HeadQuantizer):
        self._context, self._heads = context, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        self._context.append_key_value_cache(layer_number, self._heads.k(key), self._heads.v(value))


def _adjust_key_value(attention: Any, heads: HeadQuantizer, inference_context: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Megatron's own method, with K and V quantized on their way into a paged cache."""
    if inference_context is not None and not inference_context.is_static_batching():
        inference_context = _QuantizedAppend(inference_context, heads)
    return type(attention)._adjust_key_value_for_inference(attention, inference_context, *args, **kwargs)


def _flash_decode_and_prefill(attention: Any, heads: HeadQuantizer, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run Megatron's own method, on a quantized query; K and V come quantized from the cache."""
    return type(attention).flash_decode_and_prefill(attention, heads.q(query), *args, **kwargs)


# {method of Megatron's Attention: what takes its place}
_METHODS = {
    "_adjust_key_value_for_inference": _adjust_key_value,
    "flash_decode_and_prefill": _flash_decode_and_prefill,
}
