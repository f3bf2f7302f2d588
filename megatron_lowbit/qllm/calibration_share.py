"""The calibration windows of one data-parallel rank, in the batches that every pass over them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.io.data import Windows
from megatron_lowbit.runtime.distributed import group_rank, world_size


class CalibrationShare:
    """Hold windows r, r + R, ... of all, for rank r of the R ranks of dp_group.

    ids: int64 [windows, length]; mask: bool [windows, length], True on real tokens; all_mask: that of all ranks'
    windows, in their order. raise_if_preempted: called by all ranks before every batch and every training step.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        device: torch.device,
        dp_group: dist.ProcessGroup | None,
        raise_if_preempted: Callable[[], None],
    ):
        self.ranks, self.rank = world_size(dp_group), group_rank(dp_group)
        self.all_mask = windows.mask
        self.ids, self.mask = (tensor[self.rank :: self.ranks] for tensor in (windows.ids, windows.mask))
        self.batch_size, self.device, self.dp_group = batch_size, device, dp_group
        self.raise_if_preempted = raise_if_preempted

    @property
    def batch_sizes(self) -> set[int]:
        """Return all numbers of windows that go through a block at once: a batch, the last batch, one in training."""
        count = len(self.ids)
        return {1, min(self.batch_size, count), count % self.batch_size or self.batch_size}

    def number(self, window: int) -> int:
        """Return the number among all ranks' windows of this rank's window `window`."""
        return window * self.ranks + self.rank

    def batches(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, mask on the device) of one pass, bool [stop - start, length]."""
        for start in range(0, len(self.ids), self.batch_size):
            self.raise_if_preempted()
            stop = min(start + self.batch_size, len(self.ids))
            yield start, stop, self.mask[start:stop].to(self.device)


def held_out_windows(count: int, share: float) -> int:
    """Return how many of `count` windows, the last ones, are not trained on: `share` of them, but at least one.

    None where share is 0. One window is always left to train on, so a single one is not held out.
    """
    return min(max(1, int(count * share)), count - 1) if share else 0


def check_windows(windows: Windows, config: QuantizeConfig, ranks: int, text_config: Any) -> None:
    """Raise LowBitError for calibration text that the ranks cannot share, or that cannot tell the channels apart."""
    count, tokens = len(windows.ids), int(windows.mask.sum())
    if tokens < text_config.hidden_size:
        raise LowBitError(
            f"calibration.data gives {tokens} tokens, fewer than the model's {text_config.hidden_size} channels; "
            "raise calibration.samples or calibration.sequence_length, or give more text"
        )
    if count % ranks:
        raise LowBitError(
            f"{count} calibration windows do not divide among dp={ranks}; set calibration.samples to a multiple"
        )
    if config.weights.rotation == "learned" and config.rotation.batch_size % ranks:
        raise LowBitError(
            f"rotation.batch_size={config.rotation.batch_size} does not divide among dp={ranks}; set a multiple"
        )
    section = config.correction
    if section.mode != "none" and section.batch_size % ranks:
        raise LowBitError(
            f"correction.batch_size={section.batch_size} does not divide among dp={ranks}; set a multiple"
        )
    if section.mode != "none" and section.batch_size > count:
        raise LowBitError(f"correction.batch_size={section.batch_size} is above the {count} calibration windows")
