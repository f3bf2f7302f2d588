"""What of a patched model can be trained, and a refusal where training would need weights that are no longer there.

    packed linears, replaced norms    frozen: no optimizer trains them; the gradient passes straight through
    linears of low-bit communication  their full-precision weight stays the model's own Parameter, and is trained
    all else (embeddings, biases...)  trained as without the patch

So an optimizer is made after the patch, and after a checkpoint has come to a Megatron spec that packs it. One that was
made before holds weights that are out of the model: they would never get a gradient, and its steps would leave them as
they are without a word. Its next step is refused instead.
(DeepSpeed's optimizers hold copies of the weights; apply_to_deepspeed looks at the engine.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_lowbit.config import LowBitError

_ORPHAN = "_lowbit_orphan"  # on a parameter that is out of its model: of what, what became of it, and what to do
_watching: list[Any] = []


def mark_orphans(model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Have optimizers refuse to train the parameters of `replaced` modules that `model` does not hold any more."""
    present = {id(parameter) for parameter in model.parameters()}
    for name, module in replaced.items():
        for parameter in module.parameters():
            if id(parameter) not in present:
                _mark(
                    parameter,
                    f"the weight of {name}, which a low-bit module has replaced; make the optimizer after apply_to_*, "
                    "or train the model before (megatron_lowbit.remove restores it)",
                )


def mark_packed(weight: nn.Parameter, name: str) -> None:
    """Have optimizers refuse to train a weight that the load of a checkpoint has packed. name: of its module."""
    _mark(
        weight,
        f"the weight of {name}, which was packed when a checkpoint was loaded; make the optimizer after the load, or "
        "load while the model is in training mode, which trains the weight straight through the rounding",
    )


def _mark(parameter: nn.Parameter, what: str) -> None:
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_refuse_orphans))
    if parameter.requires_grad:
        setattr(parameter, _ORPHAN, what)


def unmark_orphans(modules: Mapping[str, nn.Module]) -> None:
    """Let optimizers train parameters whose modules are back in their model."""
    for module in modules.values():
        for parameter in module.parameters():
            if hasattr(parameter, _ORPHAN):
                delattr(parameter, _ORPHAN)


def _refuse_orphans(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            what = getattr(parameter, _ORPHAN, None)
            if what is not None:
                raise LowBitError(f"the optimizer trains {what}")
