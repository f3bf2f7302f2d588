"""Megatron-Core: the same artifact inside a GPTModel. Three ways in:

    (a) spec     GPTModel(config, lowbit_spec(spec), ...), or --spec megatron_lowbit.adapters.megatron llama_lowbit_spec
    (b) in place apply_to_megatron(gpt_model, "artifact/"), after the build: Megatron-Bridge and mbridge hooks
    (c) recipe   with (a): Megatron's per-layer recipe file chooses the schemes, through finish_init

(a) puts low-bit classes where Megatron's linears are. They hold the full-precision weights until a checkpoint is loaded
into them (load_state_dict, with or without a distributed checkpoint), and round it then: to the spec's scheme, or to
what the recipe says of each layer. (b) works on any GPTModel, whether or not it was built by (a), and is the way to
an artifact with reassembly, correction and communication plans. `megatron_lowbit.remove` undoes (b).

Experts are replaced by (b) where the artifact holds them in codes (lowbit_experts.py); else they, and always embeddings
and the output layer, stay as they are, and read norms as they were. A model with other linears that are not known is
refused: it would be quantized only in part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.megatron import attention, training
from megatron_lowbit.adapters.megatron.description import description
from megatron_lowbit.adapters.megatron.experts import expert_sums, find_experts
from megatron_lowbit.adapters.megatron.layers import weight_rows
from megatron_lowbit.adapters.megatron.layout import (
    COLUMN,
    find_linears,
    find_prefix,
    layout_of,
    model_chunks,
    norm_before,
    norm_name,
    num_blocks,
    numbered_layers,
    parts,
    split_rows,
)
from megatron_lowbit.adapters.megatron.lowbit_experts import check_experts
from megatron_lowbit.adapters.megatron.replacements import Replacements
from megatron_lowbit.adapters.megatron.whole import check_model
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, LowBitError
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.input_clipping import Clips, attention_clips
from megatron_lowbit.runtime.distributed import env_rank, group_rank, world_size

logger = logging.getLogger("megatron_lowbit")

_SAME_CONFIG = "build the model with the config that was quantized"


def fingerprint(model: Any, names: Iterable[str]) -> Fingerprint:
    """Return the fingerprint of a GPTModel: shapes from its config, checksums of the linears of this pipeline stage
    under Hugging Face names.

    names: of the linears of the artifact it is compared with, or of the Hugging Face model. A collective call over the
    tensor-parallel ranks.
    """
    known = getattr(model, "_lowbit_fingerprint", None)
    if known is not None:
        return known
    names, layout = set(names), layout_of(model)
    sums: dict[str, Tensor] = {}
    prefix = find_prefix(sorted(names))
    for (layer, role), (_, module) in find_linears(model).items():
        found = parts(prefix, layer, role, names)
        pieces = split_rows(weight_rows(module), layout, role, group_rank(model.pg_collection.tp))
        for number, piece in enumerate(pieces):
            key = found[number] if len(found) == len(pieces) else found[0]
            sums[key] = piece.sum() + (sums[key] if number and key in sums else 0)
    total = torch.stack([sums[name] for name in sorted(sums)])
    if world_size(model.pg_collection.tp) > 1:
        torch.distributed.all_reduce(total, group=model.pg_collection.tp)
    weights = dict(zip(sorted(sums), total.tolist(), strict=True)) | expert_sums(model, prefix, names)
    return {**_shape_fields(model), "weights": weights}


def _shape_fields(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": num_blocks(model),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.kv_channels,
    }


UNTIE = (
    "the artifact's residual stream is rotated, so its embedding and output projection differ; build the GPTModel with "
    "untie_embeddings_and_output_weights (share_embeddings_and_output_weights=False)"
)


def apply_to_megatron(
    model: Any, artifact: str | Path | Artifact, comm_mode: CommMode | CommConfig | None = None
) -> Any:
    """Put an artifact into a GPTModel of Megatron-Core: quantized linears, and low-bit all-reduces between its ranks.

    A collective call: every rank makes it. Under sequence parallelism the reduce-scatter is low-bit, and the all-gather
    where the plan has ranges for it (comm.gather). Experts that the artifact holds in codes are replaced, too; the sum
    of their outputs over the ranks stays Megatron's, in full precision. `saturation` tells whether the calibrated
    ranges held, and `remove` takes the artifact out again.

    Args:
        model: a GPTModel, a wrapper around one, or a list of pipeline chunks; changed in place.
        artifact: an Artifact or its folder, with a checkpoint, plans or both; the same on every rank.
        comm_mode: how partial sums travel: native (the stock all-reduce), bf16, one_shot, two_shot, exact_sum or auto;
            None: one_shot where the artifact has plans, else native. Or a whole CommConfig, whose cost_table and
            drift_threshold then count too: a site whose values do not fit its plan falls back to bf16 with it, and logs
            a warning without.

    Returns:
        What was given as `model`.

    Raises:
        LowBitError: the artifact is of another model or of other shapes (the message names the first tensor), damaged,
            or without a plan for this number of ranks or this layer; or the number of ranks splits its shard groups; or
            the model has linears of kinds that are not known.
            Nothing is replaced then.

    Example, on each of two ranks, where Megatron's parallel groups are initialized:
        >>> import torch
        >>> from transformers import AutoConfig
        >>> import megatron_lowbit as lowbit
        >>> from megatron_lowbit.adapters.megatron import model as megatron_model
        >>> hf_config = AutoConfig.from_pretrained("model")
        >>> model = megatron_model.load_weights(megatron_model.build(hf_config), "model", hf_config)
        >>> model = lowbit.apply_to_megatron(model, "artifact")
        >>> model(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 2]]), None).shape  # half of the vocabulary
        torch.Size([1, 3, 64])
    """
    chunks = model_chunks(model)
    for chunk in chunks:
        patching.remove(chunk)
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    refuse_head(artifact)
    size = world_size(chunks[0].pg_collection.tp)
    reducers = patching.Reducers.of(artifact, size, comm_mode, chunks[0].pg_collection.tp)
    for chunk in chunks:
        check_shapes(chunk, artifact)
        check_model(chunk)
        check_untied(chunk, artifact)
        if artifact.checkpoint is not None and artifact.checkpoint.scheme.weight_bits < 16:
            training.check_replaceable(find_linears(chunk).values())
        patching.check_same_model(artifact, reducers.plan, partial(_completed, chunk))
        if artifact.checkpoint is not None and artifact.checkpoint.scheme.weight_bits < 16:
            warn_unreplaced(chunk, artifact.checkpoint)
    replacements = [Replacements(chunk, artifact, reducers).modules() for chunk in chunks]
    if reducers.plan is not None and any(find_experts(chunk) for chunk in chunks) and env_rank() == 0:
        logger.warning("Megatron's token dispatcher adds up what the ranks compute of an expert, in full precision")
    for chunk, modules in zip(chunks, replacements, strict=True):
        patching.swap(chunk, modules)
        chunk._lowbit_description = description(artifact)
        if artifact.checkpoint is not None:
            checkpoint = artifact.checkpoint
            rotated = checkpoint.rotation is not None and checkpoint.rotation.attention
            attention.quantize(chunk, checkpoint.attention_bits, partial(_attention_clips, checkpoint), rotated)
    return model


def _attention_clips(checkpoint: LowBitCheckpoint, layer: int) -> Clips:
    """Return the ratios of the ranges of Q, K and V of a layer."""
    names = parts(find_prefix(checkpoint.linears), layer, "linear_qkv", checkpoint.linears)
    return attention_clips(checkpoint.clipping, names[0].rpartition(".")[0])


def refuse_head(artifact: Artifact) -> None:
    """Raise LowBitError for an artifact whose output projection is quantized: Megatron-Core shares that, and the
    embedding, among the ranks by vocabulary, in layers of its own."""
    head = None if artifact.checkpoint is None else artifact.checkpoint.head
    if head is not None:
        raise LowBitError(
            f"the artifact holds {head.name} in {head.weight.num_bits} bits, which Megatron-Core's vocabulary-parallel "
            "layers cannot read; quantize again without weights.lm_head_bits"
        )


def check_untied(model: Any, artifact: Artifact) -> None:
    """Raise LowBitError where the artifact's rotated embedding and output projection are to be one weight."""
    rotation = None if artifact.checkpoint is None else artifact.checkpoint.rotation
    if rotation is not None and rotation.residual and model.share_embeddings_and_output_weights:
        raise LowBitError(UNTIE)


def warn_unreplaced(model: Any, checkpoint: LowBitCheckpoint) -> None:
    """Warn of linears in this stage's layers that the checkpoint has quantized and the model keeps as they are."""
    prefix, linears = find_prefix(checkpoint.linears), find_linears(model)
    here = tuple(f"{prefix}.{block}." for _, block, _ in numbered_layers(model))
    taken = {name for layer, role in linears for name in parts(prefix, layer, role, checkpoint.linears)}
    taken |= {experts.name(prefix, "linear_fc1").rpartition(".")[0] for experts in find_experts(model)}
    quantized = [*checkpoint.linears]
    if checkpoint.experts is not None:
        quantized += [name.rpartition(".")[0] for name in checkpoint.experts.weights]
    patching.warn_unreplaced(model, checkpoint, [n for n in quantized if n in taken or not n.startswith(here)])


def _completed(model: Any, expected: Fingerprint) -> Fingerprint:
    """Return a GPTModel's fingerprint; it knows no model_type and pads its vocabulary: those are as expected."""
    here = fingerprint(model, expected["weights"])
    return {key: here.get(key, value) for key, value in expected.items()}


def check_shapes(model: Any, artifact: Artifact) -> None:
    """Raise LowBitError where a linear of the model and the artifact's differ in shape, naming the first."""
    blocks, layout = num_blocks(model), layout_of(model)
    checkpoint = artifact.checkpoint
    for part in (checkpoint, *artifact.plans.values()):
        layers = blocks if part is None else part.fingerprint.get("num_hidden_layers", blocks)
        if layers != blocks:
            raise LowBitError(f"the artifact has {layers} layers, the GPTModel {blocks}; {_SAME_CONFIG}")
    if checkpoint is None:
        return
    check_experts(model, checkpoint)
    prefix = find_prefix(checkpoint.linears)
    for layer, role in find_linears(model):
        names = parts(prefix, layer, role, checkpoint.linears)
        rows = layout.part_rows(role) if len(names) > 1 else (sum(layout.part_rows(role)),)
        norms = [norm_name(prefix, layer, norm_before(role))] if role in COLUMN else []
        for name, out_features in zip(names, rows, strict=True):
            if name not in checkpoint.linears:
                raise LowBitError(f"the artifact has no quantized weight for {name}; quantize this model again")
            weight = checkpoint.linears[name]
            plans = [checkpoint.reassembly[owner] for owner in (name, *norms) if owner in checkpoint.reassembly]
            there = [weight.packed_weight.shape[0], plans[0].in_features if plans else weight.in_features]
            here = [out_features, layout.in_features(role)]
            if there != here:
                raise LowBitError(f"{name} is {there} in the artifact and {here} in the GPTModel; {_SAME_CONFIG}")
