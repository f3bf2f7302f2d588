"""Train the low-rank correction of one group of blocks, and keep it only where it lowers the error (QLLM, section 4.2).

    target     the full-precision stream after the group, F(h)
    inputs     the quantized stream before it, h~
    loss       |F(h) - F~(h~)|^2 / (tokens * hidden), over all windows of all ranks

The training itself (parameters, optimizer, gradients over ranks) is in low_rank.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.qllm.block_group import BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.low_rank import Step, add_low_rank, train, trainable_norms
from megatron_lowbit.runtime.distributed import world_size


@dataclass
class CorrectionResult:
    """Hold a group's losses: the mean of every epoch, and those over all windows before and after the correction."""

    losses: list[float] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None


def correct_group(
    group: BlockGroup,
    share: CalibrationShare,
    inputs: HiddenStream,
    target: HiddenStream,
    config: QuantizeConfig,
    stored_dtype: torch.dtype,
    log: Callable[..., Any],
) -> CorrectionResult:
    """Add A and B to the group's rounded linears and train them (and gains and ranges, if asked), in place.

    inputs, target: see above. stored_dtype: what gains are stored in.
    log: called with epoch= and correction_loss= after every epoch. Does nothing for correction.mode=none. Raises
    LowBitError where the loss is no longer finite.
    """
    section, linears = config.correction, group.linears()
    if section.mode == "none":
        return CorrectionResult()
    parameters = add_low_rank(linears, section, config.seed)
    norms = trainable_norms(group.modules) if section.train_norms else []
    rounded_gains = [norm.gain.detach().clone() for norm in norms]
    parameters += [norm.gain for norm in norms]
    before = group_loss(group, share, inputs, target)
    for linear in linears if section.mode == "merged" else ():  # beside a branch the weights stay
        linear.unfreeze()
    learned = config.weights.clipping == "learned"
    ranges = group.input_ranges() if learned else []
    clipping = [logits for linear in linears for logits in linear.add_clipping()] if learned else []
    clipping += [site.train_from(share.device) for site in ranges]
    step, steps = training_steps(group, share, inputs, target, section.batch_size)
    seed = (config.seed * 1_000_003 + group.blocks[0].index) % 2**63
    epochs = itertools.count()

    def log_epoch(loss: float) -> None:
        log(epoch=next(epochs), correction_loss=loss)

    losses = train(parameters, step, steps, section, seed, share.dp_group, log_epoch, clipping)
    for norm in norms:
        norm.gain.data = (norm.gain.data - norm.offset).to(stored_dtype).float() + norm.offset  # as it will be deployed
    clips = [site.clip for site in ranges]
    for site in ranges:
        site.settle()
    for linear in linears:
        linear.freeze()
    after = group_loss(group, share, inputs, target)
    if not after < before:  # never worse than without
        for linear in linears:
            linear.drop_low_rank()
        for norm, gain in zip(norms, rounded_gains, strict=True):
            norm.gain.data = gain
        for site, clip in zip(ranges, clips, strict=True):
            site.clip = clip
    return CorrectionResult(losses, before, after)


def training_steps(
    group: BlockGroup, share: CalibrationShare, inputs: HiddenStream, target: HiddenStream, batch_size: int
) -> tuple[Step, int]:
    """Return what `train` takes: step(number), the forward of one step's windows, and the steps of an epoch.

    batch_size: windows of a step, of all data-parallel ranks together.
    """
    windows = batch_size // world_size(share.dp_group)  # of each rank
    tokens = share.all_mask.sum(1)  # of all ranks' windows
    hidden_size = inputs.values.shape[-1]

    def step(number: int) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        share.raise_if_preempted()
        values = int(tokens[number * batch_size : (number + 1) * batch_size].sum()) * hidden_size
        for window in range(number * windows, min((number + 1) * windows, len(share.ids))):
            output = group.forward(inputs.read(window, window + 1, share.device))
            wanted = target.read(window, window + 1, share.device)
            yield output, wanted, share.mask[window : window + 1].to(output.device), values

    return step, -(-len(share.ids) // windows)


@torch.no_grad()
def group_loss(group: BlockGroup, share: CalibrationShare, inputs: HiddenStream, target: HiddenStream) -> float:
    """Return the group's mean squared error over all windows of all ranks, as it computes now."""
    total = torch.zeros(1, dtype=torch.float64, device=share.device)
    for start, stop, mask in share.batches():
        output = group.forward(inputs.read(start, stop, share.device))
        wanted = target.read(start, stop, share.device)
        total += (output.float() - wanted.float())[mask].square().sum(dtype=torch.float64)
    if share.dp_group is not None:
        dist.all_reduce(total, group=share.dp_group)
    return total.item() / (int(share.all_mask.sum()) * inputs.values.shape[-1])
