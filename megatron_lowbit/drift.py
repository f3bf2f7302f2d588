"""Calibrated ranges that no longer hold: a site falls back to bf16 where too many values lie beyond them.

    share = max over ranks and hops ( values beyond their calibrated range / values encoded )       since the last check

Before every DRIFT_INTERVAL-th low-bit call of a site its ranks agree on the largest share, in one all-reduce of eight
bytes. Where it is above the threshold all of them send bf16 from that call on, so they keep on ending with the same
bits, and tensor-parallel rank 0 logs it once. Rank-1 scales follow a token; what counts there are values beyond 16
calibrated standard deviations. Formats without codes check nothing. Neither is anything checked while a CUDA graph is
captured; a replayed graph counts, but never falls back.

Measured with the embedded model, static Int4, on text like that of the calibration: a share of 1.1 % over all sites,
and of up to 4.9 % at one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_lowbit.codec import WireFormat
from megatron_lowbit.exact_sum import ExactSum

logger = logging.getLogger("megatron_lowbit")

DRIFT_INTERVAL = 64  # low-bit calls of a site between two checks


class DriftGuard:
    """Of one site; threshold: a share above it is too much, None: never check."""

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self.site = ""  # its name in the model, for the log
        self.tripped = False
        self._calls = 0
        self._values: dict[WireFormat | ExactSum, int] = {}  # encoded by one rank since the last check
        self._before: dict[WireFormat | ExactSum, Tensor] = {}  # counters at the last check

    def trips(
        self, encoded: Mapping[WireFormat | ExactSum, int], agree: Callable[[Tensor], Tensor], rank: int = 0
    ) -> bool:
        """Whether this low-bit call, and all that follow, have to be bf16.

        encoded: {hop: values that a rank is about to encode, the same number on all ranks}; agree: the largest of all
        ranks' float64 [1].
        """
        watched = {part: values for part, values in encoded.items() if part.can_saturate}
        if self.threshold is None or self.tripped or not watched:
            return self.tripped
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._calls and self._calls % DRIFT_INTERVAL == 0 and not capturing:
            share = agree(self._share()).item()
            self.tripped = share > self.threshold
            if self.tripped:
                if rank == 0:
                    logger.warning(
                        "%s: %.1f %% of the values lie beyond their calibrated range, more than "
                        "comm.drift_threshold=%g: bf16 from here on; calibrate on text like this",
                        self.site or "a collective",
                        100 * share,
                        self.threshold,
                    )
                return True
        self._calls += 1
        for part, values in watched.items():
            self._before.setdefault(part, part.saturated.clone())
            self._values[part] = self._values.get(part, 0) + values
        return False

    def _share(self) -> Tensor:
        """float64 [1]: the largest share of this process's ranks; starts the next window."""
        shares = [
            (part.saturated - self._before[part].to(part.saturated.device)).double().amax() / max(values, 1)
            for part, values in self._values.items()
        ]
        self._values, self._before = {}, {}
        return torch.stack(shares).amax().reshape(1)
