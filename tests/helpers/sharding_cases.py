"""What ranks of a RankPool run for test_sharding.py: each holds its share of the shards. Size 1 runs in the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import WeightsConfig
from megatron_lowbit.qllm.input_range import HeadRange, InputRange
from megatron_lowbit.qllm.input_sums import gram, squares
from megatron_lowbit.qllm.shard_groups import gather_shards, ordered_sum, replicate
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.gptq import InverseFactor
from megatron_lowbit.runtime.distributed import all_gather_stack


def group_of(size: int) -> dist.ProcessGroup | None:
    return dist.group.WORLD if size > 1 else None


def mine(shards: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
    each = len(shards) // size
    return list(shards[rank * each : (rank + 1) * each])


def sums(rank: int, size: int, shards: list[Tensor]) -> dict[str, Any]:
    own = [shard.clone() for shard in mine(shards, rank, size)]
    total = ordered_sum(own, group_of(size))
    return {"sum": total, "kept": all(map(torch.equal, own, mine(shards, rank, size)))}


def replicated(rank: int, size: int, x: Tensor, upstream: list[Tensor]) -> dict[str, Any]:
    """x for every shard, each with its own upstream gradient."""
    x = x.clone().requires_grad_()
    own = mine(upstream, rank, size)
    copies = replicate(x, len(own), group_of(size))
    (grad,) = torch.autograd.grad(copies, [x], own)
    return {"copies": [copy.detach() for copy in copies], "grad": grad}


def gathered(rank: int, size: int, shards: list[Tensor], weights: list[Tensor]) -> dict[str, Any]:
    """All shards on every rank, and the gradient of a loss that mixes them: sum over s of (weight_s * shard_s^3)."""
    own = [shard.clone().requires_grad_() for shard in mine(shards, rank, size)]
    everything = gather_shards(own, group_of(size))
    loss = sum((weight * shard**3).sum() for weight, shard in zip(weights, everything, strict=True))
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, own)
    return {"shards": [shard.detach() for shard in everything], "grads": list(grads), "loss": loss.detach()}


def gathered_in_part(rank: int, size: int, shards: list[Tensor], used: int) -> list[Tensor | None]:
    """A loss of one shard alone: on every rank, also those that do not own it, backward has to work."""
    own = [shard.clone().requires_grad_() for shard in mine(shards, rank, size)]
    everything = gather_shards(own, group_of(size))
    return list(torch.autograd.grad((everything[used] * 2).sum(), own, allow_unused=True))


def ranges(
    rank: int, size: int, heads: Tensor, upstream: Tensor, inputs: Tensor, weights: Tensor, shards: int
) -> dict[str, Any]:
    """Trained ranges of this rank's heads, [1, all heads, tokens, features], and of its shards of a row-parallel input,
    with their gradients."""
    group = group_of(size)
    of_heads, of_shards = HeadRange(4, group), InputRange(4)
    logits = [site.train_from(heads.device) for site in (of_heads, of_shards)]
    with torch.no_grad():
        for values in logits:
            values.copy_(torch.tensor([1.0, 0.5]))
    own, own_upstream = (t.chunk(size, 1)[rank] for t in (heads, upstream))
    y = of_heads(own)
    (head_grad,) = torch.autograd.grad(y, logits[:1], own_upstream)
    slices, factors = (mine(list(t.chunk(shards, 1)), rank, size) for t in (inputs, weights))
    quantizers = of_shards.for_shards(len(slices), group)
    quantized = [quantize(x) for quantize, x in zip(quantizers, slices, strict=True)]
    (shard_grad,) = torch.autograd.grad(quantized, logits[1:], factors)
    return {
        "heads": y.detach(),
        "shards": [x.detach() for x in quantized],
        "grads": [head_grad, shard_grad],
    }


def rounded(
    rank: int, size: int, kind: str, weight: Tensor, x: Tensor, upstream: Tensor, shards: int, group_size: int | None
) -> dict[str, Any]:
    """A ShardedLinear clipped by mse, its ratios then trained, and its codes chosen by GPTQ: what it packs each time.

    x, upstream: see linear. Every rank has all inputs; the Hessians are of those of its shards.
    """
    dim, group = (0, group_of(size)) if kind == "column" else (1, group_of(size))
    own = mine([part.contiguous() for part in weight.chunk(shards, dim)], rank, size)
    module = ShardedLinear("some_proj", kind, own, None, group)  # type: ignore[arg-type]
    module.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4", group_size=group_size))
    tokens = x.flatten(0, 1)
    inputs = [tokens] if kind == "column" else mine(list(tokens.chunk(shards, 1)), rank, size)
    packed: dict[str, list[Tensor]] = {}

    def pack(name: str) -> None:
        whole = module.packed()
        packed[name] = [whole.packed_weight, whole.scale, whole.zero_point]
        module.freeze()
        seen = torch.cat(list(all_gather_stack(torch.cat(module.effective_weights(), dim), group)), dim)
        assert torch.equal(seen, whole.dequantize()), "what is deployed is not what was computed with"

    pack("nearest")
    module.clip([squares(x_s) for x_s in inputs])
    pack("clipped")
    parameters = module.add_clipping()
    with torch.no_grad():  # as if trained: another value in every place
        for logits in parameters:
            logits += torch.linspace(-3, 1, logits.numel()).view_as(logits)
    y = module(x if kind == "column" else x.chunk(size, -1)[rank])
    grads = torch.autograd.grad(y, parameters, upstream.chunk(size, -1)[rank] if kind == "column" else upstream)
    pack("learned")
    module.round_by_gptq([InverseFactor.of(gram(x_s)) for x_s in inputs])
    pack("gptq")
    return {"packed": packed, "grads": list(grads), "y": module(x if kind == "column" else x.chunk(size, -1)[rank])}


def linear(
    rank: int, size: int, kind: str, weight: Tensor, x: Tensor, upstream: Tensor, shards: int, branch: bool
) -> dict[str, Any]:
    """A quantized ShardedLinear with a low-rank correction: its output, gradients and packed weight.

    x: the input over all shards; upstream: the gradient of the output over all shards.
    """
    dim, group = (0, group_of(size)) if kind == "column" else (1, group_of(size))
    own = mine([part.contiguous() for part in weight.chunk(shards, dim)], rank, size)
    module = ShardedLinear("some_proj", kind, own, None, group)  # type: ignore[arg-type]
    parameters = module.add_low_rank(3, branch, torch.Generator().manual_seed(0))
    assert module.lora_shared is not None and module.lora_shards is not None
    with torch.no_grad():  # B as if trained: the same numbers over all shards at every size
        outputs = weight.shape[0]
        b = 0.05 * torch.randn(outputs, 3, generator=torch.Generator().manual_seed(1))
        if kind == "column":
            for shard, values in zip(module.lora_shards, mine(b.chunk(shards), rank, size), strict=True):
                shard.copy_(values)
        else:
            module.lora_shared.copy_(b)
    module.quantize(Scheme(4, 4), WeightsConfig(scheme="W4A4"))
    x = x if kind == "column" else x.chunk(size, -1)[rank]
    upstream = upstream.chunk(size, -1)[rank] if kind == "column" else upstream
    x = x.clone().requires_grad_()
    y = module(x)
    x_grad, shared, *own_grads = torch.autograd.grad(y, [x, *parameters], upstream)
    packed, low_rank = module.packed(), module.low_rank()
    return {
        "y": y.detach(),
        "x_grad": x_grad,
        "shared": shared,
        "own": own_grads,
        "packed": [packed.packed_weight, packed.scale, packed.zero_point],
        "low_rank": None if low_rank is None else [low_rank.lora_a, low_rank.lora_b],
    }
