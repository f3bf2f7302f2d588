"""The ratio of an input group's activation ranges with the least error of its linears: weights.clipping=mse.

error(c) = sum over linears and tokens |(Q_c(x) - x) W^T|^2        x, W: reassembled; c: one ratio of both ends
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.qllm.capture_inputs import captured_inputs
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.input_clipping import Clip, as_clip

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8)


@torch.no_grad()
def best_clip(
    block: nn.Module,
    group: InputGroup,
    linears: Sequence[ShardedLinear],
    forwards: Iterable[tuple[Callable[[], Any], Tensor]],
    dp_group: dist.ProcessGroup | None,
) -> Clip:
    """Return the ratio for what the linears read; they are reassembled, and their input is not quantized yet."""
    first, bits = linears[0], linears[0].scheme.act_bits
    count = 1 if group.kind == "column" else len(first.hp_weights)
    clips = [as_clip(ratio, ratio) for ratio in RATIOS]
    errors = torch.zeros(len(clips), dtype=torch.float64, device=first.hp_weights[0].device)
    for x, mask, _ in captured_inputs(block, group, forwards):
        for s, x_s in enumerate(first.reassembled(x[mask].chunk(count, -1))):
            for number, clip in enumerate(clips):
                error = fake_quantize(x_s, bits, clip=clip) - x_s
                for linear in linears:
                    for w in linear.hp_weights if count == 1 else linear.hp_weights[s : s + 1]:
                        errors[number] += (error @ w.T.to(error.dtype)).float().square().sum(dtype=torch.float64)
    for ranks in (dp_group, first.tp_group):
        if ranks is not None:
            dist.all_reduce(errors, group=ranks)
    return clips[int(torch.where(errors.isfinite(), errors, torch.inf).argmin())]
