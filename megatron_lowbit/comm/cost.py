"""What an all-reduce of a size takes in every mode, measured, and so which mode to take (comm.mode=auto).

    seconds(mode, b)   between two measured sizes log(seconds) is linear in log(b); below the smallest it is what the
                       smallest takes (latency), above the largest it grows as b does (rate)
    choose(b)          the fastest mode, if it is at least 5 % faster than bf16; else bf16, which rounds least

b is the bytes of the partial sums in bf16. Times vary, and a wrong choice must not cost anything: a cell is the median,
but the lower quartile of bf16's times, so another mode is taken only where it is surely faster. The table is JSON, and
holds for ranks like those that measured it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lowbit.config import CommMode, LowBitError
from megatron_lowbit.io.files import read_json, write_json

MARGIN = 0.95  # a mode is taken where it needs at most this share of bf16's time: less is noise
TUNED: tuple[CommMode, ...] = ("bf16", "one_shot", "two_shot", "exact_sum")


@dataclass(frozen=True)
class CostTable:
    """The measured seconds of all-reduces over tp_size ranks, of tensors [tokens, features].

    rows: mode -> ((bytes, seconds), ...) by ascending bytes."""

    tp_size: int
    features: int
    rows: Mapping[str, tuple[tuple[int, float], ...]]

    def __post_init__(self) -> None:
        """Raise LowBitError for a table that cannot be one."""
        unknown = [mode for mode in self.rows if mode not in TUNED]
        if unknown or "bf16" not in self.rows:
            what = f"the mode {unknown[0]!r}" if unknown else "no bf16"
            raise LowBitError(f"the cost table has {what}; it needs bf16, and knows {', '.join(TUNED)}")
        for mode, points in self.rows.items():
            sizes = [size for size, _ in points]
            if not points or sizes != sorted(set(sizes)) or any(s < 1 or not 0 < t < math.inf for s, t in points):
                raise LowBitError(f"the cost table's {mode} needs ascending sizes with times above 0: measure it again")

    def seconds(self, mode: str, nbytes: int) -> float:
        """Predict the seconds of an all-reduce of that many bytes in bf16."""
        points = self.rows[mode]
        sizes = [size for size, _ in points]
        above = bisect.bisect_left(sizes, nbytes)
        if above == 0:
            return points[0][1]
        size, time = points[above - 1]
        if above == len(points):
            return time * nbytes / size
        next_size, next_time = points[above]
        part = math.log(nbytes / size) / math.log(next_size / size)
        return time * (next_time / time) ** part

    def choose(self, nbytes: int, among: Collection[str] = TUNED) -> CommMode:
        """Return the mode to take, bf16 or one of `among`; of equals the first in TUNED."""
        modes = [mode for mode in TUNED if mode in self.rows and mode in among and mode != "bf16"]
        best = min(modes, key=lambda mode: self.seconds(mode, nbytes), default=None)
        if best is None or self.seconds(best, nbytes) > MARGIN * self.seconds("bf16", nbytes):
            return "bf16"
        return best

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read a table. Raises LowBitError for a file that is not there, or holds no table."""
        value = read_json(Path(path))
        try:
            return cls.of(value)
        except LowBitError as error:
            raise LowBitError(f"{str(path)!r}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LowBitError(
                f"{str(path)!r} is no cost table ({type(error).__name__}: {error}); "
                "write one with benchmark collectives --tune"
            ) from None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> CostTable:
        """Build it from JSON. Raises KeyError, TypeError, ValueError or LowBitError for what is no table."""
        rows = {mode: tuple((_whole(b), float(t)) for b, t in points) for mode, points in value["rows"].items()}
        return cls(_whole(value["tp_size"]), _whole(value["features"]), rows)


def _whole(number: Any) -> int:
    if type(number) is not int or not 1 <= number < 2**63:
        raise ValueError(f"{str(number)[:40]!r} is no whole number above 0")
    return number
