"""Gradient-based low-rank error correction of one group of blocks (QLLM, arXiv 2310.08041, section 4.2).

    min over A, B of all linears of the group   | F(h) - F~(h~) |^2 / (tokens * hidden)

F is the full-precision group on the full-precision stream h, F~ the quantized one on the quantized stream h~, which
carries the error of all groups before. Only A and B (and, if asked, the norms' gains) are trained: AdamW, linear
decay to 0, one pass after the other over the calibration windows. Every data-parallel rank takes its share of each
step's windows and adds up the gradients; tensor-parallel ranks compute the same loss.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.config import CorrectionConfig, LowBitError
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.runtime.distributed import all_gather_stack

Step = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor, int]]]


def add_low_rank(linears: Sequence[ShardedLinear], config: CorrectionConfig, seed: int) -> list[nn.Parameter]:
    """Add A and B to every linear, seeded by its name, so that neither resuming nor another tp size changes them."""
    parameters: list[nn.Parameter] = []
    for linear in linears:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(linear.name.encode())) % 2**63)
        parameters += linear.add_low_rank(config.rank, config.mode == "branch", generator)
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
    parameters: Sequence[nn.Parameter],
    step: Step,
    steps: int,
    config: CorrectionConfig,
    seed: int,
    dp_group: dist.ProcessGroup | None,
    log: Callable[[float], Any],
    clipping: Sequence[nn.Parameter] = (),
) -> list[float]:
    """Minimise the group's error; returns the mean loss of every epoch.

    step(number) yields (output, target, mask, count) for each of this rank's windows of batch `number` of an epoch's
    `steps`: [1, length, hidden] twice, bool [1, length], and how many values of all ranks' windows the loss is a mean
    over. clipping: the logits of ranges, which are trained too, at a rate of their own. Raises LowBitError where the
    loss is no longer finite.
    """
    optimizer = make_optimizer(parameters, config.learning_rate)
    if clipping:
        optimizer.add_param_group({"params": list(clipping), "lr": config.clipping_rate, "weight_decay": 0.0})
    parameters = [*parameters, *clipping]
    total = config.epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(config.epochs):
        epoch_loss = 0.0
        for number in torch.randperm(steps, generator=generator).tolist():
            loss = _gradients(parameters, step(number), dp_group)
            if not math.isfinite(loss):
                raise LowBitError(
                    f"correction: the loss is {loss}; lower correction.learning_rate={config.learning_rate}"
                )
            optimizer.step()
            schedule.step()
            epoch_loss += loss / steps
        losses.append(epoch_loss)
        log(epoch_loss)
    return losses


def _gradients(
    parameters: Sequence[nn.Parameter],
    windows: Iterable[tuple[Tensor, Tensor, Tensor, int]],
    dp_group: dist.ProcessGroup | None,
) -> float:
    """Set the gradients of one step's loss and return it.

    Window by window, and added up in the order of the windows, whichever rank they were on: so the training does not
    depend on the number of data-parallel ranks.
    """
    rows = []
    for output, target, mask, count in windows:
        loss = (output.float() - target.float())[mask].square().sum() / count
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([loss.detach().view(1), *(grad.reshape(-1) for grad in grads)]))
    gathered = all_gather_stack(
        torch.stack(rows), dp_group
    )  # [ranks, windows of each, 1 + values]; window i was on i % ranks
    total = torch.zeros_like(rows[0])
    for row in gathered.transpose(0, 1).flatten(0, 1):
        total += row
    pieces = total[1:].split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    return total[0].item()


def make_optimizer(parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW without decay: NVIDIA apex's FusedAdam where it is installed and there is a GPU, else torch's."""
    if torch.cuda.is_available():
        try:
            from apex.optimizers import FusedAdam
        except ImportError:  # PyPI's package of that name is another project, and has no optimizers
            pass
        else:
            return FusedAdam(list(parameters), lr=learning_rate, weight_decay=0.0, adam_w_mode=True)
    return torch.optim.AdamW(list(parameters), lr=learning_rate, weight_decay=0.0, fused=True)
