"""DeepSpeed inference engines with automatic tensor parallelism (AutoTP).

    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2, "tp_grain_size": 1}, dtype=...)
    apply_to_deepspeed(engine, "artifact/")

AutoTP turns q/k/v/gate/up into LinearLayer and o_proj/down_proj into LinearAllreduce. Both are swapped by exact type,
since LmHeadLinearAllreduce subclasses LinearAllreduce and must keep its own all-reduce of the logits. An artifact with
a quantized output projection replaces it: each rank then holds the whole projection and computes all logits itself.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import arguments, patching, rotated, saving
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.attention import quantize_attention
from megatron_lowbit.adapters.huggingface.experts import expert_modules, with_experts
from megatron_lowbit.adapters.huggingface.head import head_modules
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.config import CommConfig, CommMode, LowBitError, one_line
from megatron_lowbit.io.fingerprint import Fingerprint, model_fingerprint
from megatron_lowbit.layers.linear import QuantRowParallelLinear
from megatron_lowbit.runtime.distributed import group_rank, world_size
from megatron_lowbit.runtime.metrics import require


def import_deepspeed() -> Any:
    """Import DeepSpeed, without its shared-memory all-reduce on CPUs.

    That op segfaults under torchrun and on several nodes, ignores the group, and skips non-contiguous tensors. It is
    kept from being built, and switched off in a communication backend that has it already.
    """
    deepspeed = require("deepspeed", "deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = deepspeed.comm.comm.cdb
    if backend is not None:
        backend.shm_vector_kernel_level = 0
    return deepspeed


def init_engine(model: nn.Module, tp_size: int, dtype: Any) -> Any:
    """Call init_inference with equal shares: AutoTP's default grain of 64 would split an MLP of 352 into 192 and 160.

    Raises LowBitError for a model that AutoTP does not know.
    """
    deepspeed = import_deepspeed()
    try:
        with contextlib.redirect_stdout(None):  # AutoTP prints its policy
            return deepspeed.init_inference(
                model,
                tensor_parallel={"tp_size": tp_size, "tp_grain_size": 1},
                dtype=dtype,
                replace_with_kernel_inject=False,
            )
    except AssertionError as error:
        raise LowBitError(f"DeepSpeed cannot shard {type(model).__name__}: {one_line(error)}") from None


def tp_group(engine: Any) -> dist.ProcessGroup | None:
    """Return the tensor-parallel group of an engine, of init_inference or (with AutoTP) initialize; None for a single
    rank."""
    group = getattr(engine, "mp_group", None)
    if group is None and hasattr(engine, "autotp_size") and engine.autotp_size() > 1:
        from deepspeed.utils import groups

        group = groups.get_tensor_model_parallel_group()
    return group if group is not None and dist.get_world_size(group) > 1 else None


def tp_linears(engine: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return ({fqn: LinearLayer}, {fqn: LinearAllreduce}, {other tensor-parallel type: fqn of the first})."""
    from deepspeed.module_inject import layers

    columns: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for name, module in engine.module.named_modules():
        if type(module) is layers.LinearLayer and not module.gather_output:
            columns[name] = module
        elif type(module) is layers.LinearAllreduce:
            rows[name] = module
        elif isinstance(module, layers.TensorParallel_Layer) and type(module) is not layers.LmHeadLinearAllreduce:
            unknown.setdefault(type(module).__name__, name)
    return columns, rows, unknown


def row_parallel_sites(engine: Any) -> dict[str, nn.Module]:
    """Return {fqn: LinearAllreduce}, or the linears of an engine on one rank."""
    return huggingface.row_parallel_sites(engine.module) if tp_group(engine) is None else tp_linears(engine)[1]


def fingerprint(engine: Any, head: str | None = None) -> Fingerprint:
    """Return the fingerprint of the whole model whose shards the ranks hold; a collective call. head: the name of the
    output projection, where it counts too."""
    from deepspeed.module_inject.layers import LmHeadLinearAllreduce

    known = getattr(engine.module, "_lowbit_fingerprint", None)
    if known is not None:
        return known
    columns, rows, _ = tp_linears(engine)
    weights = {name: module.weight for name, module in {**columns, **rows}.items()}
    heads = {name: m for name, m in engine.module.named_modules() if name == head}
    weights |= {name: m.weight for name, m in heads.items() if type(m) is LmHeadLinearAllreduce}
    return model_fingerprint(huggingface.model_config(engine.module), weights, tp_group(engine))


def check_not_trained(engine: Any, artifact: Artifact) -> None:
    """Raise LowBitError for an engine of deepspeed.initialize that trains what would be packed, or does not hold it."""
    if any(hasattr(parameter, "ds_id") for parameter in engine.module.parameters()):
        raise LowBitError(
            "ZeRO stage 3 spreads every weight over the ranks; call apply_to_huggingface before deepspeed.initialize"
        )
    packs = artifact.checkpoint is not None and artifact.checkpoint.scheme.weight_bits < 16
    if packs and getattr(engine, "optimizer", None) is not None:
        raise LowBitError(
            "the engine's optimizer holds the weights that would be packed, and packed weights cannot be trained; call "
            "apply_to_huggingface before deepspeed.initialize, which then trains what is left, or pass no optimizer"
        )


def apply_to_deepspeed(
    engine: Any, artifact: str | Path | Artifact, comm_mode: CommMode | CommConfig | None = None
) -> Any:
    """Put an artifact into a DeepSpeed engine: quantized linears, and low-bit all-reduces between its ranks.

    A collective call: every rank makes it. Tensor-parallel layers of types that this adapter does not know stay as they
    are, with a warning that names them. To train what an artifact leaves in full precision, call apply_to_huggingface
    before deepspeed.initialize. `saturation` tells whether the calibrated ranges held, and `remove` takes the artifact
    out again.

    Args:
        engine: of deepspeed.init_inference (AutoTP, with tensor_parallel={"tp_size": N, "tp_grain_size": 1}), or of
            deepspeed.initialize; changed in place.
        artifact: an Artifact or its folder, with a checkpoint, plans or both; the same on every rank.
        comm_mode: how partial sums travel: native (the stock all-reduce), bf16, one_shot, two_shot, exact_sum or auto;
            None: one_shot where the artifact has plans, else native. Or a whole CommConfig, whose cost_table and
            drift_threshold then count too: a site whose values do not fit its plan falls back to bf16 with it, and logs
            a warning without.

    Returns:
        The engine.

    Raises:
        LowBitError: an argument is of another kind; the artifact is of another model, damaged, or has no plan for this
            number of ranks; AutoTP has split a linear unevenly; or the engine is of deepspeed.initialize and its
            optimizer holds what would be packed, or it uses ZeRO stage 3.

    Example, on each of two ranks:
        >>> import deepspeed
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> import megatron_lowbit as lowbit
        >>> model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        >>> shares = {"tp_size": 2, "tp_grain_size": 1}
        >>> engine = deepspeed.init_inference(model, tensor_parallel=shares, dtype=torch.float32)
        >>> engine = lowbit.apply_to_deepspeed(engine, "artifact")
        >>> engine(torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 128])
    """
    arguments.check_model("apply_to_deepspeed", engine, "a DeepSpeed engine")
    if not isinstance(getattr(engine, "module", None), nn.Module):
        raise LowBitError(
            f"apply_to_deepspeed takes the engine that deepspeed.init_inference returns, not {type(engine).__name__}; "
            "for a model without an engine call apply_to_huggingface"
        )
    artifact = arguments.load_artifact("apply_to_deepspeed", artifact)
    import_deepspeed()
    check_not_trained(engine, artifact)
    group = tp_group(engine)
    if group is None:
        huggingface.apply_to_huggingface(engine.module, artifact, 1, comm_mode)
        return engine
    patching.remove(engine)
    rank, size = group_rank(group), world_size(group)
    reducers = patching.Reducers.of(artifact, size, comm_mode, group)
    checkpoint = artifact.checkpoint
    head = None if checkpoint is None else checkpoint.head
    here = fingerprint(engine, None if head is None else head.name)
    here = with_experts(here, engine.module, None if checkpoint is None else checkpoint.experts)
    patching.check_same_model(artifact, reducers.plan, lambda _: here)
    columns, rows, unknown = tp_linears(engine)
    if unknown:
        listed = ", ".join(f"{kind} (first: {name})" for kind, name in sorted(unknown.items()))
        warnings.warn(f"tensor-parallel layers left in full precision: {listed}", stacklevel=2)
    replacements: dict[str, nn.Module] = {}
    quantized = checkpoint is not None and checkpoint.scheme.weight_bits < 16
    huggingface.check_divides(huggingface.model_config(engine.module), size, "tp")  # AutoTP would split unevenly
    if checkpoint is not None and quantized:
        columns = {name: module for name, module in columns.items() if name in checkpoint.linears}
        for name, module in columns.items():
            patching.check_equal_shares(name, module._partition_sizes)
        replacements = patching.norms_and_columns(engine.module, checkpoint, columns, rank, size)
    for name, module in rows.items():
        if quantized and checkpoint is not None and name not in checkpoint.linears:
            continue
        patching.check_equal_shares(name, module._partition_sizes)
        shard = patching.row_shard(checkpoint, name, rank, size, module.weight)
        bias = rotated.bias_of(checkpoint, name, module.bias) if quantized else module.bias
        replacements[name] = QuantRowParallelLinear([shard], reducers.real(name, group), bias)
    if checkpoint is not None and quantized:
        replacements |= expert_modules(engine.module, checkpoint.experts)
        patching.warn_unreplaced(engine.module, checkpoint, replacements)
    if head is not None:
        replacements |= head_modules(engine.module, head)
    if checkpoint is not None and quantized:
        replacements |= rotated.rest_of(engine.module, checkpoint, replacements, rank, size)
    patching.swap(engine.module, replacements)
    saving.save_as_artifact(engine.module, artifact)
    if checkpoint is not None and quantized:
        quantize_attention(engine.module, checkpoint, huggingface.model_config(engine.module))
    return engine
