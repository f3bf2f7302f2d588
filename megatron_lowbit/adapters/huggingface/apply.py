"""Hugging Face causal LMs: one process, TP=1 or virtual TP.

The tensor-parallel linears are found by structure, not by model names. In every decoder block, each submodule that owns
linears (attention, MLP) has at most one that writes back into the residual stream: the last with out_features ==
hidden_size. That one is row-parallel (o_proj, down_proj); the others, which read hidden_size features, are
column-parallel. A submodule without such a pair (a router, a gate) is left alone. Where transformers says how it would
shard the family itself, a linear that it cuts along the outputs is not the one that writes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from megatron_lowbit.adapters import arguments, patching, readers, rotated, saving
from megatron_lowbit.adapters.huggingface.attention import quantize_attention
from megatron_lowbit.adapters.huggingface.head import head_modules, with_head
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint, model_fingerprint
from megatron_lowbit.layers.linear import DenseShard, QuantRowParallelLinear

Kind = Literal["column", "row"]


def model_config(model: Any) -> Any:
    """Return the text model's config."""
    return getattr(model.config, "text_config", None) or model.config


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return (fqn, list) of the decoder blocks. Raises LowBitError where there is none of num_hidden_layers equal
    blocks."""
    depth = getattr(model_config(model), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise LowBitError(
        f"{type(model).__name__} has no list of {depth} decoder blocks; megatron_lowbit cannot place its linears"
    )


def find_linears(model: nn.Module) -> dict[str, tuple[Kind, nn.Linear]]:
    """Return {fqn: (kind, linear)} of the tensor-parallel linears in all blocks, in order; at least one is
    row-parallel."""
    found = linears_in_blocks(model)
    if not any(kind == "row" for kind, _ in found.values()):
        raise LowBitError(
            f"{type(model).__name__}: no row-parallel nn.Linear in its decoder blocks; not a supported model"
        )
    return found


def linears_in_blocks(model: nn.Module) -> dict[str, tuple[Kind, nn.Linear]]:
    """Return what find_linears does, of a model that may have no such nn.Linear, or that a host has sharded in part."""
    if hasattr(getattr(model, "base_model", None), "_rescale_layers"):  # RWKV
        raise LowBitError(f"{type(model).__name__} rescales its own weights while it runs; not a supported model")
    hidden, columns = model_config(model).hidden_size, _columns(model)
    found: dict[str, tuple[Kind, nn.Linear]] = {}
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        for owner_name, owner in block.named_modules():
            linears = {name: child for name, child in owner.named_children() if type(child) is nn.Linear}
            path = ".".join(part for part in (prefix, str(index), owner_name) if part)
            writers = [
                name
                for name, linear in linears.items()
                if linear.out_features == hidden and not columns.search(f"{path}.{name}")
            ]
            if len(linears) < 2 or not writers:
                continue
            for name, linear in linears.items():
                if name == writers[-1]:
                    found[f"{path}.{name}"] = ("row", linear)
                elif linear.in_features == hidden:
                    found[f"{path}.{name}"] = ("column", linear)
    return found


def _columns(model: nn.Module) -> re.Pattern[str]:
    """Return the pattern of the fqns of linears that transformers' own plan for the family cuts along the outputs."""
    plan = getattr(model_config(model), "base_model_tp_plan", None) or {}
    names = [re.escape(name).replace(r"\*", r"\d+") for name, how in plan.items() if how == "colwise"]
    return re.compile("|".join(rf"(^|\.){name}$" for name in names) or r"(?!)")


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor, and so share one reassembly of it.

    linears: their fqns within the block; owner: the submodule they belong to (attention, MLP); norm: fqn of the
    norm whose output that tensor is, where nothing else reads it; row: fqn of the owner's row-parallel linear.
    """

    kind: Kind
    linears: tuple[str, ...]
    owner: str
    norm: str | None
    row: str


@contextmanager
def input_groups(
    block: nn.Module, linears: Mapping[str, tuple[Kind, nn.Module]], tokens: int | None = None
) -> Iterator[list[InputGroup]]:
    """Record a block that is run once within the context; afterwards the list holds its InputGroups, in the order they
    ran.

    linears: {fqn within the block: (kind, module)}. Who reads what is seen by object identity of tensors, on any
    device. tokens: of the run; a linear that reads another number of them (a routed expert) is in no group.
    """
    groups: list[InputGroup] = []
    with readers.track_reads(block, {name: module for name, (_, module) in linears.items()}) as reads:
        yield groups
    rows = {name.rpartition(".")[0]: name for name, (kind, _) in linears.items() if kind == "row"}
    found: list[tuple[Tensor, str, list[str]]] = []
    for name, tensor in reads.inputs:
        if tokens is not None and tensor.numel() != tokens * tensor.shape[-1]:
            continue
        owner = name.rpartition(".")[0]
        known = next((names for seen, place, names in found if seen is tensor and place == owner), None)
        if known is None:
            found.append((tensor, owner, [name]))
        else:
            known.append(name)
    for tensor, owner, names in found:
        shared = sum(seen is tensor for seen, _, _ in found) > 1
        kind = linears[names[0]][0]
        # A row-parallel linear's input is reassembled and quantized in shard groups, which a norm knows nothing of.
        norm = None if shared or kind == "row" else reads.norm_of(tensor)
        if norm is not None and reads.has_others(norm):
            norm = None
        groups.append(InputGroup(kind, tuple(names), owner, norm, rows[owner]))


def row_parallel_sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: linear for name, (kind, linear) in find_linears(model).items() if kind == "row"}


def sharing_bits(linears: Mapping[str, tuple[Kind, Any]]) -> dict[str, tuple[str, ...]]:
    """Return {fqn of the first: fqns} of the linears that get one number of bits together: the column-parallel ones of
    an owner, which hosts fuse, and each row-parallel one alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (kind, _) in linears.items():
        groups.setdefault((name.rpartition(".")[0], name if kind == "row" else ""), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def first_readers(linears: Mapping[str, tuple[Kind, Any]]) -> dict[str, Any]:
    """Return {fqn: linear} of the first column-parallel linear of every owner (attention, MLP): they read the same."""
    first: dict[str, tuple[str, Any]] = {}
    for name, (kind, linear) in linears.items():
        if kind == "column":
            first.setdefault(name.rpartition(".")[0], (name, linear))
    return dict(first.values())


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of a whole model. One that was rebuilt from a LowBitCheckpoint keeps the fingerprint of
    its original."""
    known = getattr(model, "_lowbit_fingerprint", None)
    if known is not None:
        return known
    return model_fingerprint(
        model_config(model), {name: linear.weight for name, (_, linear) in find_linears(model).items()}
    )


def check_divides(
    config: Any, tp_size: int, key: Literal["tp", "virtual_tp", "comm.tp_sizes"], share_kv_heads: bool = False
) -> None:
    """Raise LowBitError, naming the config key, where `tp_size` ranks cannot share a model's heads or MLP equally.

    Virtual ranks (any key but tp) only slice the inputs of row-parallel linears, so KV heads do not bind them.
    share_kv_heads: several ranks may use one KV head together, as Megatron-Core's do.
    """
    names = ["num_attention_heads", "intermediate_size"] + (["num_key_value_heads"] if key == "tp" else [])

    def fits(name: str, size: int) -> bool:
        value = getattr(config, name, None)
        if not isinstance(value, int):
            return True
        return value % size == 0 or (share_kv_heads and name == "num_key_value_heads" and size % value == 0)

    for name in names:
        if not fits(name, tp_size):
            sizes = [size for size in range(1, 65) if all(fits(other, size) for other in names)]
            raise LowBitError(
                f"{key}={tp_size} does not divide the model's {name}={getattr(config, name)}; choose one of {sizes}"
            )


def apply_to_huggingface(
    model: nn.Module,
    artifact: str | Path | Artifact,
    virtual_tp: int = 1,
    comm_mode: CommMode | CommConfig | None = None,
) -> nn.Module:
    """Put an artifact into a Hugging Face model: quantized linears, and low-bit partial sums of virtual ranks.

    The model's save_pretrained then writes an artifact. Packed linears are frozen and hold no parameters; embeddings
    and all else that stays can be trained, by an optimizer made afterwards. `saturation` tells whether the calibrated
    ranges held, and `remove` takes the artifact out again.

    Args:
        model: a causal language model of transformers, unsharded; changed in place.
        artifact: an Artifact or its folder, with a checkpoint, plans or both.
        virtual_tp: ranks whose partial sums and messages are simulated in this process, bit for bit; 1 sends nothing.
        comm_mode: how partial sums travel: native (the stock all-reduce), bf16, one_shot, two_shot, exact_sum or auto;
            None: one_shot where the artifact has plans, else native. Or a whole CommConfig, whose cost_table and
            drift_threshold then count too: a site whose values do not fit its plan falls back to bf16 with it, and logs
            a warning without.

    Returns:
        The model.

    Raises:
        LowBitError: an argument is of another kind, or the artifact is of another model, damaged, or has no plan for
            this size; the model then has no low-bit modules.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> import megatron_lowbit as lowbit
        >>> model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        >>> model = lowbit.apply_to_huggingface(model, "artifact", virtual_tp=2)
        >>> model(torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 128])
    """
    arguments.check_model("apply_to_huggingface", model, "a Hugging Face model")
    artifact = arguments.load_artifact("apply_to_huggingface", artifact)
    virtual_tp = arguments.as_ranks("virtual_tp", virtual_tp)
    patching.remove(model)
    check_divides(model_config(model), virtual_tp, "virtual_tp")
    reducers = patching.Reducers.of(artifact, virtual_tp, comm_mode)
    checkpoint = artifact.checkpoint
    here = with_head(fingerprint(model), model, checkpoint)
    patching.check_same_model(artifact, reducers.plan, lambda _: here)
    quantized = checkpoint is not None and checkpoint.scheme.weight_bits < 16
    replacements: dict[str, nn.Module] = {}
    linears = find_linears(model)
    if checkpoint is not None and quantized:
        columns = {name: linear for name, (kind, linear) in linears.items() if kind == "column"}
        replacements = patching.norms_and_columns(model, checkpoint, columns, 0, 1)
    for name, (kind, linear) in linears.items():
        if kind == "column":
            continue
        shards = [
            patching.row_shard(checkpoint, name, rank, virtual_tp, linear.weight)
            if quantized
            else DenseShard(linear.weight, rank, virtual_tp)
            for rank in range(virtual_tp)
        ]
        reducer = reducers.virtual(name) if virtual_tp > 1 else None
        bias = rotated.bias_of(checkpoint, name, linear.bias) if quantized else linear.bias
        replacements[name] = QuantRowParallelLinear(shards, reducer, bias)
    if checkpoint is not None and quantized:
        patching.warn_unreplaced(model, checkpoint, replacements)
    if checkpoint is not None and checkpoint.head is not None:
        replacements |= head_modules(model, checkpoint.head)
    if checkpoint is not None and quantized:
        replacements |= rotated.rest_of(model, checkpoint, replacements)
    patching.swap(model, replacements)
    saving.save_as_artifact(model, artifact, fingerprint)
    if checkpoint is not None and quantized:
        quantize_attention(model, checkpoint, model_config(model))
    return model
