"""Pack a quantized group of blocks into its part of the checkpoint."""

from __future__ import annotations

import torch

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.input_range import HeadRange
from megatron_lowbit.qllm.sharded_linear import PreparedNorm, ShardedLinear
from megatron_lowbit.quant.checkpoint import CheckpointPart
from megatron_lowbit.quant.input_clipping import WHOLE, attention_sites


@torch.no_grad()
def pack_blocks(group: BlockGroup, trained_norms: bool) -> CheckpointPart:
    """Return what is stored of the group: packed linears, low-rank factors, reassembly plans and all other tensors.

    trained_norms: whether the norms' gains were trained. A collective call over the tensor-parallel group.
    """
    part = CheckpointPart()
    for block in group.blocks:
        part.tensors.update(block.unquantized)
        part.experts.update(block.experts)
        for module in block.module.modules():
            if isinstance(module, ShardedLinear):
                pack_linear(part, module)
            if isinstance(module, PreparedNorm):
                pack_norm(part, module, block, trained_norms)
        pack_heads(part, block)
    return part


def pack_linear(part: CheckpointPart, linear: ShardedLinear) -> None:
    """Add a linear, and the plan of its input where no norm carries that out."""
    part.linears[linear.name] = linear.packed()
    if (low_rank := linear.low_rank()) is not None:
        part.low_rank[linear.name] = low_rank
    if linear.range.clip != WHOLE:
        part.clipping[linear.name] = linear.range.clip
    plan = linear.whole_plan() if not linear.prepared else None
    if plan is not None and not plan.is_identity:
        part.reassembly[linear.name] = plan


def pack_heads(part: CheckpointPart, block: Block) -> None:
    """Add the ratios of the ranges of Q, K and V."""
    for owner, module in block.module.named_modules():
        for name, site in zip(attention_sites(f"{block.name}.{owner}"), attention.quantizers_of(module), strict=False):
            if isinstance(site, HeadRange) and site.clip != WHOLE:
                part.clipping[name] = site.clip


def pack_norm(part: CheckpointPart, prepared: PreparedNorm, block: Block, trained: bool) -> None:
    """Add the plan of a norm's output, and its weight where that was trained, in the dtype it was stored in."""
    norm = prepared.norm
    if not isinstance(norm, ReassembledNorm):
        return
    if not (plan := norm.reassembly.plan().to("cpu")).is_identity:
        part.reassembly[prepared.name] = plan
    if trained and norm.gain is not None:
        name = f"{prepared.name}.weight"
        weight = norm.gain.detach().cpu() - norm.offset
        part.tensors[name] = weight.to(block.unquantized[name].dtype)
