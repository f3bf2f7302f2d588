"""Gradient-based low-rank error correction of one group of blocks (QLLM, arXiv 2310.08041, section 4.2).

    min over A, B of all linears of the group   | F(h) - F~(h~) |^2 / (tokens * hidden)

F is the full-precision group on the full-precision stream h, F~ the quantized one on the quantized stream h~, which carries the
error of all groups before. Only A and B (and, if asked, the norms' gains) are trained: AdamW, linear decay to 0, one pass
after the other over the calibration windows. Every data-parallel rank takes its share of each step's windows and adds up the
gradients; tensor-parallel ranks compute the same loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.config import CorrectionConfig, LowBitError
from megatron_lowbit.linear import ReassembledNorm
from megatron_lowbit.sharded import ShardedLinear

Step = Callable[[int], tuple[Tensor, Tensor, Tensor, int]]


def add_low_rank(linears: Sequence[ShardedLinear], config: CorrectionConfig, seed: int) -> list[nn.Parameter]:
    """A and B for every linear, seeded by its name, so that neither resuming nor another tp size changes them."""
    parameters: list[nn.Parameter] = []
    for linear in linears:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(linear.name.encode())) % 2**63)
        parameters += linear.add_low_rank(config.rank, config.mode == "branch", generator)
    return parameters


def trainable_gains(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The gains of all norms of the blocks, as parameters that take gradients."""
    gains: list[nn.Parameter] = []
    for block in blocks:
        for module in block.modules():
            if isinstance(module, ReassembledNorm) and module.gain is not None:
                gain = nn.Parameter(module.gain)
                del module.gain
                module.register_parameter("gain", gain)
                gains.append(gain)
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 1:
                gains.append(weight.requires_grad_(True))
    return gains


def train(
    parameters: Sequence[nn.Parameter],
    step: Step,
    steps: int,
    config: CorrectionConfig,
    seed: int,
    dp_group: dist.ProcessGroup | None,
    log: Callable[[float], Any],
) -> list[float]:
    """Minimise the group's error; returns the mean loss of every epoch.

    step(number): (output, target, mask, count) of this rank's windows of batch `number` of an epoch's `steps`: [windows,
    length, hidden] twice, bool [windows, length], and the values of all ranks' real tokens that the loss is a mean over.
    Raises LowBitError where the loss is no longer finite.
    """
    optimizer = make_optimizer(parameters, config.learning_rate)
    total = config.epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(config.epochs):
        epoch_loss = 0.0
        for number in torch.randperm(steps, generator=generator).tolist():
            output, target, mask, count = step(number)
            loss = (output.float() - target.float())[mask].square().sum() / count
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            value = loss.detach()
            if dp_group is not None:
                dist.all_reduce(value, group=dp_group)
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=dp_group)
            if not torch.isfinite(value):
                raise LowBitError(f"correction: the loss is {value.item()}; lower correction.learning_rate={config.learning_rate}")
            optimizer.step()
            schedule.step()
            epoch_loss += value.item() / steps
        losses.append(epoch_loss)
        log(epoch_loss)
    return losses


def make_optimizer(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without decay: NVIDIA apex's FusedAdam where that is installed and there is a GPU, else torch's own."""
    if torch.cuda.is_available():
        try:
            from apex.optimizers import FusedAdam
        except ImportError:  # PyPI's package of that name is another project, and has no optimizers
            pass
        else:
            return FusedAdam(list(parameters), lr=learning_rate, weight_decay=0.0, adam_w_mode=True)
    return torch.optim.AdamW(list(parameters), lr=learning_rate, weight_decay=0.0, fused=True)
