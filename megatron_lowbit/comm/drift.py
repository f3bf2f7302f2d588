"""Calibrated ranges that do not hold: a site falls back to bf16 where too many values lie beyond them.

    share = values beyond their calibrated range / values encoded       of a rank and a hop, since the last check
    too many, where share > threshold + 1 / (2 sqrt(tokens))            on any rank, in any hop

The last term is the largest standard error that a share of so many tokens can have: of a few tokens, 32 % have been
seen beyond where the plan fits (half of the two were the first of a text, which has values of its own).

Checked are the low-bit calls 1, 2, 4, 8, ... DRIFT_INTERVAL of a site, then every DRIFT_INTERVAL-th: a plan that does
not fit is met at its first call, and later on a check costs little. Such a call is encoded and counted, and its ranks
agree on the largest share that is too much, in one all-reduce of eight bytes, before anything is made of its codes.
Where one is too much, all of them send this call and those that follow in bf16, so they keep on ending with
the same bits, and tensor-parallel rank 0 logs it once. Per-token scales follow a token; what counts there are values
beyond 16 calibrated standard deviations. Formats without codes check nothing. Neither is anything checked while a CUDA
graph is captured; a replayed graph counts, but never falls back.

Without a threshold, as for `apply_to_*` without a CommConfig, whose results shall not depend on earlier calls, nothing
falls back and ranks agree on nothing: at the same calls a rank looks at its own share, and logs a warning once.

Measured with the embedded model, static Int4, on text like that of the calibration: a share of 1.1 % over all sites,
and of up to 4.9 % at one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.comm.codec import WireFormat
from megatron_lowbit.comm.collectives.exact_sum import ExactFormat
from megatron_lowbit.config import DRIFT_THRESHOLD

logger = logging.getLogger("megatron_lowbit")

DRIFT_INTERVAL = 64  # low-bit calls of a site between two checks, once there have been as many


@dataclass(frozen=True)
class Saturation:
    """Counts of the values that one process has encoded at a site.

    values: in low-bit formats; saturated: those of them that lay beyond their calibrated range, or were NaN; nonfinite:
    tokens that held NaN or Inf, and so were sent as NaN; bf16: whether the site has fallen back.
    """

    values: int
    saturated: int
    nonfinite: int
    bf16: bool


class DriftGuard:
    """Watch one site. threshold: a share above it is too much, None: never fall back, but warn. parts: of its hops."""

    def __init__(self, threshold: float | None, parts: Sequence[WireFormat | ExactFormat]):
        self.threshold, self.parts = threshold, list(parts)
        self.site = ""  # its name in the model, for the log
        self.tripped = False
        self._calls = 0
        self._looks = self._warned = False
        self._before: list[Tensor] = [torch.zeros_like(part.tally) for part in self.parts]  # at the last check

    def due(self, x: Tensor) -> bool:
        """Return whether this low-bit call, of values x, is one to check; the same on all ranks. Ask once per call."""
        if not any(part.can_saturate for part in self.parts) or self._warned:
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self._calls += 1
        doubled = self._calls < DRIFT_INTERVAL and self._calls & (self._calls - 1) == 0
        scheduled = doubled or self._calls % DRIFT_INTERVAL == 0
        self._looks = scheduled and self.threshold is None
        return scheduled and self.threshold is not None

    def look(self, x: Tensor) -> None:
        """Warn once, where there is no threshold and a call to check, whose sums are x, shows that ranges do not
        hold."""
        if not self._looks:
            return
        self._looks = False
        share = self._too_much(x.device, x.shape[-1], DRIFT_THRESHOLD).item()
        if share > 0:
            self._warned = True
            logger.warning(
                "%s: %.1f %% of the values lie beyond their calibrated range, so results suffer; calibrate on text "
                "like this, or have such sites fall back to bf16 with comm_mode=CommConfig(drift_threshold=%g)",
                self.site or "a collective",
                100 * share,
                DRIFT_THRESHOLD,
            )

    def trips(self, agree: Callable[[Tensor], Tensor], x: Tensor, rank: int = 0) -> bool:
        """Decide whether this call, whose values x have been encoded, and all that follow have to be bf16.

        agree: the largest of all ranks' float64 [1].
        """
        assert self.threshold is not None
        share = agree(self._too_much(x.device, x.shape[-1], self.threshold)).item()
        self.tripped = share > 0
        if self.tripped and rank == 0:
            logger.warning(
                "%s: %.1f %% of the values lie beyond their calibrated range, more than "
                "comm.drift_threshold=%g: bf16 from here on; calibrate on text like this",
                self.site or "a collective",
                100 * share,
                self.threshold,
            )
        return self.tripped

    def saturation(self) -> Saturation:
        """Return the counts so far. Waits for the device."""
        values, saturated, nonfinite = (sum(counts) for counts in zip([0] * 3, *map(_totals, self.parts), strict=True))
        return Saturation(values, saturated, nonfinite, self.tripped)

    def _too_much(self, device: torch.device, features: int, threshold: float) -> Tensor:
        """Return float64 [1]: the largest share of this process's ranks that is too much, or 0; starts the next
        window."""
        largest = torch.zeros(1, dtype=torch.float64, device=device)
        for number, part in enumerate(self.parts):
            since = (part.tally - self._before[number].to(part.tally.device)).to(device)
            values, saturated = since[:, 0].clamp_min(1).double(), since[:, 1]
            share, doubt = saturated / values, 0.5 * (features / values).sqrt()
            largest = torch.maximum(largest, torch.where(share > threshold + doubt, share, 0.0).amax())
            self._before[number] = part.tally.clone()
        return largest


def _totals(part: WireFormat | ExactFormat) -> list[int]:
    return part.tally.sum(0).tolist()
