"""DeepSpeed inference engines with automatic tensor parallelism (AutoTP).

    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2, "tp_grain_size": 1}, dtype=...)
    engine, *_ = deepspeed.initialize(model=model, config={"tensor_parallel": {"autotp_size": 2}, ...})
    apply_to_deepspeed(engine, "artifact/")

AutoTP has put its own layers in the place of the linears (deepspeed_layers.py); each that the artifact has quantized is
replaced by what holds the same part of the quantized weight. The output projection keeps its own all-reduce of the
logits. An artifact with a quantized one replaces it: each rank then holds the whole projection and computes all logits
itself.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from megatron_lowbit.adapters import arguments, patching, readers, rotated, saving
from megatron_lowbit.adapters.deepspeed_guard import COMPILED, asks_for_compiled_collectives
from megatron_lowbit.adapters.deepspeed_layers import (
    ShardedLinears,
    cuts_across,
    held,
    module_of,
    sharded_layers,
    shares,
    tp_group,
    tp_linears,
)
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.attention import quantize_attention
from megatron_lowbit.adapters.huggingface.experts import expert_modules, with_experts
from megatron_lowbit.adapters.huggingface.head import head_modules
from megatron_lowbit.adapters.zero3 import SpreadShard, gathered, is_spread, is_zero3
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.reducers import HybridReducer, OverRanks
from megatron_lowbit.config import CommConfig, CommMode, LowBitError, one_line
from megatron_lowbit.io.fingerprint import Fingerprint, bit_sum, fingerprint_of
from megatron_lowbit.layers.linear import QuantRowParallelLinear
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
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


def row_parallel_sites(engine: Any) -> dict[str, nn.Module]:
    """Return {fqn: row-parallel layer}, or the linears of an engine on one rank. Those whose ranks hold other inputs
    than equal, consecutive shares are left out: their partial sums are no virtual rank's."""
    if tp_group(engine) is None:
        return huggingface.row_parallel_sites(module_of(engine))
    return {name: layer for name, layer in tp_linears(engine).rows.items() if _is_consecutive(layer)}


def fingerprint(engine: Any, head: str | None = None) -> Fingerprint:
    """Return the fingerprint of the whole model whose shards the ranks hold; a collective call. head: the name of the
    output projection, where it counts too."""
    model, group = module_of(engine), tp_group(engine)
    known = getattr(model, "_lowbit_fingerprint", None)
    if known is not None:
        return known
    linears = tp_linears(model)
    whole: dict[str, Any] = {name: linear for name, (_, linear) in linears.whole.items()}
    whole |= {name: m for name, m in model.named_modules() if name == head and name not in linears.heads}
    sharded = {**linears.columns, **linears.rows, **{name: m for name, m in linears.heads.items() if name == head}}
    sums = {name: bit_sum(gathered(layer.weight).detach()) for name, layer in sharded.items()}
    for name, linear in whole.items():  # of what all ranks hold, the first one's counts
        sums[name] = bit_sum(gathered(linear.weight).detach()) * (group_rank(group) == 0)
    return fingerprint_of(sums, huggingface.model_config(model), group)


def _is_consecutive(layer: Any) -> bool:
    equal = torch.arange(layer._orig_weight_shape[1]).chunk(layer.tp_world_size)
    return all(torch.equal(held(layer, rank), share) for rank, share in enumerate(equal))


def check_host(engine: Any, artifact: Artifact) -> None:
    """Raise LowBitError for an engine of deepspeed.initialize that trains what would be packed or does not hold it, or
    one whose collectives DeepSpeed's compiler writes."""
    model, optimizer = module_of(engine), getattr(engine, "optimizer", None)
    layers = sharded_layers(model)
    deferred = any(getattr(layer, "defer_collectives_to_compiler", False) for layer in layers.values())
    if deferred or asks_for_compiled_collectives(engine):
        raise LowBitError(COMPILED)
    offloads = type(optimizer).__name__ == "DeepSpeedZeRoOffload"  # what stage 3 has without an optimizer
    if is_zero3(model) and not (layers and offloads):
        raise LowBitError(
            "ZeRO stage 3 spreads every weight over the ranks; call apply_to_huggingface before deepspeed.initialize, "
            "or give apply_to_deepspeed an engine with tensor parallelism and without an optimizer"
        )
    packs = artifact.checkpoint is not None and artifact.checkpoint.scheme.weight_bits < 16
    # Stages 1 and 2 keep their own copy of each weight, which they name on the parameter.
    copied = any(getattr(parameter, "_hp_mapping", None) is not None for parameter in model.parameters())
    if packs and ((optimizer is not None and not offloads) or copied):
        raise LowBitError(
            "the engine's optimizer holds the weights that would be packed, and packed weights cannot be trained; call "
            "apply_to_huggingface before deepspeed.initialize, which then trains what is left, or pass no optimizer"
        )


def check_shares(model: Any, linears: ShardedLinears, size: int) -> None:
    """Raise LowBitError for a layer that is cut in another dimension than its kind, and for a row-parallel one whose
    ranks hold unequal shares, which ranges and shard groups do not allow."""
    for name, layer in {**linears.columns, **linears.rows}.items():
        if cuts_across(layer):
            raise LowBitError(
                f"{name}: its shape in tensor_parallel.partition_config cuts a column-parallel linear along inputs, "
                "or a row-parallel one along outputs; give the other partition_dim"
            )
    for name, layer in linears.rows.items():
        if len(set(shares(layer))) > 1:  # first in the words of the model's config
            huggingface.check_divides(huggingface.model_config(model), size, "tp")
            patching.check_equal_shares(name, shares(layer))


def check_runs(model: Any) -> None:
    """Run the sharded model on two tokens, before anything is replaced; a collective call.

    Raises LowBitError where its code does not run on the shards: it splits a fused output by widths of the whole model
    (Phi-3), or norms Q and K whole (OLMo 2).
    """
    try:
        readers.reads_of_model(model, {}, next(model.parameters()).device)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise LowBitError(
            f"{type(model).__name__} does not run as DeepSpeed has sharded it ({one_line(error)}); leave out what its "
            "code cannot split by tensor_parallel.partition_config of deepspeed.initialize, or choose another engine"
        ) from None


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
            deepspeed.initialize (tensor_parallel.autotp_size), or the `module` of either; changed in place.
        artifact: an Artifact or its folder, with a checkpoint, plans or both; the same on every rank.
        comm_mode: how partial sums travel: native (the stock all-reduce), bf16, one_shot, two_shot, exact_sum or auto;
            None: one_shot where the artifact has plans, else native. Or a whole CommConfig, whose cost_table and
            drift_threshold then count too: a site whose values do not fit its plan falls back to bf16 with it, and logs
            a warning without.

    Returns:
        The engine.

    Raises:
        LowBitError: an argument is of another kind; the artifact is of another model, damaged, or has no plan for this
            number of ranks; AutoTP has split a row-parallel linear unevenly, or in a way that the model's own code does
            not run on; or the engine is of deepspeed.initialize and its optimizer holds what would be packed, it uses
            ZeRO stage 3 without tensor parallelism, or DeepSpeed's compiler writes the collectives. Nothing is replaced
            then.

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
    artifact = arguments.load_artifact("apply_to_deepspeed", artifact)
    import_deepspeed()
    model: Any = module_of(engine)
    if not sharded_layers(model) and model is engine:
        raise LowBitError(
            f"apply_to_deepspeed: DeepSpeed has not sharded this {type(model).__name__}; call it with what "
            "deepspeed.init_inference or deepspeed.initialize returns (tp_model_init only notes what they will do), or "
            "apply_to_huggingface for a whole model"
        )
    check_host(engine, artifact)
    patching.remove(engine)
    if not sharded_layers(model):
        huggingface.apply_to_huggingface(model, artifact, 1, comm_mode)
        return engine
    group = tp_group(model)
    rank, size = group_rank(group), world_size(group)
    linears = tp_linears(model)
    check_shares(model, linears, size)
    reducers = patching.Reducers.of(artifact, size, comm_mode, group)
    checkpoint = artifact.checkpoint
    head = None if checkpoint is None else checkpoint.head
    here = fingerprint(model, None if head is None else head.name)
    here = with_experts(here, model, None if checkpoint is None else checkpoint.experts)
    patching.check_same_model(artifact, reducers.plan, lambda _: here)
    if linears.unknown:
        listed = ", ".join(f"{kind} (first: {name})" for kind, name in sorted(linears.unknown.items()))
        warnings.warn(f"tensor-parallel layers left in full precision: {listed}", stacklevel=2)
    check_runs(model)
    quantized = checkpoint is not None and checkpoint.scheme.weight_bits < 16
    replacements: dict[str, nn.Module] = {}
    if checkpoint is not None and quantized:
        replacements = quantized_columns(model, linears, checkpoint, rank, size)
        if group is not None:
            for name in linears.columns.keys() & replacements.keys():
                replacements[name].register_forward_pre_hook(SummedGradient(group))
        for name, (kind, linear) in linears.whole.items():
            if kind == "row" and name in checkpoint.linears:
                shard = patching.row_shard(checkpoint, name, 0, 1, linear.weight)
                bias = rotated.bias_of(checkpoint, name, gathered(linear.bias))
                replacements[name] = QuantRowParallelLinear([shard], None, bias)
    for name, layer in linears.rows.items():
        if quantized and checkpoint is not None and name not in checkpoint.linears:
            continue
        reducer = None if group is None else reducers.real(name, group)
        replacements[name] = row_parallel(name, layer, checkpoint, reducer)
    if checkpoint is not None and quantized:
        replacements |= expert_modules(model, checkpoint.experts)
        patching.warn_unreplaced(model, checkpoint, replacements)
    if head is not None:
        check_head(linears.heads.get(head.name), head.name)
        replacements |= head_modules(model, head)
    if checkpoint is not None and quantized:
        replacements |= rotated.rest_of(model, checkpoint, replacements, rank, size)
    patching.swap(model, replacements)
    saving.save_as_artifact(model, artifact)
    if checkpoint is not None and quantized:
        quantize_attention(model, checkpoint, huggingface.model_config(model))
    return engine


class SummedGradient(OverRanks):
    """A forward pre-hook of a column-parallel linear: the gradient of its input is the sum of the ranks' parts.

    Megatron's copy_to_tensor_model_parallel_region, which DeepSpeed's own LinearLayer has inside.
    """

    def __init__(self, tp_group: dist.ProcessGroup):
        super().__init__()
        self.tp_group = tp_group

    def forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        return (_CopyToRanks.apply(args[0], self.tp_group), *args[1:])


class _CopyToRanks(torch.autograd.Function):
    """Forward the identity, backward the all-reduce."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def quantized_columns(
    model: nn.Module, linears: ShardedLinears, checkpoint: LowBitCheckpoint, rank: int, size: int
) -> dict[str, nn.Module]:
    """Return {fqn: replacement} of the norms that change, and of the column-parallel linears that the checkpoint has
    quantized; those that every rank has whole stay whole."""
    columns = {name: layer for name, layer in linears.columns.items() if name in checkpoint.linears}
    outputs = {name: held(layer) for name, layer in columns.items()}
    for name, (kind, linear) in linears.whole.items():
        if kind == "column" and name in checkpoint.linears:
            columns[name], outputs[name] = linear, torch.arange(len(checkpoint.linears[name].packed_weight))
    return patching.norms_and_columns(model, checkpoint, columns, rank, size, outputs)


def row_parallel(
    name: str, layer: Any, checkpoint: LowBitCheckpoint | None, reducer: HybridReducer | None
) -> QuantRowParallelLinear:
    """Return the replacement of a row-parallel layer."""
    inputs = None if _is_consecutive(layer) else held(layer)
    if inputs is not None and reducer is not None and reducer.plan is not None:
        raise LowBitError(
            f"{name}: the ranks of {type(layer).__name__} hold inputs that are no neighbours, and the plan has no "
            "ranges for their sums; pass comm_mode='native'"
        )
    quantized = checkpoint is not None and checkpoint.scheme.weight_bits < 16
    bias = gathered(layer.bias)
    if not quantized and is_spread(layer.weight):
        return QuantRowParallelLinear([SpreadShard(layer)], reducer, bias)
    shard = patching.row_shard(checkpoint, name, layer.tp_index, layer.tp_world_size, layer.weight, inputs)
    return QuantRowParallelLinear([shard], reducer, rotated.bias_of(checkpoint, name, bias) if quantized else bias)


def check_head(layer: Any, name: str) -> None:
    """Raise LowBitError for an output projection whose ranks hand on the logits of their own part of the vocabulary."""
    if type(layer).__name__ == "VocabParallelLinear":
        raise LowBitError(
            f"{name} is VocabParallelLinear, whose loss reads each rank's own part of the logits, and the artifact has "
            "quantized all of it; set tensor_parallel.vocab_parallel_lm_head=false"
        )
