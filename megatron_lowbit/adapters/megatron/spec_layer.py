"""A decoder layer of a ready spec: Megatron's own, that shows the finished GPTModel to whoever fills it.

A spec's object is all that Megatron-LM's `--spec` lets us choose, and a layer is the first thing that is built from it.
It sees the model's TransformerConfig before anything else is built, and learns which GPTModel it is a part of when
that takes in its decoder (torch's hook on the registration of modules). GPTModel calls `finish_init` of all its modules
at the end of its constructor: then it is whole, and nothing has been loaded, cast to 16 bits or wrapped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class SpecLayer(TransformerLayer):
    """Megatron's TransformerLayer, with the same tensors and arithmetic.

    filler: `check(config)` is called before the first layer is built, `fill(model)` once with the whole GPTModel.
    """

    def __init__(self, config: Any, *args: Any, filler: Any, **kwargs: Any):
        filler.check(config)
        super().__init__(config, *args, **kwargs)
        self._filler: Any = filler
        self._model: Callable[[], Any] = _no_model
        _wait_for_model(self)

    def finish_init(self, quantization_config: Any) -> None:
        """Have the model filled; GPTModel calls it. The first of its layers speaks for all."""
        model = self._model()
        if model is not None and model.decoder.layers[0] is self:
            self._filler.fill(model)


def _no_model() -> None:
    """Return None, as a weak reference does whose object is gone."""


_waiting: weakref.WeakSet[SpecLayer] = weakref.WeakSet()  # layers of decoders that no model has taken in yet
_hooks: list[Any] = []  # one, while any layer waits


def _wait_for_model(layer: SpecLayer) -> None:
    _waiting.add(layer)
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_registered))


def _registered(module: nn.Module, name: str, submodule: Any) -> None:
    """Tell the layers of a decoder which module has taken it in."""
    if name != "decoder" or submodule is None:
        return
    for layer in [layer for layer in submodule.modules() if layer in _waiting]:
        layer._model = weakref.ref(module)
        _waiting.discard(layer)
    if not _waiting:
        _hooks.pop().remove()
