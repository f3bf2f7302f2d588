"""Gradient-based low-rank error correction of one group of blocks (QLLM, arXiv 2310.08041, section 4.2).

    min over A, B of all linears of the group   | F(h) - F~(h~) |^2 / (tokens * hidden)

F is the full-precision group on the full-precision stream h, F~ the quantized one on the quantized stream h~, which
carries the error of all groups before. Only A and B (and, if asked, the norms' gains) are trained: AdamW, the learning
rate falling linearly to 0, one pass after the other over the training windows. Every data-parallel rank takes its share
of each batch's windows and adds up the gradients; tensor-parallel ranks compute the same loss.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.config import CorrectionConfig, LowBitError
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.runtime.distributed import all_gather_stack
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.metrics import progress

Windows = Iterable[tuple[Tensor, Tensor, Tensor, int]]


@dataclass
class ParameterGroup:
    """Hold parameters that are trained with one learning rate (at the first step) and one weight decay (AdamW's)."""

    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass
class Batches:
    """Describe one epoch: batch `number` of `count`, as this rank's share of it.

    read(number) yields (output, target, mask, values) for each of this rank's windows of that batch: [1, length,
    hidden] twice, bool [1, length], and how many values of all ranks' windows the loss is a mean over. per_rank: how
    many windows it yields at most.
    """

    read: Callable[[int], Windows]
    count: int
    per_rank: int


def add_low_rank(
    linears: Sequence[ShardedLinear], ranks: Mapping[str, int], branch: bool, seed: int
) -> list[nn.Parameter]:
    """Add A and B to every linear, seeded by its name, so that neither resuming nor another tp size changes them.

    ranks: {linear's name: its rank}; one of rank 0 gets none.
    """
    parameters: list[nn.Parameter] = []
    for linear in linears:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(linear.name.encode())) % 2**63)
        if rank := ranks[linear.name]:
            parameters += linear.add_low_rank(rank, branch, generator)
    return parameters


def trains_norms(config: CorrectionConfig) -> bool:
    """Tell whether the norms' gains are trained beside A and B."""
    return config.train_norms and config.mode != "none"


def trainable_norms(blocks: Sequence[nn.Module]) -> list[Any]:
    """Return the blocks' ReassembledNorms, their float32 gains made parameters that take gradients.

    They are the norms that linears read. All tensor-parallel ranks see the whole gradient of such a gain, which a norm
    inside the attention (of one rank's heads) would not.
    """
    norms: list[Any] = []
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, ReassembledNorm) and module.gain is not None:
            gain = nn.Parameter(module.gain)
            del module.gain
            module.register_parameter("gain", gain)
            norms.append(module)
    return norms


def train(
    groups: Sequence[ParameterGroup],
    batches: Batches,
    epochs: int,
    seed: int,
    dp_group: dist.ProcessGroup | None,
    after_epoch: Callable[[int, float], Any],
) -> None:
    """Minimise the group's error, and call after_epoch(epoch, mean loss of its batches) after each of the epochs.

    Raises LowBitError where the loss is no longer finite.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    optimizer = make_optimizer(groups)
    total = epochs * batches.count
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        epoch_loss = 0.0
        order = torch.randperm(batches.count, generator=generator).tolist()
        for number in progress(order, batches.count, f"correcting, epoch {epoch + 1} of {epochs}", env_rank()):
            loss = gradients(parameters, batches.read(number), batches.per_rank, dp_group)
            if not math.isfinite(loss):
                rate = groups[0].learning_rate
                raise LowBitError(f"correction: the loss is {loss}; lower correction.learning_rate={rate}")
            optimizer.step()
            schedule.step()
            epoch_loss += loss / batches.count
        after_epoch(epoch, epoch_loss)


def gradients(
    parameters: Sequence[nn.Parameter], windows: Windows, per_rank: int, dp_group: dist.ProcessGroup | None
) -> float:
    """Set the gradients of one batch's loss and return it.

    Window by window, and added up in the order of the windows, whichever rank they were on: so the training does not
    depend on the number of data-parallel ranks.
    """
    device, sizes = parameters[0].device, [parameter.numel() for parameter in parameters]
    # A rank with fewer windows than others has rows of zeros for the rest: they come last and change no sum.
    rows = torch.zeros(per_rank, 1 + sum(sizes), device=device)
    for row, (output, target, mask, count) in zip(rows, windows, strict=False):
        loss = (output.float() - target.float())[mask].square().sum() / count
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
        torch.cat([loss.detach().view(1), *(grad.reshape(-1) for grad in grads)], out=row)
    gathered = all_gather_stack(rows, dp_group)  # [ranks, windows of each, 1 + values]; window i was on i % ranks
    total = torch.zeros_like(rows[0])
    for row in gathered.transpose(0, 1).flatten(0, 1):
        total += row
    for parameter, piece in zip(parameters, total[1:].split(sizes), strict=True):
        parameter.grad = piece.view_as(parameter)
    return total[0].item()


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Return AdamW: NVIDIA apex's FusedAdam where it is installed and there is a GPU, else torch's."""
    options = [
        {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.weight_decay}
        for group in groups
        if group.parameters
    ]
    if torch.cuda.is_available():
        try:
            from apex.optimizers import FusedAdam
        except ImportError:  # PyPI's package of that name is another project, and has no optimizers
            pass
        else:
            return FusedAdam(options, adam_w_mode=True)
    return torch.optim.AdamW(options, fused=True)
