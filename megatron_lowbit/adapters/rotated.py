"""What of a host model a rotated checkpoint changes besides the quantized linears: biases, embeddings, norms and output
projection (R1 and R2 of qllm/rotation.py)."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.zero3 import gathered, is_spread, without_hooks
from megatron_lowbit.config import LowBitError
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint


def bias_of(
    checkpoint: LowBitCheckpoint | None,
    name: str,
    bias: Tensor | None,
    rank: int = 0,
    size: int = 1,
    held: Tensor | None = None,
) -> Tensor | None:
    """Return rank `rank`'s share of the bias of a linear: the model's own `bias`, or a rotated checkpoint's.

    held: int64, the outputs that the rank has; None: its equal, consecutive share.
    """
    if bias is None or checkpoint is None or checkpoint.rotation is None:
        return bias
    stored = checkpoint.tensors.get(f"{name}.bias")
    outputs = len(checkpoint.linears[name].packed_weight)
    if stored is None or len(stored) != outputs:
        raise LowBitError(f"the checkpoint has no bias [{outputs}] for {name}; quantize this model again")
    mine = stored.chunk(size)[rank] if held is None else stored.index_select(0, held.to(stored.device))
    return nn.Parameter(mine.to(bias.device, bias.dtype), bias.requires_grad)


def rest_of(
    model: nn.Module, checkpoint: LowBitCheckpoint, replaced: Collection[str], rank: int = 0, size: int = 1
) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the modules outside `replaced` whose parameters a rotated checkpoint changes: the
    embedding, the final norm and the output projection; rank `rank`'s share of a parameter that `size` ranks share.

    Each is a copy that shares all else with the original. Raises LowBitError for a parameter of another shape.
    """
    replacements: dict[str, nn.Module] = {}
    if checkpoint.rotation is None or not checkpoint.rotation.residual:
        return replacements
    modules = dict(model.named_modules())
    for name, stored in checkpoint.tensors.items():
        fqn, _, leaf = name.rpartition(".")
        parameter = None if fqn not in modules or fqn in replaced else modules[fqn]._parameters.get(leaf)
        current = gathered(parameter)
        if current is None:
            continue
        stored = _share(stored, current.shape, rank, size)
        if stored.shape != current.shape:
            raise LowBitError(
                f"{name} is {list(current.shape)} in the model and {list(stored.shape)} in the artifact, which belongs "
                "to another model; quantize this one"
            )
        mine = stored.to(current.device, current.dtype)
        if torch.equal(mine, current.data):
            continue
        replacement = replacements.setdefault(fqn, shallow_copy(modules[fqn]))
        if is_spread(parameter):
            replacement = without_hooks(replacement)
            replacement._parameters = {name: gathered(value) for name, value in replacement._parameters.items()}
        put(replacement, leaf, mine)
    return replacements


def _share(tensor: Tensor, shape: torch.Size, rank: int, size: int) -> Tensor:
    """Return rank `rank`'s share of a whole tensor, along the one dimension in which `shape` is smaller."""
    cut = [d for d, (whole, part) in enumerate(zip(tensor.shape, shape, strict=False)) if whole == part * size != part]
    return tensor.chunk(size, cut[0])[rank] if len(cut) == 1 else tensor


def put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Set a parameter's values by a new one with all else that the old one says of itself."""
    old = module._parameters[leaf]
    assert old is not None
    new = nn.Parameter(tensor.to(old.device, old.dtype), old.requires_grad)
    vars(new).update(vars(old))  # Megatron's: what ranks share, and how its gradient is summed
    module._parameters[leaf] = new


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module with parameters, buffers and submodules of its own to set, the same as before."""
    new = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(new)[name] = dict(vars(module)[name])
    return new
