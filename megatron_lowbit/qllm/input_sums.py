"""Sums over the calibration tokens of what linears multiply, as it is deployed: reassembled and quantized.

    gram(x) = x^T x        the Hessian of GPTQ (quant/gptq.py)
    squares(x)             its diagonal, by which errors of weights are weighted (quant/clipping.py)

float64, window by window, and added up in the order of the windows, whichever rank they were on: the same bits for any
number of ranks. A row-parallel linear has a sum per shard, so that its Hessian is block-diagonal at every TP size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import LowBitError
from megatron_lowbit.qllm.capture_inputs import captured_inputs
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.runtime.distributed import all_gather_stack


def gram(x: Tensor) -> Tensor:
    """Return x^T x, float64 [in, in], of x [tokens, in]."""
    x = x.double()
    return x.T @ x


def squares(x: Tensor) -> Tensor:
    """Return the diagonal of x^T x, float64 [in], of x [tokens, in]."""
    return x.double().square().sum(0)


@torch.no_grad()
def input_sums(
    block: nn.Module,
    group: InputGroup,
    forwards: Iterable[tuple[Callable[[], Any], Tensor]],
    statistic: Callable[[Tensor], Tensor],
    dp_group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Return the sum of a statistic over all windows of all ranks: one of the whole input (column), or one per shard.

    forwards: as captured_inputs takes them. The group's linears are reassembled and quantize their input by now. Raises
    LowBitError on all ranks where the input has NaN or Inf on any.
    """
    linear = block.get_submodule(group.linears[0])
    assert isinstance(linear, ShardedLinear)
    count = 1 if group.kind == "column" else len(linear.hp_weights)
    totals: list[Tensor] = []
    for x, mask, _ in captured_inputs(block, group, forwards):
        for window, real in zip(x, mask, strict=True):
            for s, x_s in enumerate(linear.prepare_input(window[real].chunk(count, -1))):
                # Window i was on rank i % ranks.
                for part in all_gather_stack(statistic(x_s), dp_group):
                    if len(totals) == s:
                        totals.append(torch.zeros_like(part))
                    totals[s] += part
    finite = torch.stack([torch.isfinite(total).all() for total in totals]).all().to(torch.int32)
    if linear.tp_group is not None:  # all ranks have to leave together
        dist.all_reduce(finite, dist.ReduceOp.MIN, linear.tp_group)
    if not finite:
        raise LowBitError(f"{linear.name} is given NaN or Inf; check the model's weights and dtype")
    return totals
