"""CalibrationStats and CommPlan: what calibration has measured, and what the ranks send at every site.

<folder>/calibration.{safetensors,json}     per-feature ranges of every row-parallel site, per tensor-parallel size
<folder>/comm_plan_tp<N>.{safetensors,json} what N ranks send at every site
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from megatron_lowbit.comm.clipping import WIDTHS
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import (
    complete,
    discard,
    load_pair,
    save_pair,
)
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.io.manifest import Manifest, PlanManifest, checked
from megatron_lowbit.io.tensors import check_tensor, one_value, refuse_unused, short_repr


@dataclass(frozen=True)
class FeatureRange:
    """Statistics of the partial sums at one site, per rank and feature: float32 [tp_size, features] each.

    min_vals, max_vals: the moving averages of the ranges; mean, std: over all tokens, for per-token scales; crest:
    float32 [tp_size], the root mean square of the tokens' sizes, in standard deviations; clipped: float32 [tp_size,
    widths, 2, features], low and high of least error for each of clipping.WIDTHS, if recorded.
    """

    min_vals: Tensor
    max_vals: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    crest: Tensor | None = None
    clipped: Tensor | None = None

    __repr__ = short_repr

    def validate(self, name: str, tp_size: int) -> None:
        """Raise ValueError, naming the tensor, where these are no ranges of tp_size ranks."""
        check_tensor(f"{name}.min_vals", self.min_vals, torch.float32, (tp_size, None), finite=True)
        features = self.min_vals.shape[1]
        shapes: dict[str, tuple[int | None, ...]] = {
            "crest": (tp_size,),
            "clipped": (tp_size, len(WIDTHS), 2, features),
        }
        for leaf, tensor in self.tensors().items():
            shape = shapes.get(leaf, (tp_size, features))
            check_tensor(f"{name}.{leaf}", tensor, torch.float32, shape, finite=True)

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class CalibrationStats:
    """The ranges of every feature's partial sums, measured by `megatron-lowbit calibrate`: what plans are made from.

    A site is a row-parallel linear, by its name in the Hugging Face model. A FeatureRange has min_vals and max_vals,
    float32 [tp_size, features], one row for each rank's partial sums, and further statistics of the same kind.

    Args:
        ranges: {tp_size: {site: FeatureRange}}; tp_size 1 holds the ranges of the full sums.
        fingerprint: shapes and checksums of the model that was measured.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> stats = lowbit.CalibrationStats.load("artifact")
        >>> sorted(stats.ranges)
        [1, 2]
        >>> stats.ranges[2]["model.layers.0.mlp.down_proj"].min_vals.shape
        torch.Size([2, 64])
    """

    ranges: dict[int, dict[str, FeatureRange]]
    fingerprint: Fingerprint

    __repr__ = short_repr

    def save(self, folder: str | Path) -> None:
        """Write calibration.safetensors and calibration.json.

        Args:
            folder: an existing folder. Files of the same names are replaced.

        Raises:
            LowBitError: it cannot be written.
        """
        save_pair(Path(folder) / "calibration", range_tensors(self.ranges), {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStats:
        """Read calibration.safetensors and calibration.json.

        Args:
            folder: where `save`, or `megatron-lowbit calibrate`, has written them.

        Returns:
            The CalibrationStats.

        Raises:
            LowBitError: a file is missing or damaged, or holds no statistics.
        """
        stem = Path(folder) / "calibration"
        tensors, meta = load_pair(stem, "fingerprint")
        with complete(stem.with_suffix(".json")):
            checked(Manifest, meta)
        with complete(stem.with_suffix(".safetensors")):
            return cls(ranges_of(tensors), meta["fingerprint"])


Ranges = dict[int, dict[str, FeatureRange]]


def range_tensors(ranges: Ranges) -> dict[str, Tensor]:
    """Return {tp<size>.<site>.<field>: tensor}."""
    return {
        f"tp{size}.{site}.{name}": tensor
        for size, sites in ranges.items()
        for site, r in sites.items()
        for name, tensor in r.tensors().items()
    }


def ranges_of(tensors: Mapping[str, Tensor]) -> Ranges:
    """Build the ranges from what range_tensors returns. Raises ValueError for tensors that are no such ranges."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, leaf = key.rpartition(".")
        found.setdefault(stem, {})[leaf] = tensor
    ranges: Ranges = {}
    for stem, leaves in found.items():
        match = re.fullmatch(r"tp([0-9]{1,5})\.(.+)", stem)
        unknown = leaves.keys() - {field.name for field in fields(FeatureRange)}
        if match is None or unknown or not {"min_vals", "max_vals"} <= leaves.keys():
            raise ValueError(
                f"{stem}.{min(unknown or leaves)} is no tensor of a site's ranges, or one of them is missing"
            )
        size, site = int(match.group(1)), match.group(2)
        ranges.setdefault(size, {})[site] = FeatureRange(**leaves)
        ranges[size][site].validate(stem, size)
    return ranges


@dataclass(frozen=True)
class SitePlan:
    """The plan of one site: how its ranks encode what they send.

    first: of every rank's partial sums; second: of their sum, one sender (two_shot's second hop; None where the ranges
    of the sum are not known). center float32 [tp_size, E], half_range float32 [E]: for exact_sum, the middle of each
    rank's range, and half of the widest rank's, which all ranks share; carrier_bits: of its integers, 8 or 16.
    """

    first: Codec
    second: Codec | None
    center: Tensor
    half_range: Tensor
    carrier_bits: int = 8

    __repr__ = short_repr

    def validate(self, name: str, tp_size: int) -> None:
        """Raise ValueError, naming the tensor, where this is no plan of tp_size ranks."""
        self.first.validate(f"{name}.first", tp_size)
        features = len(self.first.bits)
        if self.second is not None:
            self.second.validate(f"{name}.second", 1, features)
        check_tensor(f"{name}.center", self.center, torch.float32, (tp_size, features), finite=True)
        check_tensor(f"{name}.half_range", self.half_range, torch.float32, (features,), finite=True)
        if self.carrier_bits not in (8, 16):
            raise ValueError(f"{name}.carrier_bits is {self.carrier_bits}, not 8 or 16")

    @property
    def tp_size(self) -> int:
        return self.first.senders

    def tensors(self) -> dict[str, Tensor]:
        """Return what an artifact stores."""
        hops = {"first": self.first, "second": self.second}
        stored = {f"{hop}.{name}": t for hop, codec in hops.items() if codec for name, t in codec.tensors().items()}
        carrier = torch.tensor([self.carrier_bits])
        return {**stored, "center": self.center, "half_range": self.half_range, "carrier_bits": carrier}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SitePlan:
        """Build it from what `tensors` returns. Raises KeyError where one is missing."""
        second = _below(tensors, "second.")
        first, second_codec = Codec.of(_below(tensors, "first.")), Codec.of(second) if second else None
        return cls(first, second_codec, tensors["center"], tensors["half_range"], one_value("carrier_bits", tensors))


def label_of(description: str) -> str:
    """Return a plan's description as results print it: there comm.scale=per_token still has its first name, rank-1."""
    return description.replace("rank-1 ", "per-token ")


@dataclass(frozen=True)
class CommPlan:
    """The plan of one tensor-parallel size: in how many bits, and by which scales, each site sends each feature.

    A site is a row-parallel linear, by its name in the Hugging Face model. Its SitePlan has the codec of every rank's
    partial sums, `first`, and that of their sum, `second`. A Codec has `bits`, uint8 [features], where 16 stands for
    bf16, and `scale` and `zero_point`, float32 [tp_size, features].

    Args:
        sites: {site: SitePlan}.
        tp_size: the number of ranks.
        fingerprint: shapes and checksums of the model that was calibrated.
        description: the scheme's name in results.
        gathers: {first linear that reads it: Codec of one sender} of the inputs of column-parallel linears, for the
            all-gather of sequence parallelism; empty where that stays in full precision.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> plan = lowbit.CommPlan.load("artifact", tp_size=2)
        >>> site = plan.sites["model.layers.0.mlp.down_proj"]
        >>> site.first.scale.shape, site.first.bits.dtype
        (torch.Size([2, 64]), torch.uint8)
    """

    sites: dict[str, SitePlan]
    tp_size: int
    fingerprint: Fingerprint
    description: str = "hybrid"
    gathers: dict[str, Codec] = field(default_factory=dict)

    __repr__ = short_repr

    @property
    def label(self) -> str:
        """Return what results call the collective.

        Returns:
            The description; artifacts keep `rank-1` for what is called per-token today.
        """
        return label_of(self.description)

    def save(self, folder: str | Path) -> None:
        """Write comm_plan_tp<N>.safetensors and comm_plan_tp<N>.json.

        Args:
            folder: an existing folder. Files of the same names are replaced.

        Raises:
            LowBitError: it cannot be written.
        """
        meta = {
            "fingerprint": self.fingerprint,
            "tp_size": self.tp_size,
            "description": self.description,
            "sites": list(self.sites),
            "gathers": list(self.gathers),
        }
        save_pair(Path(folder) / f"comm_plan_tp{self.tp_size}", self.tensors(), meta)

    def tensors(self) -> dict[str, Tensor]:
        """Return what an artifact stores.

        Returns:
            {<site>.<field>: tensor}.
        """
        both: dict[str, SitePlan | Codec] = {**self.sites, **self.gathers}
        return {f"{site}.{name}": t for site, plan in both.items() for name, t in plan.tensors().items()}

    def validate(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: they do not; the message names the tensor or site.
        """
        for name, site in self.sites.items():
            site.validate(name, self.tp_size)
        for name, codec in self.gathers.items():
            codec.validate(name, 1)
        strange = [name for name in (*self.sites, *self.gathers) if name not in self.fingerprint["weights"]]
        if strange or self.sites.keys() & self.gathers.keys():
            raise ValueError(f"the fingerprint and the sites do not agree on {(strange or list(self.gathers))[0]}")

    @classmethod
    def load(cls, folder: str | Path, tp_size: int) -> CommPlan:
        """Read comm_plan_tp<N>.safetensors and comm_plan_tp<N>.json.

        Args:
            folder: where `save`, or `megatron-lowbit calibrate`, has written them.
            tp_size: the number of ranks.

        Returns:
            The CommPlan.

        Raises:
            LowBitError: the folder has no plan for this size (the message names those it has) or a damaged one.
        """
        stem = Path(folder) / f"comm_plan_tp{tp_size}"
        if not stem.with_suffix(".json").exists():
            found = plan_sizes(Path(folder))
            have = f"it has plans for tp_size {found}" if found else "it has none"
            raise LowBitError(
                f"{str(folder)!r} has no communication plan for tp_size {tp_size} ({have}); "
                f"run calibrate with comm.tp_sizes=[{tp_size}]"
            )
        tensors, meta = load_pair(stem, "fingerprint", "tp_size", "description", "sites", "gathers")
        if meta["tp_size"] != tp_size:
            raise LowBitError(
                f"{str(stem)!r} was calibrated for tp_size {meta['tp_size']}, not {tp_size}; calibrate again"
            )
        with complete(stem.with_suffix(".json")):
            checked(PlanManifest, meta)
        with complete(stem.with_suffix(".safetensors")):
            sites = {site: SitePlan.of(_below(tensors, f"{site}.")) for site in meta["sites"]}
            gathers = {name: Codec.of(_below(tensors, f"{name}.")) for name in meta["gathers"]}
            plan = cls(sites, tp_size, meta["fingerprint"], meta["description"], gathers)
            refuse_unused(tensors.keys() - plan.tensors().keys())
            plan.validate()
        return plan


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return {name without the prefix: tensor} of the names that have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def remove_plans(folder: str | Path) -> None:
    """Delete the folder's communication plans: they belong to a checkpoint that is about to be replaced."""
    for suffix in (".json", ".safetensors"):  # a plan is gone when its JSON is
        for file in Path(folder).glob(f"comm_plan_tp*{suffix}"):
            discard(file)


def plan_sizes(folder: Path) -> list[int]:
    """Return the tensor-parallel sizes that the folder has plans for."""
    found = (re.fullmatch(r"comm_plan_tp(\d+)", path.stem) for path in folder.glob("comm_plan_tp*.json"))
    return sorted(int(match.group(1)) for match in found if match)
