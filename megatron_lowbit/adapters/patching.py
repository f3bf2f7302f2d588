"""Swap modules in and out of a model. What was there is kept, off the GPU, so that `remove` restores it."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters import arguments, readers, rotated, training
from megatron_lowbit.adapters.zero3 import gathered, is_spread, without_hooks
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.autotune import measure_costs
from megatron_lowbit.comm.collectives.base import Traffic
from megatron_lowbit.comm.cost import CostTable
from megatron_lowbit.comm.drift import Saturation
from megatron_lowbit.comm.plan import CommPlan, SitePlan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.comm.sequence_parallel import HybridGather
from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import CommConfig, CommMode, LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint, check_fingerprint
from megatron_lowbit.layers.head import QuantHead
from megatron_lowbit.layers.linear import (
    DenseShard,
    QuantLinear,
    QuantRowParallelLinear,
    activation_groups,
    check_fits,
)
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm
from megatron_lowbit.quant.affine import whole_slices
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import WHOLE
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.quant.tp_sizes import groups_for

logger = logging.getLogger("megatron_lowbit")

_PATCH = "_lowbit_replaced"  # {fqn: the module that was there}
_UNDO = "_lowbit_undo"  # restores the attention


def swap(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put each replacement in its place, on the device of what it replaces."""
    replaced: dict[str, nn.Module] = {}
    # A plain attribute, not a registered module: state_dict() and parameters() must not see the originals. It is set
    # first, so that `remove` undoes a swap that ran out of memory halfway.
    object.__setattr__(model, _PATCH, replaced)
    # Known before the first is replaced: originals move off the GPU, and two of them may share a weight.
    devices = {name: _device(model.get_submodule(name)) for name in replacements}
    for name, replacement in replacements.items():
        original, device = model.get_submodule(name), devices[name]
        if not isinstance(replacement, QuantHead):  # whole where DeepSpeed has a share: it was checked when it was made
            check_fits(name, replacement, original)
        model.set_submodule(name, replacement.to(device).train(original.training))
        replaced[name] = original
        for part in replacement.modules():
            if isinstance(part, HybridReducer | HybridGather | VirtualReducer):
                part.set_site(name)
        if device.type != "cpu":
            _move_to_cpu(original, replacement)
    training.mark_orphans(model, replaced)
    logger.info("replaced %d linears of %s", len(replaced), type(model).__name__)


def remove(model: Any) -> Any:
    """Take an artifact out again: restore the modules that an apply_to_* function has replaced.

    Args:
        model: a model, an engine or wrapper with `.module`, or a list of pipeline chunks; changed in place. One without
            low-bit modules stays as it is.

    Returns:
        What was given as `model`.

    Raises:
        AttributeError: a module that was replaced is not in the model any more.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> import megatron_lowbit as lowbit
        >>> model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        >>> before = model(torch.tensor([[5, 6, 7]])).logits
        >>> model = lowbit.remove(lowbit.apply_to_huggingface(model, "artifact"))
        >>> torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
        True
    """
    if isinstance(model, (list, tuple)):
        for chunk in model:
            remove(chunk)
        return model
    module = model
    # vars, because wrappers may answer with their module's attributes as if they were their own.
    while not vars(module).keys() & {_PATCH, _UNDO} and hasattr(module, "module"):
        module = module.module
    if vars(module).keys() & {_PATCH, _UNDO}:
        vars(module).pop("save_pretrained", None)  # as saving.py has set it
    replaced = getattr(module, _PATCH, {})
    for name, original in replaced.items():
        device = _device(module.get_submodule(name))
        module.set_submodule(name, original.to(device))
    training.unmark_orphans(replaced)
    undo = getattr(module, _UNDO, None)
    if undo is not None:
        undo()
    for name in (_PATCH, _UNDO):
        if hasattr(module, name):
            object.__delattr__(module, name)
    return model


def original_modules(model: Any) -> dict[str, nn.Module]:
    """Return {fqn: the module that was replaced there}; empty for a model without low-bit modules."""
    return dict(getattr(getattr(model, "module", model), _PATCH, {}))


def is_patched(model: nn.Module) -> bool:
    """Tell whether an apply_to_* has replaced modules of the model, or of a model that it wraps."""
    return any(vars(module).get(_PATCH) for module in model.modules())


def replacing_modules(model: Any) -> dict[str, nn.Module]:
    """Return {fqn: the low-bit module that is in place}; swap puts them back after a remove."""
    module = getattr(model, "module", model)
    return {name: module.get_submodule(name) for name in original_modules(model)}


def row_parallel_modules(model: Any) -> dict[str, QuantRowParallelLinear]:
    """Return {fqn: module} of the low-bit row-parallel linears that are in place."""
    module = getattr(model, "module", model)
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantRowParallelLinear)}


def site_pairs(model: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return {fqn: (low-bit row-parallel linear that is in place, the module it replaced)}."""
    originals = original_modules(model)
    return {name: (module, originals[name]) for name, module in row_parallel_modules(model).items()}


def site_traffic(model: Any) -> dict[str, Traffic]:
    """Return {fqn of a low-bit row-parallel linear: what its reducer has sent so far}."""
    modules = row_parallel_modules(model)
    return {name: m.reducer.traffic for name, m in modules.items() if m.reducer is not None}


def saturation(model: Any) -> dict[str, Saturation]:
    """Return how many values lay beyond their calibrated ranges, and which sites have fallen back to bf16.

    A site is a low-bit linear whose partial sums, or whose gathered input, are communicated. Waits for the device.

    Args:
        model: a model, an engine or wrapper with `.module`, or a list of pipeline chunks.

    Returns:
        {site: Saturation}, counted by this process since the artifact was applied: values (in low-bit formats),
        saturated (those of them beyond their calibrated range, or NaN), nonfinite (tokens that held NaN or Inf) and
        bf16 (whether the site has fallen back). A site has the linear's name, after the chunk's number where there are
        several pipeline chunks; there is none where nothing is communicated.

    Raises:
        AttributeError: `model` is no module of torch.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> import megatron_lowbit as lowbit
        >>> model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        >>> model = lowbit.apply_to_huggingface(model, "artifact", virtual_tp=2)
        >>> _ = model(torch.tensor([[5, 6, 7]]))
        >>> seen = lowbit.saturation(model)["model.layers.0.mlp.down_proj"]
        >>> seen.values, seen.bf16  # 2 ranks, 3 tokens, 64 features
        (384, False)
    """
    if isinstance(model, (list, tuple)):
        several = len(model) > 1
        found = [(f"{number}." if several else "", saturation(chunk)) for number, chunk in enumerate(model)]
        return {prefix + site: counts for prefix, sites in found for site, counts in sites.items()}
    return {
        part.guard.site or name: part.saturation()
        for name, part in model.named_modules()
        if isinstance(part, HybridReducer | HybridGather | VirtualReducer)
    }


def choose_plan(artifact: Artifact, tp_size: int, comm_mode: CommMode | None) -> CommPlan | None:
    """Return the plan to communicate with; None: an all-reduce. comm_mode None: low-bit where the artifact has a
    plan."""
    if tp_size == 1 or comm_mode in ("native", "bf16") or (comm_mode is None and not artifact.plans):
        return None
    return artifact.plan(tp_size)


@dataclass(frozen=True)
class Reducers:
    """The plan and settings of a model's communication, and what makes a reducer of every site from them."""

    plan: CommPlan | None
    mode: CommMode
    drift_threshold: float | None
    costs: CostTable | None

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        tp_size: int,
        comm: CommMode | CommConfig | None,
        group: dist.ProcessGroup | None = None,
    ) -> Reducers:
        """Choose the plan and costs for `tp_size` ranks. comm: comm.mode, or a whole CommConfig, of which what was
        decided at calibration is not read.

        group: the real ranks, which mode auto measures on where it has no cost_table: a collective call then.
        """
        comm = arguments.as_comm_config(comm)
        plan = choose_plan(artifact, tp_size, comm.mode)
        costs = None
        if comm.mode == "auto" and plan is not None:
            if comm.cost_table is not None:
                costs = CostTable.load(comm.cost_table)
            elif group is not None:
                costs = measure_costs(group, next(iter(plan.sites.values())))
        return cls(plan, comm.mode or ("native" if plan is None else "one_shot"), comm.drift_threshold, costs)

    def real(self, name: str, group: dist.ProcessGroup) -> HybridReducer:
        """Return the reducer of the row-parallel linear `name`, over the ranks of `group`."""
        return HybridReducer(site_plan(self.plan, name), group, self.mode, self.drift_threshold, self.costs)

    def virtual(self, name: str) -> VirtualReducer:
        return VirtualReducer(site_plan(self.plan, name), self.mode, self.drift_threshold, self.costs)


def check_same_model(artifact: Artifact, plan: CommPlan | None, here: Callable[[Fingerprint], Fingerprint]) -> None:
    """Raise LowBitError where the checkpoint or the plan belongs to another model than the one that is patched.

    here: returns the fingerprint of that model, given the one it is compared with.
    """
    for what, part in (("the checkpoint", artifact.checkpoint), ("the communication plan", plan)):
        if part is not None:
            check_fingerprint(what, part.fingerprint, here(part.fingerprint))


def site_plan(plan: CommPlan | None, name: str) -> SitePlan | None:
    """Return the plan of one row-parallel linear, if any. Raises LowBitError for a site that was not calibrated."""
    if plan is None:
        return None
    if name not in plan.sites:
        raise LowBitError(
            f"the communication plan has no ranges for {name}; calibrate on the engine that runs the model"
        )
    return plan.sites[name]


def column_parallel(
    checkpoint: LowBitCheckpoint,
    name: str,
    rank: int,
    size: int,
    bias: Tensor | None,
    plan: ReassemblyPlan | None = None,
    held: Tensor | None = None,
) -> nn.Module:
    """Return rank `rank`'s quantized replacement of a column-parallel linear; `bias` is the rank's own, already
    sharded.

    plan: of the norm before it, where that norm leaves the reassembly to the linear (see plain_norms). held: int64,
    the outputs of the whole linear that the rank has, in order; None: its equal, consecutive share.
    """
    weight, low_rank = _quantized(checkpoint, name), checkpoint.low_rank.get(name)
    weight = weight.shard_out(rank, size) if held is None else weight.take_out(held)
    if low_rank is not None:
        low_rank = low_rank.shard_out(rank, size) if held is None else low_rank.take_out(held)
    plan = checkpoint.reassembly.get(name, plan)
    bias = rotated.bias_of(checkpoint, name, bias, rank, size, held)
    clip = checkpoint.clipping.get(name, WHOLE)
    return QuantLinear(weight, bias, checkpoint.scheme.act_bits, 1, plan, low_rank, clip=clip)


def row_shard(
    checkpoint: LowBitCheckpoint | None,
    name: str,
    rank: int,
    size: int,
    dense: Tensor,
    held: Tensor | None = None,
) -> nn.Module:
    """Return rank `rank`'s matrix product of a row-parallel linear: quantized, or on its own `dense` weight.

    held: int64, the inputs of the whole linear that the rank has, in order; None: its equal, consecutive share. Raises
    LowBitError where these split what is quantized together.
    """
    if checkpoint is None or checkpoint.scheme.weight_bits == 16:
        return DenseShard(dense)
    weight = _quantized(checkpoint, name)
    plan, low_rank = checkpoint.reassembly.get(name), checkpoint.low_rank.get(name)
    rotates = checkpoint.rotation is not None and name in checkpoint.rotation.inputs
    groups = shard_groups(checkpoint, name, size)
    if held is None:
        weight = weight.shard_in(rank, size)
        low_rank = None if low_rank is None else low_rank.shard_in(rank, size)
        plan = None if plan is None else plan.shard(rank, size)
    else:
        together = weight.in_features // groups if checkpoint.scheme.act_bits < 16 or rotates else 1
        if plan is not None or whole_slices(held, together) is None:
            raise LowBitError(
                f"{name}: its ranks hold inputs that are no neighbours, and the artifact quantizes neighbours "
                "together; quantize with a scheme of 16-bit activations and without reassembly"
            )
        weight = weight.take_in(held)
        low_rank = None if low_rank is None else low_rank.take_in(held)
    clip = checkpoint.clipping.get(name, WHOLE)
    return QuantLinear(weight, None, checkpoint.scheme.act_bits, max(groups // size, 1), plan, low_rank, rotates, clip)


def shard_groups(checkpoint: LowBitCheckpoint, name: str, size: int) -> int:
    """Return into how many slices a row-parallel linear's input is cut, each of which is quantized by itself.

    Raises LowBitError where `size` ranks would have to share one.
    """
    plan = checkpoint.reassembly.get(name)
    inputs = _quantized(checkpoint, name).in_features if plan is None else plan.in_features
    groups = activation_groups(inputs, checkpoint.shard_groups)
    rotates = checkpoint.rotation is not None and name in checkpoint.rotation.inputs
    if (checkpoint.scheme.act_bits < 16 or rotates) and groups % size:
        widths = {linear.in_features for linear in checkpoint.linears.values()}
        raise LowBitError(
            f"{name}: {groups} activation shard groups do not divide among tp={size}; "
            f"quantize with weights.shard_groups={groups_for(size, widths)}"
        )
    return groups


def norms_and_columns(
    model: nn.Module,
    checkpoint: LowBitCheckpoint,
    columns: Mapping[str, Any],
    rank: int,
    size: int,
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the norms that change, and of `columns`, the column-parallel linears (this rank's
    shards).

    Reassembly is carried out by the norm, or by the linears that read it where something else reads it too. held: {fqn:
    outputs that this rank has} of the linears that are not in equal, consecutive shares.
    """
    plain, held = plain_norms(model, checkpoint, columns), held or {}
    own = {name: checkpoint.reassembly[norm] for norm, names in plain.items() for name in names}
    linears = {
        name: column_parallel(checkpoint, name, rank, size, gathered(module.bias), own.get(name), held.get(name))
        for name, module in columns.items()
    }
    return {**linears, **norms(model, checkpoint, plain)}


def warn_unreplaced(model: nn.Module, checkpoint: LowBitCheckpoint, replaced: Collection[str]) -> None:
    """Warn of linears that the checkpoint has quantized and the model keeps in full precision.

    Raises LowBitError for a model that was rebuilt from the checkpoint: it has no full-precision weights for them.
    """
    left = [name for name in checkpoint.linears if name not in replaced]
    experts = () if checkpoint.experts is None else checkpoint.experts.weights
    left += [name for name in experts if name.rpartition(".")[0] not in replaced]
    if not left:
        return
    which = f"{left[0]}, and {len(left) - 1} more" if len(left) > 1 else left[0]
    if hasattr(model, "_lowbit_fingerprint"):
        raise LowBitError(
            f"{which}: not a linear that can be quantized here, and the artifact alone has no other weights; set model"
        )
    warnings.warn(f"the artifact has quantized weights that find no linear to replace: {which}", stacklevel=3)


def plain_norms(
    model: nn.Module, checkpoint: LowBitCheckpoint, linears: Mapping[str, nn.Module]
) -> dict[str, tuple[str, ...]]:
    """Return {fqn: linears that read it} of the norms that the checkpoint reassembles, but that must not be: something
    else, a linear in full precision or a router, reads their output too. The linears then reassemble their own input.

    linears: {fqn: column-parallel linear that will be quantized}. Runs the model once, so of a sharded model it is a
    collective call. Raises LowBitError for a norm that does not run: nobody can tell who reads it.
    """
    reassembled = [name for name in checkpoint.reassembly if name not in checkpoint.linears]
    if not reassembled:
        return {}
    reads, found = readers.reads_of_model(model, linears, _device(model)), {}
    ran = {name for name, _ in reads.outputs}
    for norm in reassembled:
        if norm in dict(model.named_modules()) and norm not in ran:
            raise LowBitError(
                f"{norm}, whose output the checkpoint reassembles, does not run; quantize this model again"
            )
        if reads.has_others(norm):
            found[norm] = reads.linears_of(norm)
    return found


def norms(model: nn.Module, checkpoint: LowBitCheckpoint, plain: Collection[str]) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the norms whose output the checkpoint reassembles, or whose gain it has trained.

    plain: norms whose output stays as it is (see plain_norms).
    """
    replacements: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    block = re.match(r"(.*?\.)?\d+\.", next(iter(checkpoint.linears)))  # model.layers.0.
    blocks = (block.group(1) or "") if block else ""
    for name, tensor in checkpoint.tensors.items():
        fqn, _, leaf = name.rpartition(".")
        norm = modules.get(fqn)
        if leaf != "weight" or tensor.ndim != 1 or norm is None or not fqn.startswith(blocks):
            continue
        current: Any = gathered(norm.weight)
        if tensor.shape != current.shape or not tensor.is_floating_point():
            raise LowBitError(
                f"the checkpoint's {name} is {tensor.dtype} {list(tensor.shape)}, the model's {list(current.shape)}: "
                "it belongs to another model; quantize this one"
            )
        if not torch.isfinite(tensor).all():
            raise LowBitError(f"the checkpoint's {name} holds NaN or Inf; quantize this model again")
        stored = tensor.to(current.device, current.dtype)
        plan = None if fqn in plain else checkpoint.reassembly.get(fqn)
        if plan is None and torch.equal(stored, current.data):
            continue
        replacement = copy.deepcopy(norm) if current is norm.weight else without_hooks(rotated.shallow_copy(norm))
        replacement.weight = nn.Parameter(stored)
        replacement.requires_grad_(False)  # the linears that read it are frozen too
        replacements[fqn] = replacement if plan is None else ReassembledNorm(replacement, plan)
    carried = {*checkpoint.linears, *replacements, *plain}
    missing = [name for name in checkpoint.reassembly if name not in carried]
    if missing:
        raise LowBitError(
            f"the model has no norm {missing[0]}, which the checkpoint reassembles; quantize this model again"
        )
    return replacements


def undo_with(model: Any, undo: Callable[[], None]) -> None:
    """Have `remove` call undo(). A copy of the model gets a copy of undo, so it should hold what it changes as data,
    not in a closure, which copies would share."""
    object.__setattr__(model, _UNDO, undo)


def _quantized(checkpoint: LowBitCheckpoint, name: str):
    if name not in checkpoint.linears:
        raise LowBitError(f"the checkpoint has no quantized weight for {name}; quantize this model again")
    return checkpoint.linears[name]


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers())).device


def _move_to_cpu(original: nn.Module, replacement: nn.Module) -> None:
    """Move to the CPU the tensors of `original` that its replacement does not use itself."""
    used = {t.untyped_storage().data_ptr() for t in chain(replacement.parameters(), replacement.buffers())}
    for module in original.modules():
        for parameter in module._parameters.values():
            if parameter is None or is_spread(parameter):
                continue
            if parameter.untyped_storage().data_ptr() not in used:
                parameter.data = parameter.data.to("cpu")
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.untyped_storage().data_ptr() not in used:
                module._buffers[name] = buffer.to("cpu")


def check_equal_shares(name: str, shares: Sequence[int]) -> None:
    """Raise LowBitError where the host split a linear unevenly: ranges and shard groups assume equal shares."""
    if len(set(shares)) > 1:
        raise LowBitError(
            f"{name} is split unevenly over the ranks ({', '.join(map(str, shares))}); "
            "choose a tp_size that divides the model's heads, KV heads and MLP, and "
            f'pass tensor_parallel={{"tp_size": {len(shares)}, "tp_grain_size": 1}} to init_inference'
        )
