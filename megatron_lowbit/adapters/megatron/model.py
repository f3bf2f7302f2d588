"""Hugging Face decoders as GPTModels, and back, at any tensor- and pipeline-parallel size.

    hf_config ──transformer_config──> TransformerConfig ──build──> GPTModel ──load_weights / load_checkpoint──> ready
    GPTModel ──to_huggingface──> the Hugging Face model, on rank 0

Which models, and what Megatron is told of them: model_config.py. Every rank reads one tensor at a time and keeps its
share. Where the vocabulary is padded, the logits of the padding are -inf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.adapters import megatron
from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.adapters.megatron import cpu_shims, experts
from megatron_lowbit.adapters.megatron.apply import check_shapes, refuse_head
from megatron_lowbit.adapters.megatron.layers import full_weight
from megatron_lowbit.adapters.megatron.layout import (
    COLUMN,
    NORMS,
    final_norm,
    find_prefix,
    norm_name,
    numbered_layers,
    parts,
)
from megatron_lowbit.adapters.megatron.model_config import context_length, expects_bias, rotary, transformer_config
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, LowBitError
from megatron_lowbit.io.hf_names import ModelWeights
from megatron_lowbit.runtime.distributed import all_gather_stack, gather_values, group_rank, world_size
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress
from megatron_lowbit.runtime.rendezvous import collective_limit

_HEAD = "lm_head.weight"
Read = Callable[[str, tuple[int, ...]], Tensor]


def initialize(tp: int, pp: int, seed: int) -> None:
    """Initialize Megatron's parallel groups, over the ranks of an initialized torch.distributed; the rest are
    data-parallel.

    Groups that this process already has are used. Raises LowBitError where they are of other sizes.
    """
    if parallel_state.model_parallel_is_initialized():
        found = {
            "tp": parallel_state.get_tensor_model_parallel_world_size(),
            "pp": parallel_state.get_pipeline_model_parallel_world_size(),
            "context parallel": parallel_state.get_context_parallel_world_size(),
        }
        wanted = {"tp": tp, "pp": pp, "context parallel": 1}
        if found != wanted:
            differ = [name for name in found if found[name] != wanted[name]]
            sizes = " and ".join(f"{name}={found[name]}, not {wanted[name]}" for name in differ)
            raise LowBitError(
                f"this process has initialized Megatron with {sizes}; "
                "call megatron.core.parallel_state.destroy_model_parallel() first, or ask for the same sizes"
            )
    else:
        minutes = collective_limit().total_seconds() / 60
        parallel_state.initialize_model_parallel(tp, pp, distributed_timeout_minutes=minutes)
    cpu_shims.enable()
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(seed)


def build(hf_config: Any, dtype: torch.dtype = torch.float32, sequence_parallel: bool = False, spec: Any = None) -> Any:
    """Build this rank's GPTModel, its parameters not yet set. spec: of a layer or a block; None: block_spec.

    megatron.core.parallel_state has been initialized.
    """
    config = transformer_config(hf_config, dtype, sequence_parallel)
    tp, stage = config.tensor_model_parallel_size, parallel_state.get_pipeline_model_parallel_rank()
    last = config.pipeline_model_parallel_size - 1
    padded = -(-hf_config.vocab_size // tp) * tp
    with cpu_shims.cuda_is_cpu():
        model = GPTModel(
            config,
            spec or megatron.block_spec(config),
            vocab_size=padded,
            max_sequence_length=context_length(hf_config),
            pre_process=stage == 0,
            post_process=stage == last,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            parallel_output=True,
            **rotary(hf_config),
        )
    if model.post_process:
        _mask_padding(model, hf_config.vocab_size)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_weights(model: Any, source: str | Path | Mapping[str, Tensor], hf_config: Any) -> Any:
    """Load full-precision weights into a GPTModel (or its pipeline chunks); every rank takes its share.

    source: a folder with safetensors, or a state dict of the Hugging Face model. Raises LowBitError for a tensor
    that is lacking or has another shape.
    """
    known, read = _reader(source, hf_config)
    for chunk in megatron.model_chunks(model):
        _load(chunk, known, read, hf_config, linears=True)
    return model


def load_checkpoint(
    model: Any, artifact: str | Path | Artifact, hf_config: Any, comm_mode: CommMode | CommConfig | None = None
) -> Any:
    """Load a LowBitCheckpoint (and its plans) into a GPTModel that has no weights yet."""
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    load_rest(model, artifact, hf_config)
    return megatron.apply_to_megatron(model, artifact, comm_mode)


def load_rest(model: Any, artifact: Artifact, hf_config: Any) -> None:
    """Load all that is not a tensor-parallel weight, from a LowBitCheckpoint; apply_to_megatron has to follow."""
    checkpoint = artifact.checkpoint
    if checkpoint is None:
        raise LowBitError("the artifact holds no lowbit.json: it has plans only; load the model's own weights first")
    refuse_head(artifact)
    known, read = _reader(checkpoint.tensors, hf_config)
    for chunk in megatron.model_chunks(model):
        check_shapes(chunk, artifact)
        packed = () if checkpoint.experts is None else checkpoint.experts.weights
        _load(chunk, known, read, hf_config, linears=False, packed=packed)
        chunk._lowbit_fingerprint = checkpoint.fingerprint


def untie_(hf_config: Any, source: str | Path | Mapping[str, Tensor]) -> Any:
    """Set tie_word_embeddings to false in a config whose weights hold an lm_head that is not the embedding.

    transformers 5 ties nothing then, whatever the config says, and uses both; a GPTModel is tied, or not, when it is
    built. source: as in load_weights. Returns the config.
    """
    if hf_config.tie_word_embeddings and _has_own_head(*_reader(source, hf_config), hf_config):
        hf_config.tie_word_embeddings = False
    return hf_config


def _has_own_head(known: Collection[str], read: Read, hf_config: Any) -> bool:
    """Return whether there is an lm_head that differs from the embedding."""
    shape = (hf_config.vocab_size, hf_config.hidden_size)
    return _HEAD in known and not torch.equal(read(_HEAD, shape), read(_embedding(known), shape))


def _embedding(known: Collection[str]) -> str:
    return f"{find_prefix(known).rpartition('.')[0]}.embed_tokens.weight"


def _reader(source: str | Path | Mapping[str, Tensor], hf_config: Any) -> tuple[Collection[str], Read]:
    if isinstance(source, (str, Path)):
        weights = ModelWeights(source, skeleton(copy.deepcopy(hf_config), torch.float32))
        return weights.origins, lambda name, shape: weights.read(name, torch.Size(shape))

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in source:
            raise LowBitError(f"the weights lack {name}; download or convert the model again")
        if tuple(source[name].shape) != tuple(shape):
            raise LowBitError(f"{name} has shape {list(source[name].shape)}, the GPTModel asks for {list(shape)}")
        return source[name]

    return source.keys(), read


@torch.no_grad()
def _load(
    model: Any, known: Collection[str], read: Read, hf_config: Any, linears: bool, packed: Collection[str] = ()
) -> None:
    """Load all parameters of one chunk; without `linears`, all but the weights of the tensor-parallel linears.

    packed: the experts that are left out, too.
    """
    layout, rank = megatron.layout_of(model), group_rank(model.pg_collection.tp)
    prefix = find_prefix(known)
    base = prefix.rpartition(".")[0]
    vocab, hidden = hf_config.vocab_size, layout.hidden_size
    embedding, tied = _embedding(known), bool(hf_config.tie_word_embeddings)
    if tied and _has_own_head(known, read, hf_config):
        raise LowBitError(
            f"tie_word_embeddings=true, but {_HEAD} is not the embedding; build the GPTModel with the config that "
            "untie_(hf_config, weights) returns, as transformers would"
        )
    pending = {name for name, _ in model.named_parameters()}

    def put(name: str, value: Tensor) -> None:
        parameter = model.get_parameter(name)
        if parameter.shape != value.shape:
            raise LowBitError(f"{name} has shape {list(value.shape)}, the GPTModel's is {list(parameter.shape)}")
        parameter.copy_(value)
        pending.discard(name)

    def words(name: str, source: str) -> None:
        rows = model.get_parameter(name).shape[0]
        whole = F.pad(read(source, (vocab, hidden)), (0, 0, 0, rows * layout.tp_size - vocab))
        put(name, whole.chunk(layout.tp_size)[rank])

    if model.pre_process:
        words("embedding.word_embeddings.weight", embedding)
    if model.post_process:
        put(f"{final_norm(model)}.weight", read(f"{base}.norm.weight", (hidden,)))
        if model.output_layer.weight is not None:
            words("output_layer.weight", embedding if tied else _HEAD)
        _mask_padding(model, vocab)
    found = megatron.find_linears(model)
    for (layer, role), (path, module) in progress(found.items(), len(found), "loading weights", env_rank()):
        names = parts(prefix, layer, role, [name.removesuffix(".weight") for name in known])
        rows = layout.part_rows(role) if len(names) > 1 else (sum(layout.part_rows(role)),)
        if linears:
            shapes = [(size, layout.in_features(role)) for size in rows]
            whole = torch.cat([read(f"{name}.weight", shape) for name, shape in zip(names, shapes, strict=True)])
            put(f"{path}.weight", layout.share(whole, role, rank))
        else:
            pending.discard(f"{path}.weight")
        if module.bias is not None:
            biases = [
                read(f"{name}.bias", (size,)) if expects_bias(hf_config, role) else torch.zeros(size)
                for name, size in zip(names, rows, strict=True)
            ]
            whole = torch.cat(biases)
            put(f"{path}.bias", whole[layout.rank_rows(role, rank)] if role in COLUMN else whole)
    for index, block, _ in numbered_layers(model):
        for norm in NORMS:
            name = f"decoder.layers.{index}.{norm}.weight"
            if name in pending:
                shape = tuple(model.get_parameter(name).shape)
                put(name, read(f"{norm_name(prefix, block, norm)}.weight", shape))
        _load_te_norms(index, block, prefix, pending, put, read, hidden)
    experts.load_experts(model, prefix, read, put, pending.discard, packed)
    if pending:
        raise LowBitError(f"the GPTModel has {sorted(pending)[0]}, which this model has no weight for")
    for path, module in found.values():
        if linears and hasattr(module, "on_load"):
            module.on_load(path)


def _load_te_norms(index: int, layer: int, prefix: str, pending: set[str], put: Any, read: Read, hidden: int) -> None:
    """Load the norms that Transformer Engine's fused layers hold."""
    for norm, (_, role) in NORMS.items():
        if role is not None:
            owner = "self_attention" if role == "linear_qkv" else "mlp"
            name = f"decoder.layers.{index}.{owner}.{role}.layer_norm_weight"
            if name in pending:
                put(name, read(f"{norm_name(prefix, layer, norm)}.weight", (hidden,)))


def _mask_padding(model: Any, vocab: int) -> None:
    """Set the logits of padded words to -inf, so that no sampler ever chooses one."""

    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        width = logits.shape[-1]
        first = 0 if width >= padded else rank * width
        if first + width <= vocab:
            return output
        index = torch.arange(first, first + width, device=logits.device)
        return logits.masked_fill(index >= vocab, float("-inf")), bias

    size, rank = world_size(model.pg_collection.tp), group_rank(model.pg_collection.tp)
    padded = model.output_layer.output_size_per_partition * size
    if padded > vocab and not getattr(model, "_lowbit_masked", False):
        model.output_layer.register_forward_hook(hook)
        model._lowbit_masked = True


@torch.no_grad()
def to_huggingface(model: Any, hf_config: Any) -> nn.Module | None:
    """Return the Hugging Face model with the weights of a GPTModel in full precision, on rank 0 of every model-parallel
    group (None elsewhere). A collective call; the inverse of load_weights, bit for bit.

    Raises LowBitError for a GPTModel whose linears are quantized: `remove` restores them.
    """
    chunks = megatron.model_chunks(model)
    state: dict[str, Tensor] = {}
    for chunk in chunks:
        state |= export(chunk, hf_config)
    found = from_all_stages(chunks, state)
    if found is None:
        return None
    state = found
    dtype = next(iter(state.values())).dtype
    whole = skeleton(hf_config, dtype)
    expected = {name for name, _ in whole.named_parameters()}
    extra = [name for name in state if name not in expected and (not name.endswith(".bias") or state[name].any())]
    if not hf_config.tie_word_embeddings and extra:
        raise LowBitError(f"the GPTModel has {extra[0]}, which {hf_config.model_type} has no place for")
    whole.load_state_dict({name: state[name] for name in state if name in expected}, strict=False, assign=True)
    whole.tie_weights()
    lacking = [name for name, parameter in whole.named_parameters() if parameter.is_meta]
    if lacking:
        raise LowBitError(f"the GPTModel has no weight for {lacking[0]}")
    return whole.eval()


def from_all_stages(chunks: list[Any], state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors that the pipeline stages have each a part of, on rank 0 of every model-parallel group; None
    elsewhere. A collective call."""
    groups = chunks[0].pg_collection
    if world_size(groups.pp) > 1:
        stages = gather_values(state, groups.pp)
        state = {name: tensor for stage in stages or [] for name, tensor in stage.items()}
    return None if group_rank(groups.pp) or group_rank(groups.tp) else state


def export(model: Any, hf_config: Any, packed: bool = False, packed_experts: bool = False) -> dict[str, Tensor]:
    """Return one chunk's tensors under Hugging Face names, whole, on the CPU; those in codes are left out.

    packed, packed_experts: whether the weights of the linears, or of the experts, are in codes. A collective call.
    """
    layout, tp = megatron.layout_of(model), model.pg_collection.tp
    group = tp if world_size(tp) > 1 else None
    whole_model = skeleton(hf_config, torch.float32)
    expected = [name.removesuffix(".weight") for name, _ in whole_model.named_parameters()]
    prefix = find_prefix(expected)
    base = prefix.rpartition(".")[0]
    state: dict[str, Tensor] = {}

    def gather(tensor: Tensor) -> Tensor:
        return all_gather_stack(tensor.detach().contiguous(), group)

    def words(layer: Any) -> Tensor:
        return gather(layer.weight).flatten(0, 1)[: hf_config.vocab_size].cpu()

    if model.pre_process:
        state[f"{base}.embed_tokens.weight"] = words(model.embedding.word_embeddings)
    if model.post_process:
        state[f"{base}.norm.weight"] = model.get_parameter(f"{final_norm(model)}.weight").detach().cpu()
        if model.output_layer.weight is not None and not hf_config.tie_word_embeddings:
            state[_HEAD] = words(model.output_layer)
    linears = megatron.find_linears(model)
    for (layer, role), (_, module) in progress(linears.items(), len(linears), "gathering weights", env_rank()):
        names = parts(prefix, layer, role, expected)
        tensors = {"weight": None if packed else full_weight(module), "bias": module.bias}
        for leaf, tensor in tensors.items():
            if tensor is None:
                continue
            if leaf == "bias" and role not in COLUMN:
                whole = tensor.detach().cpu()
            else:
                whole = layout.whole(gather(tensor), role).cpu()
            sizes = layout.part_rows(role) if len(names) > 1 else (whole.shape[0],)
            state |= {f"{name}.{leaf}": piece.clone() for name, piece in zip(names, whole.split(sizes), strict=True)}
    for _, block, layer in numbered_layers(model):
        for norm, (_, reader) in NORMS.items():
            found: Any = layer
            for name in norm.split("."):
                found = getattr(found, name, None)
            weight = getattr(getattr(found, "norm", found), "weight", None)  # LowBitNorm holds the norm
            if weight is None and reader is not None:  # Transformer Engine's fused layer holds it
                owner = layer.self_attention if reader == "linear_qkv" else layer.mlp
                weight = getattr(getattr(owner, reader, None), "layer_norm_weight", None)
            if weight is not None:
                state[f"{norm_name(prefix, block, norm)}.weight"] = weight.detach().cpu()
    return state | experts.export_experts(model, prefix, packed_experts)


__all__ = [
    "build",
    "context_length",
    "load_checkpoint",
    "load_weights",
    "to_huggingface",
    "transformer_config",
    "untie_",
]
