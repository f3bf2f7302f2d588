"""Files: CalibrationStats, CommPlan and LowBitCheckpoint, each as safetensors + JSON. The only module that opens any.

    <folder>/calibration.{safetensors,json}     per-feature ranges of every row-parallel site, per tensor-parallel size
    <folder>/comm_plan_tp<N>.{safetensors,json} what N ranks send at every site
    <folder>/lowbit*.safetensors, lowbit.json   packed weights under Hugging Face names, whole (unsharded) tensors
    <folder>/config.json, tokenizer...          and generation_config.json, where the model has one, so that the folder
                                                loads without the original model

Each file is written under a temporary name and renamed, the JSON last: an artifact exists when its JSON does. The JSON
holds the checksums of the tensor files and of itself, lowbit.json also those of config and tokenizer, and the model's
fingerprint, so an artifact that was changed, or of another model, is refused. What a file holds is checked when it is
read, tensor by tensor, also where all checksums agree: shapes, dtypes and indices that do not go together are one
LowBitError that names the tensor and the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.comm.clipping import WIDTHS
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import (
    FORMAT,
    complete,
    discard,
    load_pair,
    read_meta,
    read_tensors,
    save_pair,
    sha256,
    write_sealed,
    write_tensors,
)
from megatron_lowbit.io.manifest import CheckpointManifest, Manifest, PlanManifest, checked
from megatron_lowbit.io.tensors import check_tensor, one_value, short_repr
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight, Scheme
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "sentencepiece*"),
)
_FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

Fingerprint = dict[str, Any]


def model_fingerprint(
    config: Any, weights: Mapping[str, Tensor], tp_group: dist.ProcessGroup | None = None
) -> Fingerprint:
    """Shape fields of a Hugging Face config and a checksum of each of the blocks' linears.

    weights: {fqn of a tensor-parallel linear: its weight, whole or this rank's shard}. A checksum sums the bit
    patterns of a weight in bf16, so it does not depend on the number of shards, nor on the dtype (a float32
    checkpoint loaded as float16 is the exception: rounding twice is another rounding). Values below float16's
    smallest normal count as 0.
    """
    return fingerprint_of({name: bit_sum(weight.detach()) for name, weight in weights.items()}, config, tp_group)


def fingerprint_of(sums: Mapping[str, Tensor], config: Any, tp_group: dist.ProcessGroup | None = None) -> Fingerprint:
    """model_fingerprint from the bit sums {fqn: int64 scalar} of this rank's weights."""
    if not sums:
        raise LowBitError("the model has no tensor-parallel linears that megatron_lowbit knows")
    names = sorted(sums)
    total = torch.stack([sums[name] for name in names])
    if tp_group is not None:
        dist.all_reduce(total, group=tp_group)
    return {**fingerprint_fields(config), "weights": dict(zip(names, total.tolist(), strict=True))}


def fingerprint_fields(config: Any) -> dict[str, Any]:
    """The shape fields of a Hugging Face config."""
    return {name: value for name in _FINGERPRINT_FIELDS if (value := getattr(config, name, None)) is not None}


def bit_sum(weight: Tensor) -> Tensor:
    """Sum of the bit patterns in bf16, an int64 scalar; the sums of a weight's shards add up to its own."""
    return row_bit_sums(weight).sum()


def row_bit_sums(weight: Tensor) -> Tensor:
    """bit_sum of every row of a weight [out, in]: int64 [out]."""
    rounded = weight.to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < 2.0**-14, 0, rounded)
    return rounded.contiguous().view(torch.int16).sum(-1, dtype=torch.int64)


def check_fingerprint(what: str, artifact: Fingerprint, model: Fingerprint) -> None:
    """Raise LowBitError naming what differs. Of the linears, those count that both know: an engine may hide some."""
    differing = [
        f"{key} {artifact.get(key)!r} there, {model.get(key)!r} here"
        for key in {**artifact, **model}
        if key != "weights" and artifact.get(key) != model.get(key)
    ]
    there, here = artifact["weights"], model["weights"]
    both = [name for name in here if name in there]
    changed = [name for name in both if here[name] != there[name]]
    if changed or not both:
        differing.append(
            f"other values in {len(changed)} of {len(both)} weights, the first {changed[0] if changed else '-'}"
        )
    if differing:
        raise LowBitError(f"{what} belongs to another model ({'; '.join(differing)}); calibrate and quantize this one")


@dataclass(frozen=True)
class FeatureRange:
    """What calibration knows of the partial sums at one site, per rank and feature: float32 [tp_size, features] each.

    min_vals, max_vals: the moving averages of the ranges; mean, std: over all tokens, for rank-1 scales; crest: float32
    [tp_size], the root mean square of the tokens' sizes, in standard deviations; clipped: float32 [tp_size, widths, 2,
    features], low and high of least error for each of clipping.WIDTHS, if recorded.
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
    """{tp_size: {site: FeatureRange}}; tp_size 1 holds the ranges of the full sum."""

    ranges: dict[int, dict[str, FeatureRange]]
    fingerprint: Fingerprint

    __repr__ = short_repr

    def save(self, folder: str | Path) -> None:
        save_pair(Path(folder) / "calibration", range_tensors(self.ranges), {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStats:
        """Raises LowBitError for files that are missing, damaged, or hold no statistics."""
        stem = Path(folder) / "calibration"
        tensors, meta = load_pair(stem, "fingerprint")
        with complete(stem.with_suffix(".json")):
            checked(Manifest, meta)
        with complete(stem.with_suffix(".safetensors")):
            return cls(ranges_of(tensors), meta["fingerprint"])


Ranges = dict[int, dict[str, FeatureRange]]


def range_tensors(ranges: Ranges) -> dict[str, Tensor]:
    """{tp<size>.<site>.<field>: tensor}."""
    return {
        f"tp{size}.{site}.{name}": tensor
        for size, sites in ranges.items()
        for site, r in sites.items()
        for name, tensor in r.tensors().items()
    }


def ranges_of(tensors: Mapping[str, Tensor]) -> Ranges:
    """The inverse of range_tensors. Raises ValueError for tensors that are no such ranges."""
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
    """What the ranks send at one site.

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
        """What an artifact stores."""
        hops = {"first": self.first, "second": self.second}
        stored = {f"{hop}.{name}": t for hop, codec in hops.items() if codec for name, t in codec.tensors().items()}
        carrier = torch.tensor([self.carrier_bits])
        return {**stored, "center": self.center, "half_range": self.half_range, "carrier_bits": carrier}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SitePlan:
        """The inverse of `tensors`. Raises KeyError where one is missing."""
        second = _below(tensors, "second.")
        first, again = Codec.of(_below(tensors, "first.")), Codec.of(second) if second else None
        return cls(first, again, tensors["center"], tensors["half_range"], one_value("carrier_bits", tensors))


@dataclass(frozen=True)
class CommPlan:
    """{site: SitePlan} of one tensor-parallel size.

    gathers: of the inputs of column-parallel linears, {first linear that reads it: Codec of one sender}, for the
    all-gather of sequence parallelism; empty where it stays in full precision.
    """

    sites: dict[str, SitePlan]
    tp_size: int
    fingerprint: Fingerprint
    description: str = "hybrid"
    gathers: dict[str, Codec] = field(default_factory=dict)

    __repr__ = short_repr

    def save(self, folder: str | Path) -> None:
        meta = {
            "fingerprint": self.fingerprint,
            "tp_size": self.tp_size,
            "description": self.description,
            "sites": list(self.sites),
            "gathers": list(self.gathers),
        }
        save_pair(Path(folder) / f"comm_plan_tp{self.tp_size}", self.tensors(), meta)

    def tensors(self) -> dict[str, Tensor]:
        """What an artifact stores."""
        both: dict[str, SitePlan | Codec] = {**self.sites, **self.gathers}
        return {f"{site}.{name}": t for site, plan in both.items() for name, t in plan.tensors().items()}

    def validate(self) -> None:
        """Raise ValueError, naming the tensor or site, where the parts do not fit together."""
        for name, site in self.sites.items():
            site.validate(name, self.tp_size)
        for name, codec in self.gathers.items():
            codec.validate(name, 1)
        strange = [name for name in (*self.sites, *self.gathers) if name not in self.fingerprint["weights"]]
        if strange or self.sites.keys() & self.gathers.keys():
            raise ValueError(f"the fingerprint and the sites do not agree on {(strange or list(self.gathers))[0]}")

    @classmethod
    def load(cls, folder: str | Path, tp_size: int) -> CommPlan:
        """Raises LowBitError where the folder has no plan for this size (naming those it has) or a damaged one."""
        stem = Path(folder) / f"comm_plan_tp{tp_size}"
        if not stem.with_suffix(".json").exists():
            found = _plan_sizes(Path(folder))
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
            _refuse_unused(tensors.keys() - plan.tensors().keys())
            plan.validate()
        return plan


@dataclass
class CheckpointPart:
    """What some blocks contribute to a LowBitCheckpoint, as one safetensors file.

    linears and other tensors by Hugging Face name; reassembly by the module that carries it out (a norm, whose
    output it is, or a linear, whose input); low_rank by linear.
    """

    linears: dict[str, QuantizedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reassembly: dict[str, ReassemblyPlan] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)

    __repr__ = short_repr

    def save(self, path: Path) -> PartMeta:
        """Write the file; returns what lowbit.json has to say about it."""
        tensors = dict(self.tensors)
        for owner, names in ((self.linears, _WEIGHT), (self.reassembly, _PLAN), (self.low_rank, _LOW_RANK)):
            for name, value in owner.items():
                tensors |= {f"{name}.{leaf}": getattr(value, leaf) for leaf in names}
        return {
            "files": {path.name: write_tensors(path, tensors)},
            "in_features": {name: weight.in_features for name, weight in self.linears.items()},
            "reassembly": {name: [plan.in_features, plan.width] for name, plan in self.reassembly.items()},
            "low_rank": sorted(self.low_rank),
        }


PartMeta = dict[str, Any]
_WEIGHT = ("packed_weight", "scale", "zero_point")
_PLAN = ("src_idx", "dst_idx", "coefficient")
_LOW_RANK = ("lora_a", "lora_b")


def merge_parts(parts: Sequence[PartMeta]) -> PartMeta:
    """The description of several parts as one."""
    merged: PartMeta = {"files": {}, "in_features": {}, "reassembly": {}, "low_rank": []}
    for part in parts:
        for key in ("files", "in_features", "reassembly"):
            merged[key].update(part[key])
        merged["low_rank"] += part["low_rank"]
    return merged


@dataclass(frozen=True)
class LowBitCheckpoint:
    """Quantized linears and all other tensors under Hugging Face names, independent of framework and tp_size.

    reassembly, low_rank: as in CheckpointPart. attention_bits: of Q, K and V; 16 leaves them as they are.
    """

    linears: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor]
    scheme: Scheme
    scheme_name: str
    shard_groups: int
    fingerprint: Fingerprint
    reassembly: dict[str, ReassemblyPlan] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    attention_bits: int = 16

    __repr__ = short_repr

    def save(self, folder: str | Path) -> None:
        part = CheckpointPart(self.linears, self.tensors, self.reassembly, self.low_rank)
        meta = part.save(Path(folder) / "lowbit.safetensors")
        write_checkpoint(folder, meta, self.scheme_name, self.shard_groups, self.attention_bits, self.fingerprint)

    @classmethod
    def load(cls, folder: str | Path) -> LowBitCheckpoint:
        """The tensors are mapped from their files: pages come into memory as they are used."""
        stem = Path(folder) / "lowbit"
        keys = (
            "files",
            "fingerprint",
            "scheme",
            "shard_groups",
            "attention_bits",
            "in_features",
            "reassembly",
            "low_rank",
        )
        meta = read_meta(stem, *keys)
        with complete(stem.with_suffix(".json")):
            checked(CheckpointManifest, meta)
        _check_beside(Path(folder), meta.get("beside", {}))
        tensors: dict[str, Tensor] = {}
        where: dict[str, Path] = {}
        for file, checksum in meta["files"].items():
            path = Path(folder) / file
            found = read_tensors(path, checksum)
            with complete(path):
                _refuse_unused(found.keys() & tensors.keys())
            tensors |= found
            where |= dict.fromkeys(found, path)
        scheme = Scheme.parse(meta["scheme"])

        def take(name: str, leaves: tuple[str, ...]) -> dict[str, Tensor]:
            return {leaf: tensors.pop(f"{name}.{leaf}") for leaf in leaves}

        linears: dict[str, QuantizedWeight] = {}
        plans: dict[str, ReassemblyPlan] = {}
        low_rank: dict[str, LowRank] = {}
        for name, in_features in meta["in_features"].items():
            with complete(where.get(f"{name}.packed_weight", stem)):
                weight = QuantizedWeight(**take(name, _WEIGHT), num_bits=scheme.weight_bits, in_features=in_features)
                weight.validate(name)
                linears[name] = weight
        for name, (in_features, width) in meta["reassembly"].items():
            with complete(where.get(f"{name}.src_idx", stem)):
                plans[name] = ReassemblyPlan(**take(name, _PLAN), in_features=in_features, width=width)
                plans[name].validate(name)
        for name in meta["low_rank"]:
            with complete(where.get(f"{name}.lora_a", stem)):
                low_rank[name] = LowRank(**take(name, _LOW_RANK))
                low_rank[name].validate(name, linears[name].in_features, len(linears[name].packed_weight))
        bits, fingerprint = meta["attention_bits"], meta["fingerprint"]
        names = (scheme, meta["scheme"], meta["shard_groups"], fingerprint)
        checkpoint = cls(linears, tensors, *names, plans, low_rank, bits)
        with complete(stem.with_suffix(".json")):
            checkpoint.validate()
        return checkpoint

    def validate(self) -> None:
        """Raise ValueError where the parts, each of which is valid by itself, do not fit together."""
        strange = [name for name in self.linears if name not in self.fingerprint["weights"]]
        if strange:
            raise ValueError(f"its fingerprint lacks the linear {strange[0]}")
        if self.attention_bits not in (16, self.scheme.act_bits):
            raise ValueError(f"attention_bits is {self.attention_bits}, not 16 or those of {self.scheme_name}")
        for name, plan in self.reassembly.items():
            readers = [self.linears[name]] if name in self.linears else self.linears.values()
            if not any(weight.in_features == plan.width for weight in readers):
                raise ValueError(f"{name} is reassembled to {plan.width} channels, which no linear reads")
        leaves = {*_WEIGHT, *_PLAN, *_LOW_RANK} - {"scale"}  # a model may have a tensor of that name
        _refuse_unused(name for name in self.tensors if name.rpartition(".")[2] in leaves)

    def nbytes(self) -> int:
        """Bytes of all tensors, packed."""
        return self.linear_bytes() + sum(t.nbytes for t in self.tensors.values())

    def linear_bytes(self) -> int:
        """Bytes of the quantized linears: codes, scales, zero points, plans and branches."""
        owners = ((self.linears, _WEIGHT), (self.reassembly, _PLAN), (self.low_rank, _LOW_RANK))
        return sum(getattr(v, leaf).nbytes for owner, names in owners for v in owner.values() for leaf in names)

    def ideal_bytes(self) -> float:
        """bits * parameters / 8 of the quantized linears: what no format can be below."""
        bits = self.scheme.weight_bits
        return sum(w.packed_weight.shape[0] * w.in_features * bits / 8 for w in self.linears.values())


def write_checkpoint(
    folder: str | Path, part: PartMeta, scheme: str, shard_groups: int, attention_bits: int, fingerprint: Fingerprint
) -> None:
    """Write lowbit.json over the files of `part` and the model's config and tokenizer, which are there already, and
    remove the files of the checkpoint that was there before."""
    folder = Path(folder)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "scheme": scheme,
        "shard_groups": shard_groups,
        "attention_bits": attention_bits,
        **part,
        "beside": _beside(folder),
    }
    write_sealed(folder / "lowbit.json", meta)
    for file in folder.glob("lowbit*.safetensors"):
        if file.name not in part["files"]:
            discard(file)


def _beside(folder: Path) -> dict[str, str]:
    """{name: checksum} of the folder's config, generation config and tokenizer."""
    patterns = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return {file.name: sha256(file) for file in files}


def _check_beside(folder: Path, checksums: Mapping[str, str]) -> None:
    for name, checksum in checksums.items():
        file = folder / name
        try:
            same = sha256(file) == checksum
        except OSError:
            same = False
        if not same:
            raise LowBitError(
                f"{str(file)!r} is missing or not what was written with the artifact (its checksum differs); put the "
                "file back, or write the artifact again"
            )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """{name without the prefix: tensor} of the names that have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _refuse_unused(names: Iterable[str]) -> None:
    """Raise ValueError for a tensor that nothing reads: what its JSON says of it was lost."""
    for name in sorted(names):
        raise ValueError(f"the tensor {name} belongs to nothing, or is there twice")


@dataclass(frozen=True)
class Artifact:
    """What an adapter applies: a checkpoint (None: full-precision weights), plans by tp_size (empty: bf16)."""

    checkpoint: LowBitCheckpoint | None = None
    plans: dict[int, CommPlan] = field(default_factory=dict)
    folder: Path | None = None

    __repr__ = short_repr

    @classmethod
    def load(cls, folder: str | Path) -> Artifact:
        """Whatever of the two the folder holds. Raises LowBitError if it holds neither, or only half of one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise LowBitError(f"artifact folder {str(folder)!r} does not exist; write one with calibrate or quantize")
        for file in sorted([*folder.glob("lowbit*.safetensors"), *folder.glob("comm_plan_tp*.safetensors")]):
            described = "lowbit.json" if file.name.startswith("lowbit") else f"{file.stem}.json"
            if not (folder / described).exists():
                raise LowBitError(
                    f"{str(folder)!r} holds {file.name} without {described}: its writing was interrupted, or the file "
                    "is lost; run that command again, or delete what is there"
                )
        checkpoint = LowBitCheckpoint.load(folder) if (folder / "lowbit.json").exists() else None
        sizes = _plan_sizes(folder)
        if checkpoint is None and not sizes:
            raise LowBitError(
                f"{str(folder)!r} holds no lowbit.json and no comm_plan_tp*.json; run calibrate or quantize"
            )
        return cls(checkpoint, {size: CommPlan.load(folder, size) for size in sizes}, folder)

    def plan(self, tp_size: int) -> CommPlan:
        if tp_size not in self.plans:
            raise LowBitError(
                f"no communication plan for tp_size {tp_size} (there are {sorted(self.plans)}); "
                f"run calibrate with comm.tp_sizes=[{tp_size}]"
            )
        return self.plans[tp_size]


def verify_files(folder: Path, part: PartMeta) -> None:
    """Raise LowBitError where a file of `part` is missing or not what was written."""
    for name, checksum in part["files"].items():
        if not (folder / name).exists() or sha256(folder / name) != checksum:
            raise LowBitError(f"{str(folder / name)!r} is missing or corrupt (its checksum differs)")


def remove_plans(folder: str | Path) -> None:
    """Delete the folder's communication plans: they belong to a checkpoint that is about to be replaced."""
    for suffix in (".json", ".safetensors"):  # a plan is gone when its JSON is
        for file in Path(folder).glob(f"comm_plan_tp*{suffix}"):
            discard(file)


def _plan_sizes(folder: Path) -> list[int]:
    """The tensor-parallel sizes that the folder has plans for."""
    found = (re.fullmatch(r"comm_plan_tp(\d+)", path.stem) for path in folder.glob("comm_plan_tp*.json"))
    return sorted(int(match.group(1)) for match in found if match)
