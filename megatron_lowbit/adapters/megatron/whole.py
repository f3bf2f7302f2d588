"""A rewrite is whole, or it is an error: the linears that would be left in full precision among low-bit ones.

Left with intent are the experts that a mixture's router chooses, the embedding, the output layer, and projections that
every rank holds whole (TELinear, of multi-latent attention): nothing of theirs is shared among the ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import nn

from megatron_lowbit.adapters.megatron.layers import OVERLAP
from megatron_lowbit.adapters.megatron.layout import find_linears, numbered_layers
from megatron_lowbit.adapters.megatron_names import PATHS
from megatron_lowbit.config import LowBitError

_SHOWN = 4  # names in an error


def is_parallel(kind: type) -> bool:
    """Tell whether a class is a tensor-parallel linear, of whichever library, or derives from one."""
    return any(re.search("(Column|Row)Parallel.*Linear", base.__name__) for base in kind.__mro__)


def is_moe(node: Any) -> bool:
    """Tell whether a part of a spec holds the experts of a mixture. Of these the shared one alone is replaced."""
    return type(node).__name__ == "MoESubmodules"


def check_spec(spec: Any) -> None:
    """Raise LowBitError for a rewritten spec that still names tensor-parallel linears of others."""
    _refuse(list(_left_in_spec(spec)), "spec")


def check_model(model: Any) -> None:
    """Raise LowBitError for a GPTModel that has linears in its layers which would not be replaced."""
    known = {id(module) for _, module in find_linears(model).values()}
    left: dict[str, type] = {}
    for index, _, layer in numbered_layers(model):
        kept: list[str] = []
        for path, module in layer.named_modules():
            if isinstance(module, BaseMoELayer):
                check_shared_expert(module, f"decoder.layers.{index}.{path}.shared_experts")
                kept += [f"{path}.{name}" for name, _ in module.named_children() if name != "shared_experts"]
        for path, module in layer.named_modules():
            if id(module) in known:
                kept.append(f"{path}.")  # what is inside a linear of ours that was packed on load is part of it
            if id(module) in known or isinstance(module, IdentityOp) or path.startswith(tuple(kept)):
                continue
            if path in PATHS.values() or isinstance(module, nn.Linear) or is_parallel(type(module)):
                left[f"decoder.layers.{index}.{path}"] = type(module)
                kept.append(f"{path}.")
    _refuse([f"{path} ({kind.__name__})" for path, kind in left.items()], "model")


def check_shared_expert(mixture: Any, path: str) -> None:
    """Raise LowBitError for a shared expert that does not call its linears as an MLP does.

    mixture: a MoELayer; path: of its shared expert.
    """
    shared = mixture.shared_experts
    if shared is None:
        return
    if mixture.config.moe_shared_expert_overlap:
        raise LowBitError(OVERLAP)
    if type(shared) is not SharedExpertMLP:
        raise LowBitError(
            f"{path} is a {type(shared).__name__}, which does not call its linears; build the model with "
            "use_grouped_gemm_for_shared_expert=False"
        )


def _left_in_spec(node: Any, path: str = "") -> Iterator[str]:
    """Yield where a rewritten spec names linears of others: "mlp.linear_fc1 (TheirLinear)"."""
    if isinstance(node, type):
        if is_parallel(node) and not node.__name__.startswith("LowBit"):
            yield f"{path} ({node.__name__})"
    elif isinstance(node, functools.partial):
        for part in (node.func, *node.args, *node.keywords.values()):
            yield from _left_in_spec(part, path)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _left_in_spec(item, path)
    elif isinstance(node, dict):
        for value in node.values():
            yield from _left_in_spec(value, path)
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            if is_moe(node) and field.name != "shared_experts":
                continue
            inside = path if field.name in ("module", "submodules", "params") else f"{path}.{field.name}".lstrip(".")
            yield from _left_in_spec(getattr(node, field.name, None), inside)


def _refuse(left: list[str], what: str) -> None:
    if left:
        unique = list(dict.fromkeys(left))
        more = f", and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
        raise LowBitError(
            f"the {what} would be quantized only in part; megatron_lowbit does not know {', '.join(unique[:_SHOWN])}"
            f"{more}; use Megatron-Core's own classes there"
        )
