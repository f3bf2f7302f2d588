"""What becomes of the full-precision weights of a model that is built from a low-bit spec: trained, or packed.

    trained      the weight stays the very Parameter that DistributedDataParallel and the optimizer hold; every forward
                 pass rounds it, and the gradient passes straight through to it (StraightThrough)
    not trained  a checkpoint that is loaded into the layer is packed, and the weight is gone: less memory, no gradient

A packed weight can never be trained again, so the choice falls when a checkpoint is loaded, and for training where that
is in doubt. A weight is trained if

    - Megatron's DistributedDataParallel or an FSDP holds it: it has a main_grad, or is a DTensor; or
    - it requires a gradient, its layer is in training mode (as every model is until .eval()), and the process is not
      one of Megatron's scripts without --train-iters and --train-samples. Megatron's inference scripts load before
      they call eval(), but are never told how long to train.

To have packed weights elsewhere, call .eval() before the checkpoint is loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from megatron_lowbit.adapters.megatron import scripts
from megatron_lowbit.config import LowBitError

logger = logging.getLogger("megatron_lowbit")

_unreported: WeakSet[Any] = WeakSet()  # layers of specs; what became of their weights has not been said yet


def is_held(weight: Tensor | None) -> bool:
    """Tell whether Megatron's DistributedDataParallel or an FSDP, and so an optimizer, holds a weight."""
    return isinstance(weight, DTensor) or hasattr(weight, "main_grad") or hasattr(weight, "get_main_grad")


def is_trained(layer: Any) -> bool:
    """Tell whether the full-precision weight of a layer is trained, by the signs that the module's docstring lists."""
    weight, args = layer.weight, scripts.script_arguments()
    in_inference_script = args is not None and not scripts.trains(args)
    return is_held(weight) or (weight.requires_grad and layer.training and not in_inference_script)


def check_replaceable(linears: Iterable[tuple[str, Any]]) -> None:
    """Raise LowBitError where packed weights would take the place of weights that are being trained.

    linears: (path, module). Nobody would update the packed ones, and the optimizer would go on with weights that no
    longer have an effect. A wrapped model in eval mode may be measured with packed weights until `remove`.
    """
    for path, module in linears:
        if is_held(getattr(module, "weight", None)) and module.training:
            raise LowBitError(held_message(path))


def held_message(path: str) -> str:
    return (
        f"{path} is being trained: DistributedDataParallel and the optimizer hold its weight, which packed weights "
        "would leave without effect; build the model with a low-bit --spec to train it, or call eval() to measure"
    )


def mark_unreported(layer: Any) -> None:
    """Have the next `report_rounding` say what became of a layer's weight."""
    _unreported.add(layer)


def forget(layer: Any) -> None:
    """Have `report_rounding` say nothing of a layer whose place packed weights of an artifact have taken."""
    _unreported.discard(layer)


def report_when_loaded() -> None:
    """Call `report_rounding` if a checkpoint has come to all layers that it will speak of."""
    if all(layer.weight_loaded for layer in _unreported):
        report_rounding()


def report_rounding() -> None:
    """Log on rank 0, in one line, how many linears of this rank are rounded, how, and to which scheme. Once per model:
    by the load of a checkpoint, or by the first forward pass."""
    if not _unreported:
        return
    packed, trained, hint = Counter[str](), Counter[str](), ""
    for layer in _unreported:
        if layer.row_sums is not None:
            packed[layer.recipe.scheme] += 1
        elif layer.rounding() is not None:
            trained[layer.recipe.scheme] += 1
            hint = "" if is_held(layer.weight) else " (to have them packed, call eval() before a checkpoint is loaded)"
    _unreported.clear()
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    parts = []
    if packed:
        parts.append(f"{_counts(packed)} rounded to nearest and packed; their weights are not trained")
    if trained:
        parts.append(
            f"{_counts(trained)} rounded in every forward pass; their full-precision weights are trained "
            f"straight through the rounding{hint}"
        )
    if parts:
        # A warning, because Megatron's scripts show nothing below it, and a rounded model computes something else.
        logger.warning("low-bit linears of this rank: %s", "; ".join(parts))


def _counts(schemes: Counter[str]) -> str:
    return ", ".join(f"{count} {scheme}" for scheme, count in sorted(schemes.items()))
