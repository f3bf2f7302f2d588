"""Quantized attention of Hugging Face models: Q and K after RoPE, and V, per token and head (QLLM, arXiv 2310.08041).

    softmax( Q(q) Q(k)^T / sqrt(d) ) Q(v)          the softmax's output keeps its precision, as in the paper

Where the checkpoint is rotated, q and k are first multiplied by the Hadamard matrix of a head (R3 of qllm/rotation.py):
their product stays, and an outlier channel is spread out over the head. K lies rotated in a packed cache.

Registered with transformers as an attention function that wraps the model's own (sdpa, eager, ...) and reads the number
of bits from the attention module; a module without it computes as before. Families whose attention is code of their own
(Bloom, GPT-J, ...) are not reached: a warning names them (possible_bits).

While tokens are generated, K and V are packed in the cache (cache.py). (Layers that keep a sliding window stay
unpacked; their K and V are quantized when they are read.)
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface.cache import QUANTIZED, layer_classes, replace_empty_layer
from megatron_lowbit.adapters.patching import undo_with
from megatron_lowbit.kernels.hadamard import hadamard
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import UNCLIPPED, Clips, attention_clips
from megatron_lowbit.runtime.launcher_env import env_rank

logger = logging.getLogger("megatron_lowbit")

_BLOCK = re.compile(r".*?\.\d+\.")  # model.layers.0.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' own name of it, in every forward that uses it
_PREFIX = "lowbit_"  # of the names under which transformers knows the quantizing attention functions
_BITS = "_lowbit_act_bits"  # on an attention module
_ROTATED = "_lowbit_rotated"  # on an attention module: Q and K are rotated
_CLIPS = "_lowbit_clips"  # on an attention module: ratios of the ranges of Q, K and V
_QUANTIZERS = "_lowbit_quantizers"  # on an attention module whose ranges are trained


class Quantized:
    """Have these attention modules quantize Q, K and V to act_bits and keep them packed in caches; call it to undo.

    modules: of the model that owns `config`, each with a layer_idx; clips: of Q, K and V of each. rotated: whether Q
    and K are rotated first. It holds what it has changed, so that a copy of the model, or one that was pickled, is
    undone by its own copy.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        config: Any,
        act_bits: int,
        clips: Iterable[Clips],
        rotated: bool = False,
    ):
        self.modules, self.config = list(modules), config
        enable(config)
        set_bits(self.modules, act_bits)
        set_rotated(self.modules, rotated)
        for module, of_module in zip(self.modules, clips, strict=True):
            setattr(module, _CLIPS, of_module)
        self.handles = [
            module.register_forward_pre_hook(_before_attention, with_kwargs=True) for module in self.modules
        ]

    def __call__(self) -> None:
        disable(self.config)
        for module in self.modules:
            disable(getattr(module, "config", self.config))
        set_bits(self.modules, 16)
        set_rotated(self.modules, False)
        for module in self.modules:
            vars(module).pop(_CLIPS, None)
        for handle in self.handles:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(plain_name(self.config._attn_implementation))  # in a new process it is not known yet


class Growing:
    """Have these attention modules, which do not quantize, write K and V in place in caches; call it to undo."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.handles = [
            module.register_forward_pre_hook(_before_plain_attention, with_kwargs=True) for module in modules
        ]

    def __call__(self) -> None:
        for handle in self.handles:
            handle.remove()


def takes_part(module: nn.Module) -> bool:
    """Tell whether an attention module attends through transformers' attention interface, or by code of its own, where
    nothing here is called."""
    methods = (vars(kind).get("forward") for kind in type(module).__mro__)
    return any(_INTERFACE in inspect.unwrap(m).__code__.co_names for m in methods if inspect.isfunction(m))


def possible_bits(model: nn.Module, linears: Iterable[str], act_bits: int) -> int:
    """Return the bits that Q, K and V of a model get where act_bits are wanted: 16 where all attention is code of its
    own.

    linears: fqns of those that are quantized. Logs a warning that names the blocks whose attention stays as it is.
    """
    if act_bits == 16:
        return 16
    blocks: dict[str, list[str]] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in linears):
        block = _BLOCK.match(owner + ".")
        if block is not None:
            blocks.setdefault(block.group(), []).append(owner)
    left = [owners[0] for owners in blocks.values() if not any(takes_part(model.get_submodule(o)) for o in owners)]
    if left and env_rank() == 0:
        logger.warning(
            "%s: in %d of %d blocks (first: %s, a %s) attention is code of its own, not transformers' attention "
            "interface: Q, K and V stay in full precision there",
            getattr(getattr(model, "config", None), "model_type", type(model).__name__),
            len(left),
            len(blocks),
            left[0],
            type(model.get_submodule(left[0])).__name__,
        )
    return 16 if len(left) == len(blocks) else act_bits


def set_bits(modules: Iterable[nn.Module], act_bits: int) -> None:
    """Have these attention modules quantize Q, K and V to act_bits; 16: not at all."""
    for module in modules:
        setattr(module, _BITS, act_bits)


def set_rotated(modules: Iterable[nn.Module], rotated: bool) -> None:
    """Have these attention modules rotate Q and K, whatever their bits."""
    for module in modules:
        setattr(module, _ROTATED, rotated)


def set_quantizers(module: nn.Module, quantizers: nn.ModuleList) -> None:
    """Have an attention module whose bits are set quantize Q, K and V by modules of its own."""
    setattr(module, _QUANTIZERS, quantizers)


def quantizers_of(module: nn.Module) -> Sequence[nn.Module]:
    """Return what set_quantizers has set; empty without."""
    return getattr(module, _QUANTIZERS, ())


def plain_name(implementation: str | None) -> str:
    """Return the attention function's own name, of a name that `enable` may have changed."""
    return (implementation or "eager").removeprefix(_PREFIX)


def enable(config: Any) -> str:
    """Route the attention of the model that owns `config` through this module; returns the function's name before."""
    before = plain_name(config._attn_implementation)
    if config._attn_implementation != _PREFIX + before:
        register(before)
        config._attn_implementation = _PREFIX + before
    return before


def disable(config: Any) -> None:
    """Undo `enable`; a function that was chosen since then stays chosen."""
    if (config._attn_implementation or "").startswith(_PREFIX):
        config._attn_implementation = plain_name(config._attn_implementation)


def register(implementation: str) -> None:
    """Tell transformers the quantizing counterpart of one of its attention functions."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _PREFIX + implementation
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, implementation))
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
):
    """Run the attention function `implementation` on quantized query, key, value [batch, heads, tokens, head_dim]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    act_bits = getattr(module, _BITS, 16)
    if getattr(module, _ROTATED, False):
        query, key = (t if hasattr(t, QUANTIZED) else hadamard(t, 1) for t in (query, key))
    if act_bits < 16:
        how: Sequence[Callable[[Tensor], Tensor]] = quantizers_of(module) or [
            partial(fake_quantize, num_bits=act_bits, clip=clip) for clip in getattr(module, _CLIPS, UNCLIPPED)
        ]
        query, key, value = (
            t if hasattr(t, QUANTIZED) else quantize(t) for t, quantize in zip((query, key, value), how, strict=True)
        )
    if implementation == "eager":  # every model brings its own, in its own file
        attend = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(module, query, key, value, attention_mask, **options)


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Prepare a run of an attention module: quantize whatever attention function has been chosen since the last run
    (model.set_attn_implementation), and have K and V packed in a cache layer that is still empty."""
    config: Any = getattr(module, "config", None)
    if config is not None:
        enable(config)
    how = getattr(module, _BITS), getattr(module, _ROTATED, False), getattr(module, _CLIPS, UNCLIPPED)[1:]
    replace_empty_layer(
        kwargs.get("past_key_values"), getattr(module, "layer_idx", None), lambda: layer_classes().packed(*how)
    )


def _before_plain_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have K and V written in place in a cache layer that is still empty; compiled models keep their own layers."""
    if torch.compiler.is_compiling():
        return
    replace_empty_layer(
        kwargs.get("past_key_values"), getattr(module, "layer_idx", None), lambda: layer_classes().growing()
    )


def quantize_attention(model: Any, checkpoint: LowBitCheckpoint, config: Any) -> None:
    """Have the model's attention quantize Q, K and V and pack the cache, or else write it in place; undone by
    `remove`."""
    act_bits = possible_bits(model, checkpoint.linears, checkpoint.attention_bits)
    owners = {name.rpartition(".")[0] for name in checkpoint.linears}
    modules = {name: m for name, m in model.named_modules() if name in owners and takes_part(m)}
    if act_bits == 16:
        undo_with(model, Growing(modules.values()))
        return
    clips = [attention_clips(checkpoint.clipping, name) for name in modules]
    rotated = checkpoint.rotation is not None and checkpoint.rotation.attention
    undo_with(model, Quantized(modules.values(), config, act_bits, clips, rotated))
