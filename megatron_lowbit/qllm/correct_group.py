"""Train the low-rank correction of one group of blocks, and keep it only where it lowers the error (QLLM, section 4.2).

    target     the full-precision stream after the group, F(h)
    inputs     the quantized stream before it, h~
    loss       |F(h) - F~(h~)|^2 / (tokens * hidden)

The last windows (correction.holdout) are not trained on: their loss after every epoch says which epoch's factors are
kept, or that none are. Without such windows, the loss over all of them says whether the last epoch's are. Where GPTQ
chooses the codes, it has its say after that (correct_before_gptq.py).

The training itself (parameters, optimizer, gradients over ranks) is in low_rank.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.qllm.allocate_ranks import choose_ranks
from megatron_lowbit.qllm.block_group import BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare, held_out_windows
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.input_range import InputRange
from megatron_lowbit.qllm.low_rank import Batches, ParameterGroup, Windows, add_low_rank, train, trainable_norms
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.quant.input_clipping import Clip
from megatron_lowbit.runtime.distributed import all_gather_stack


@dataclass
class CorrectionResult:
    """Hold a group's losses.

    losses: the mean over the training windows, of every epoch. held_out_losses: of the held-out windows after every
    epoch, where there are any. loss_before, loss_after: before the correction and with the epoch that was best, of the
    held-out windows, or of all. kept_epoch: which one is deployed; None: none is. gptq_losses: of the same windows with
    the codes that GPTQ chooses, without the correction and with it, where both were tried. ranks: {linear's fqn: its
    rank}, where they were chosen (correction.rank=auto).
    """

    losses: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    kept_epoch: int | None = None
    gptq_losses: list[float] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)


def correct_group(
    group: BlockGroup,
    share: CalibrationShare,
    inputs: HiddenStream,
    target: HiddenStream,
    config: QuantizeConfig,
    stored_dtype: torch.dtype,
    log: Callable[..., Any],
) -> tuple[CorrectionResult, TrainedGroup | None]:
    """Add A and B to the group's rounded linears and train them (and gains and ranges, if asked), in place.

    inputs, target: see above. stored_dtype: what gains are stored in. log: called with epoch=, correction_loss= and,
    where windows are held out, held_out_loss= after every epoch. Does nothing for correction.mode=none.

    Returns the losses, and what was trained where that is kept. Raises LowBitError where the loss is no longer finite.
    """
    section = config.correction
    if section.mode == "none":
        return CorrectionResult(), None
    ranks = choose_ranks(group, share, inputs, section)
    factors = add_low_rank(group.linears(), ranks, section.mode == "branch", config.seed)
    factors += group.own_parameters()
    trained = TrainedGroup(group.linears(), factors, trainable_norms(group.modules) if section.train_norms else [])
    if not trained.parameters:  # rounding has changed no weight
        return CorrectionResult(ranks=ranks), None
    held_out = held_out_windows(len(share.all_mask), section.holdout)
    training = len(share.all_mask) - held_out
    judge = partial(judged_loss, group, share, inputs, target, section.holdout)
    before = judge()
    if config.weights.clipping == "learned":
        trained.add_clipping(group.input_ranges(), share.device)
    trained.begin()
    result = CorrectionResult(loss_before=before, ranks=ranks if section.rank == "auto" else {})
    best, kept = math.inf, trained.untrained

    def after_epoch(epoch: int, loss: float) -> None:
        nonlocal best, kept
        result.losses.append(loss)
        if held_out or epoch == section.epochs - 1:
            with trained.deployed(stored_dtype):
                judged = judge()
            if held_out:
                result.held_out_losses.append(judged)
            if judged < best:
                best, kept, result.kept_epoch = judged, trained.values(), epoch
        log(epoch=epoch, correction_loss=loss, **({"held_out_loss": judged} if held_out else {}))

    groups = [
        ParameterGroup(factors, section.learning_rate, section.weight_decay),
        ParameterGroup(trained.gains, section.learning_rate),
        ParameterGroup(trained.clipping, section.clipping_rate),
    ]
    seed = (config.seed * 1_000_003 + group.blocks[0].index) % 2**63
    batches = training_batches(group, share, inputs, target, section.batch_size, training)
    train(groups, batches, section.epochs, seed, share.dp_group, after_epoch)
    result.loss_after = best
    if best < before:
        trained.restore(kept)
        trained.deploy(stored_dtype)
        return result, trained
    result.kept_epoch = None  # never worse than without
    trained.give_up()
    return result, None


class TrainedGroup:
    """Hold what is trained of a group: the factors of its linears, the gains of norms, and ratios of ranges."""

    def __init__(self, linears: Sequence[ShardedLinear], factors: Sequence[nn.Parameter], norms: Sequence[Any]):
        self.linears, self.norms = linears, norms
        self.gains: list[nn.Parameter] = [norm.gain for norm in norms]
        self.clipping: list[nn.Parameter] = []
        self.sites: list[tuple[InputRange, nn.Parameter, Clip]] = []  # with its logits, and its ratios before
        self.parameters = [*factors, *self.gains]
        self.untrained: list[Tensor] = []

    def add_clipping(self, ranges: Sequence[InputRange], device: torch.device) -> None:
        """Train the ratios of the linears' ranges too, and those of their inputs: `ranges`."""
        self.clipping = [logits for linear in self.linears for logits in linear.add_clipping()]
        self.sites = [(site, site.train_from(device), site.clip) for site in ranges]
        self.clipping += [logits for _, logits, _ in self.sites]
        self.parameters += self.clipping

    def begin(self) -> None:
        """Keep the values as they are before the training, and compute with the parameters from here on."""
        self.untrained = self.values()
        self.unfreeze()

    def values(self) -> list[Tensor]:
        """Return copies of all parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Set all parameters to what `values` returned."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def unfreeze(self) -> None:
        """Have the linears compute their weights from the factors anew in every forward, and inputs be quantized in the
        ranges that are trained."""
        for linear in self.linears:
            factors = linear.lora_shared is not None and not linear.branch  # beside a branch the weights stay
            if factors or linear.clip_logits is not None:
                linear.unfreeze()
        for site, logits, _ in self.sites:
            site.logits = logits

    @torch.no_grad()
    def deploy(self, stored_dtype: torch.dtype) -> None:
        """Round the gains and ratios as they will be stored, and freeze the weights."""
        for norm in self.norms:
            norm.gain.copy_((norm.gain - norm.offset).to(stored_dtype).float() + norm.offset)
        for site, logits, _ in self.sites:
            site.logits = logits
            site.settle()
        for linear in self.linears:
            linear.freeze()

    @contextmanager
    def deployed(self, stored_dtype: torch.dtype) -> Iterator[None]:
        """Have the group compute as it will be deployed, inside the context."""
        values = self.values()
        self.deploy(stored_dtype)
        yield
        self.restore(values)
        self.unfreeze()

    def give_up(self) -> None:
        """Put everything back as it was, and forget the factors and the ratios."""
        self.restore(self.untrained)
        for linear in self.linears:
            linear.drop_low_rank()
        for site, _, clip in self.sites:
            site.logits, site.clip = None, clip


def training_batches(
    group: BlockGroup,
    share: CalibrationShare,
    inputs: HiddenStream,
    target: HiddenStream,
    batch_size: int,
    windows: int,
) -> Batches:
    """Return the batches of an epoch over the first `windows` of all data-parallel ranks' windows, `batch_size` each,
    the last one maybe smaller."""
    per_rank = batch_size // share.ranks
    tokens = share.all_mask[:windows].sum(1)
    hidden_size = inputs.values.shape[-1]

    def read(number: int) -> Windows:
        share.raise_if_preempted()
        values = int(tokens[number * batch_size : (number + 1) * batch_size].sum()) * hidden_size
        for window in range(number * per_rank, (number + 1) * per_rank):
            if share.number(window) < windows:
                output = group.forward(inputs.read(window, window + 1, share.device))
                wanted = target.read(window, window + 1, share.device)
                yield output, wanted, share.mask[window : window + 1].to(output.device), values

    return Batches(read, -(-windows // batch_size), per_rank)


def judged_loss(
    group: BlockGroup, share: CalibrationShare, inputs: HiddenStream, target: HiddenStream, holdout: float
) -> float:
    """Return the loss of the held-out windows, or of all where none are held out, as the group computes now."""
    held_out = held_out_windows(len(share.all_mask), holdout)
    return group_loss(group, share, inputs, target, len(share.all_mask) - held_out if held_out else 0)


@torch.no_grad()
def group_loss(
    group: BlockGroup, share: CalibrationShare, inputs: HiddenStream, target: HiddenStream, first: int
) -> float:
    """Return the group's mean squared error over windows first, first + 1, ... of all ranks, as it computes now.

    Window by window, summed in their order: the same bits on any number of ranks.
    """
    sums = torch.zeros(len(share.ids), dtype=torch.float64, device=share.device)
    for window in range(first // share.ranks, len(share.ids)):
        share.raise_if_preempted()
        if share.number(window) >= first:
            output = group.forward(inputs.read(window, window + 1, share.device))
            wanted = target.read(window, window + 1, share.device)
            mask = share.mask[window : window + 1].to(output.device)
            sums[window] = (output.float() - wanted.float())[mask].square().sum(dtype=torch.float64)
    total = all_gather_stack(sums, share.dp_group).T.flatten().sum()  # window i was on rank i % ranks
    return total.item() / (int(share.all_mask[first:].sum()) * inputs.values.shape[-1])
