"""Megatron's distributed checkpoints (torch_dist) of a GPTModel, in full precision or low-bit, at any parallel size.

    save_checkpoint(model, folder)      at TP = 2, say; then, on models built for TP = 1, 4, ...
    load_checkpoint(model, folder)      what the folder holds decides: low-bit layers are made to its shapes first

Megatron's own scripts save and load a patched model through model.sharded_state_dict() all the same; only the first
step of loading, making an unpatched model low-bit, needs shape_like.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lowbit.adapters import megatron, patching
from megatron_lowbit.adapters.megatron import attention, scripts, training
from megatron_lowbit.adapters.megatron.apply import UNTIE
from megatron_lowbit.adapters.megatron.experts import find_experts
from megatron_lowbit.adapters.megatron.layers import (
    LowBitColumnParallelLinear,
    LowBitLayerNormColumnParallelLinear,
    LowBitRowParallelLinear,
    dense_shard,
    full_weight,
    tp_group,
)
from megatron_lowbit.adapters.megatron.layout import COLUMN, GATED, NORMS, PATHS, final_norm, is_hybrid
from megatron_lowbit.adapters.megatron.lowbit_experts import empty_experts
from megatron_lowbit.adapters.megatron.norms import LowBitNorm
from megatron_lowbit.adapters.megatron.sharded_state import Shape, check_bytes, empty_codec, empty_linear
from megatron_lowbit.adapters.megatron.whole import check_shared_expert
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.reducers import HybridReducer
from megatron_lowbit.config import CommMode, LowBitError, one_line
from megatron_lowbit.layers.linear import QuantRowParallelLinear
from megatron_lowbit.layers.reassembled_norm import Reassembly
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import all_gather_values, on_rank_zero
from megatron_lowbit.runtime.folder_progress import folder_progress
from megatron_lowbit.temporary import beside, remove, remove_dead


def save_checkpoint(
    model: Any, folder: str | Path, spec: str | None = None, describe: Callable[[Path], None] | None = None
) -> None:
    """Write a torch_dist checkpoint; a collective call. The folder is there when it is whole, or not at all.

    Megatron-LM's scripts take it by --load, with --use-checkpoint-args or the options that scripts.OPTIONS lists.
    spec: the name of the ready spec that a script is to build, which is only written down. describe: puts config and
    tokenizer of the Hugging Face model into the folder, on rank 0. Raises LowBitError where the folder exists, and
    where a rank's inputs end inside a packed byte.
    """
    whole = Path(folder)

    def prepare() -> str:
        if whole.exists():
            raise LowBitError(f"{str(whole)!r} exists; choose another folder for the checkpoint")
        remove_dead([whole.parent], prefix=f".{whole.name}.")
        folder = beside(whole)
        (folder / scripts.RELEASE).mkdir(parents=True)
        return str(folder)

    by_layer = not _alike(model)
    state = _sharded(model, by_layer)  # what it refuses leaves no folder behind
    size = sum(all_gather_values(_bytes(state), dist.group.WORLD))
    first = megatron.model_chunks(model)[0]
    arguments = scripts.model_arguments(first, None if describe is None else str(whole.resolve()))
    state |= {
        "args": scripts.as_namespace(arguments, spec, first),
        "checkpoint_version": scripts.CHECKPOINT_VERSION,
        "iteration": 0,
    }
    if patching.replacing_modules(first) and (about := getattr(first, "_lowbit_description", None)) is not None:
        state["lowbit"] = about
    partial = Path(on_rank_zero(prepare))
    try:
        written = partial / scripts.RELEASE
        with folder_progress(written, size, "writing the checkpoint, percent", dist.get_rank()), _quiet():
            # Megatron's scripts ask for the tensors by the metadata that they find here.
            metadata = {"non_homogeneous_layers": by_layer}
            dist_checkpointing.save(state, str(written), content_metadata=metadata)
        if dist.get_rank() == 0:
            if describe is not None:
                describe(partial)
            (partial / scripts.OPTIONS).write_text(scripts.as_options(arguments, spec), encoding="utf-8")
            (partial / scripts.TRACKER).write_text(scripts.RELEASE, encoding="utf-8")
    except BaseException:  # a full disk, say: nothing of it is left, and other ranks are not waited for
        if dist.get_rank() == 0:
            remove(partial)
        raise
    dist.barrier()
    on_rank_zero(lambda: os.replace(partial, whole))


def load_checkpoint(model: Any, folder: str | Path) -> Any:
    """Load a torch_dist checkpoint, saved at whatever parallel size; a collective call. Returns the model.

    folder: of save_checkpoint, of a script's --save (its latest iteration), or of one iteration. A low-bit checkpoint
    makes the model's layers low-bit; a full-precision one is rounded on the way in where the model was built with a
    scheme (lowbit_spec). Raises LowBitError, with the model as it was, for a checkpoint of other shapes and for a tp
    that splits a shard group or a packed byte.
    """
    folder = Path(folder)
    if (folder / scripts.TRACKER).is_file():
        folder = scripts.checkpoint_folder(folder)
    if not _is_checkpoint(folder):
        raise LowBitError(f"{str(folder)!r} is no distributed checkpoint; write one with save_checkpoint")
    chunks = megatron.model_chunks(model)
    with _unchanged_on_error(chunks):
        shape_like(model, folder)
        state = _load(model, folder)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(state[f"model{number}"])
            chunk._lowbit_description = state.get("lowbit")
    return model


def _load(model: Any, folder: Path) -> dict[str, Any]:
    with _quiet():
        by_layer = any(
            re.search(r"layers\.\d+\.", key) for key in dist_checkpointing.load_tensors_metadata(str(folder))
        )
        state = _sharded(model, by_layer)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.allow_shape_mismatch and tensor.data is not None:
                tensor.data = tensor.data.clone()  # Megatron clears it before it finds that the rest does not fit
        try:
            return dist_checkpointing.load(state, str(folder))
        except CheckpointException as error:  # a BaseException that holds each rank's own
            first, _ = next(iter(error.failures.values()))
            raise LowBitError(f"cannot load {str(folder)!r} into this model: {one_line(first)}") from None
        except Exception as error:  # whatever else torch.distributed.checkpoint and Megatron raise
            raise LowBitError(f"cannot load {str(folder)!r} into this model: {one_line(error)}") from None


@contextlib.contextmanager
def _unchanged_on_error(chunks: list[Any]) -> Iterator[None]:
    """Restore the layers that were replaced within the context, where that does not come to its end."""
    before = [patching.replacing_modules(chunk) for chunk in chunks]
    try:
        yield
    except BaseException:
        for chunk, modules in zip(chunks, before, strict=True):
            patching.remove(chunk)
            if modules:
                patching.swap(chunk, modules)
                bits = (getattr(module, "attention_bits", 16) for module in modules.values())
                attention.quantize(chunk, min(bits), rotated=_rotates(modules))
        raise


def _is_checkpoint(folder: Path) -> bool:
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (OSError, TypeError, ValueError):  # a metadata.json of something else
        return False


def _alike(model: Any) -> bool:
    """Return whether all layers of the model have tensors of the same names and shapes, so that Megatron can stack
    them."""
    seen: set[str] = set()
    for chunk in megatron.model_chunks(model):
        for layer in chunk.decoder.layers:
            shapes = [(name, tuple(t.shape)) for name, t in layer.state_dict().items() if isinstance(t, torch.Tensor)]
            seen.add(str(shapes))
    stages = all_gather_values(sorted(seen), dist.group.WORLD)
    return len(set().union(*stages)) == 1


def _sharded(model: Any, by_layer: bool) -> dict[str, Any]:
    """Return the sharded state dict of all chunks. by_layer: keys hold the layer's number, for layers that differ."""
    chunks = megatron.model_chunks(model)
    metadata: dict[str, Any] = {"non_homogeneous_layers": by_layer}
    if hasattr(chunks[0].pg_collection, "dp_cp"):
        metadata["dp_cp_group"] = chunks[0].pg_collection.dp_cp
    return {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}


def _bytes(state: dict[str, Any]) -> int:
    """Return the bytes of the tensors that this rank writes: of those that several hold, one does."""
    sharded = [item for item in nested_values(state) if isinstance(item, ShardedTensor | ShardedTensorFactory)]
    return sum(item.data.nbytes for item in sharded if is_main_replica(item.replica_id))


def stored_kind(folder: str | Path) -> Literal["full precision", "plans", "packed weights"]:
    """Tell what the linears of a torch_dist checkpoint hold; plans: full precision, with low-bit communication."""
    found = _metadata(folder)
    if any(key.endswith(".lowbit") for key in found):
        return "packed weights"
    return "plans" if any(".plan_tp" in key for key in found) else "full precision"


def stored_description(folder: str | Path) -> dict[str, Any] | None:
    """Return the description of the artifact in a torch_dist checkpoint; None where it was saved without."""
    with _quiet():
        return dist_checkpointing.load_common_state_dict(str(folder)).get("lowbit")


def _metadata(folder: str | Path) -> dict[str, ShardedTensor]:
    with _quiet():
        return dist_checkpointing.load_tensors_metadata(str(folder))


def shape_like(model: Any, folder: str | Path) -> Any:
    """Make the layers of a model low-bit and of the shapes that a distributed checkpoint holds, with nothing in them.

    Nothing happens for a checkpoint in full precision. Afterwards the checkpoint loads as Megatron loads any.
    """
    found, chunks = _metadata(folder), megatron.model_chunks(model)
    _check_kind(chunks[0], found, folder)
    if stored_kind(folder) == "full precision":
        return model
    shapes = {key: tuple(tensor.global_shape) for key, tensor in found.items()}
    described = _described(folder, [key for key in shapes if key.endswith(".lowbit")], shapes)
    rotated = any(tensor.shape[-1] == len(fields(Shape)) for tensor in described.values())
    if rotated and "output_layer.weight" in found and chunks[0].share_embeddings_and_output_weights:
        raise LowBitError(UNTIE)
    for chunk in chunks:
        patching.remove(chunk)
    if described:
        for chunk in chunks:
            training.check_replaceable(megatron.find_linears(chunk).values())
    replacements = [_empty_modules(chunk, shapes, described) for chunk in chunks]
    for chunk, (modules, bits) in zip(chunks, replacements, strict=True):
        patching.swap(chunk, modules)
        attention.quantize(chunk, bits, rotated=_rotates(modules))
    return model


def _check_kind(model: Any, found: Mapping[str, Any], folder: str | Path) -> None:
    """Raise LowBitError where a GPTModel is to load a HybridModel's checkpoint, or the other way round: their layers
    have other numbers."""
    names = {"decoder.final_norm.weight", "decoder.final_layernorm.weight"}
    if found.keys() & (names - {f"{final_norm(model)}.weight"}):
        one, other = ("GPTModel", "HybridModel") if is_hybrid(model) else ("HybridModel", "GPTModel")
        raise LowBitError(
            f"{str(folder)!r} holds a {one}, and this is a {other}, whose layers have other numbers; build a {one}, or "
            "put the artifact itself into this model by apply_to_megatron"
        )


def _described(folder: str | Path, keys: list[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Load the `lowbit` tensors, whole: they say what the rest looks like."""
    wanted = {
        key: ShardedTensor.from_rank_offsets(
            key, torch.zeros(shapes[key], dtype=torch.int64), replica_id=dist.get_rank()
        )
        for key in keys
    }
    with _quiet():
        found = dist_checkpointing.load(wanted, str(folder))  # and all that is not sharded: a script's args
    return {key: found[key] for key in keys}


def _rotates(modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether the attention around these layers rotates Q and K."""
    return any(path.endswith("linear_qkv") and getattr(m, "rotated", None) for path, m in modules.items())


class _Stored:
    """Tensors of one layer as the checkpoint holds them: stacked over layers, or one by one."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], described: dict[str, torch.Tensor], layer: int):
        self.shapes, self.described, self.layer = shapes, described, layer

    def _find(self, path: str, leaf: str) -> tuple[str, bool] | None:
        stacked, single = f"decoder.layers.{path}.{leaf}", f"decoder.layers.{self.layer}.{path}.{leaf}"
        return (stacked, True) if stacked in self.shapes else (single, False) if single in self.shapes else None

    def shape(self, path: str, leaf: str) -> tuple[int, ...] | None:
        """Return the shape of the whole tensor of this layer; None where there is none."""
        found = self._find(path, leaf)
        return None if found is None else self.shapes[found[0]][1:] if found[1] else self.shapes[found[0]]

    def lowbit(self, path: str) -> Shape | None:
        found = self._find(path, "lowbit")
        if found is None:
            return None
        rows = self.described[found[0]]
        return Shape(*(rows[self.layer] if found[1] else rows).tolist())

    def empty_reassembly(self, path: str, ranks: int = 1, prefix: str = "") -> ReassemblyPlan | None:
        """Return a plan of the stored shapes to load into, one rank's of `ranks`; None where none is stored."""
        src, merged = (self.shape(path, f"{prefix}reassembly.{leaf}") for leaf in ("src", "merged_into"))
        if src is None or merged is None:
            return None
        width, inputs = src[0] // ranks, merged[0] // ranks
        return ReassemblyPlan.from_dense(
            torch.arange(width) % inputs, torch.ones(width), torch.full((inputs,), -1, dtype=torch.int64)
        )

    def plan_sizes(self, path: str) -> list[int]:
        sizes = set()
        for key in self.shapes:
            head, plan, rest = key.partition(f"{path}.plan_tp")
            if plan and head in ("decoder.layers.", f"decoder.layers.{self.layer}."):
                sizes.add(int(rest.partition(".")[0]))
        return sorted(sizes)


def _empty_modules(
    model: Any, shapes: dict[str, tuple[int, ...]], described: dict[str, torch.Tensor]
) -> tuple[dict[str, nn.Module], int]:
    """Return ({path: empty low-bit layer or norm}, bits of the attention) of one chunk."""
    layout, bits = megatron.layout_of(model), 16
    modules: dict[str, nn.Module] = {}
    for (_, role), (path, host) in megatron.find_linears(model).items():
        stored, inside = _Stored(shapes, described, _layer_number(model, path)), PATHS[role]
        shape, scales = stored.lowbit(inside), stored.shape(inside, "scale")
        plans: dict[int, Any] = {size: _empty_plan(stored, inside, size) for size in stored.plan_sizes(inside)}
        column, group = role in COLUMN, tp_group(host)
        if shape is None and not plans:
            continue
        shard: Any = host  # full precision, with low-bit communication
        rows = sum(layout.part_rows(role))
        if shape is not None:
            assert scales is not None, "a low-bit layer is stored with its scales"
            there = stored.shape(inside, "packed_weight")
            if there is None or there[0] != rows:
                raise LowBitError(
                    f"{path} has {there and there[0]} outputs in the checkpoint and {rows} in the GPTModel"
                )
            branch = stored.shape(inside, "lora_a")
            ranks = 1 if column else layout.tp_size
            if not column:
                check_bytes(path, shape.width // ranks, shape.weight_bits)
            shard = empty_linear(
                shape,
                rows // layout.tp_size if column else rows,
                scales[1] // ranks if shape.grouped else 1,
                None if branch is None else branch[0],
                ranks,
            )
            bits = min(bits, shape.attention_bits)
        else:
            full_weight(host)
            shard = dense_shard(host)
        replacement: Any
        if column:
            kind = (
                LowBitLayerNormColumnParallelLinear
                if hasattr(host, "layer_norm_weight")
                else LowBitColumnParallelLinear
            )
            replacement = kind.from_host(host, shard, role in GATED and host.config.gated_linear_unit, plans.get(1))
        else:
            reducer = None
            if group is not None:
                mode: CommMode | None = None if layout.tp_size in plans else "native"
                reducer = HybridReducer(plans.get(layout.tp_size), group, mode)
            sequence_parallel = group is not None and host.config.sequence_parallel
            replacement = LowBitRowParallelLinear.from_host(
                host, QuantRowParallelLinear([shard], reducer, None, sequence_parallel), plans
            )
        if shape is not None:
            replacement.grouped, replacement.attention_bits = bool(shape.grouped), shape.attention_bits
            replacement.rotated = None if shape.rotated is None else bool(shape.rotated)
            shard.rotated = not column and bool(shape.rotated)
            plan = stored.empty_reassembly(inside, 1 if column else layout.tp_size)
            replacement.stores_reassembly = plan is not None
            if plan is not None and not plan.is_identity:
                shard.reassembly = Reassembly(plan)
        modules[path] = replacement
    for here in find_experts(model):
        if f"{here.path}.shared_experts.linear_fc2" in modules:
            check_shared_expert(here.layer, f"{here.path}.shared_experts")
    modules |= _empty_norms(model, shapes, described) | _empty_experts(model, shapes, described)
    return modules, bits


def _empty_experts(
    model: Any, shapes: dict[str, tuple[int, ...]], described: dict[str, torch.Tensor]
) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for here in find_experts(model):
        stored = _Stored(shapes, described, _layer_number(model, here.path))
        experts = empty_experts(model, here, stored)
        modules |= {} if experts is None else {f"{here.path}.experts": experts}
    return modules


def _layer_number(model: Any, path: str) -> int:
    """Return the number, from 0, that the layer of a linear has in a checkpoint: in a HybridModel not its block's."""
    return model.decoder.layers[int(path.split(".")[2])].layer_number - 1


def _empty_plan(stored: _Stored, path: str, size: int) -> SitePlan | Codec:
    """Return a plan of the stored shape to load into."""
    gathered = stored.shape(path, f"plan_tp{size}.scale")
    if gathered is not None:
        return empty_codec(*gathered)
    shape = stored.shape(path, f"plan_tp{size}.first.scale")
    assert shape is not None, "a plan is stored whole"
    second = stored.shape(path, f"plan_tp{size}.second.scale")
    second_codec = None if second is None else empty_codec(*second)
    return SitePlan(empty_codec(*shape), second_codec, torch.zeros(shape), torch.ones(shape[1]))


def _empty_norms(
    model: Any, shapes: dict[str, tuple[int, ...]], described: dict[str, torch.Tensor]
) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for index, layer in enumerate(model.decoder.layers):
        keys = getattr(layer.submodules_config, "sharded_state_dict_keys_map", {})
        for norm in NORMS:
            module: Any = layer
            for name in norm.split("."):
                module = getattr(module, name, None)
            if getattr(module, "weight", None) is None:
                continue
            stem = keys.get(
                f"{norm}.", f"{norm}."
            )  # input_layernorm. is stored as self_attention.linear_qkv.layer_norm_
            stored = _Stored(shapes, described, layer.layer_number - 1)
            plan = stored.empty_reassembly(stem.rpartition(".")[0], prefix=stem.rpartition(".")[2])
            if plan is not None:
                modules[f"decoder.layers.{index}.{norm}"] = LowBitNorm(module, module.weight.data, plan)
    return modules


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Megatron and torch say of their own deprecations while they save and load."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


__all__ = ["load_checkpoint", "save_checkpoint", "shape_like", "stored_description", "stored_kind"]
