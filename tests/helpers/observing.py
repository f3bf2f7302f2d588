"""One batch for one observer, to the end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.observers import RangeObserver, SharedSteps


def observe(
    observer: RangeObserver, parts: Sequence[Tensor], mask: Tensor, dp_group: dist.ProcessGroup | None = None
) -> None:
    """parts: every rank's y [windows, length, features]; mask: bool [windows, length]."""
    shared = SharedSteps(dp_group)
    shared.observe("the site puts out", [observer], [parts], mask)
    shared.finish()
