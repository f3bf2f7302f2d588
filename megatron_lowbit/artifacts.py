"""Files: CalibrationStats, CommPlan and LowBitCheckpoint, each as safetensors + JSON. The only module that opens any.

    <folder>/calibration.{safetensors,json}     per-feature ranges of every row-parallel site, per tensor-parallel size
    <folder>/comm_plan_tp<N>.{safetensors,json} what N ranks send at every site
    <folder>/lowbit*.safetensors, lowbit.json   packed weights under Hugging Face names, whole (unsharded) tensors
    <folder>/config.json, tokenizer...          so that the folder loads without the original model

Each file is written under a temporary name and renamed, the JSON last: an artifact exists when its JSON does. The JSON
holds the model's fingerprint, so an artifact of another model is refused with the differing values named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.channels import ReassemblyPlan
from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.quantizer import LowRank, QuantizedWeight, Scheme

FORMAT = 2
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
    """Per-feature range of the partial sums at one site: float32 [tp_size, features] each."""

    min_vals: Tensor
    max_vals: Tensor


@dataclass(frozen=True)
class CalibrationStats:
    """{tp_size: {site: FeatureRange}}; tp_size 1 holds the ranges of the full sum."""

    ranges: dict[int, dict[str, FeatureRange]]
    fingerprint: Fingerprint

    def save(self, folder: str | Path) -> None:
        tensors = {}
        for size, sites in self.ranges.items():
            for site, r in sites.items():
                tensors[f"tp{size}.{site}.min_vals"] = r.min_vals
                tensors[f"tp{size}.{site}.max_vals"] = r.max_vals
        _save(Path(folder) / "calibration", tensors, {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationStats:
        tensors, meta = _load(Path(folder) / "calibration", "fingerprint")
        ranges: dict[int, dict[str, FeatureRange]] = {}
        with _complete(Path(folder) / "calibration"):
            for key in tensors:
                if key.endswith(".min_vals"):
                    size, site = key.removesuffix(".min_vals").removeprefix("tp").split(".", 1)
                    r = FeatureRange(tensors[key], tensors[key.removesuffix("min_vals") + "max_vals"])
                    ranges.setdefault(int(size), {})[site] = r
        return cls(ranges, meta["fingerprint"])


@dataclass(frozen=True)
class SitePlan:
    """What the ranks send at one site: scale, zero_point float32 [tp_size, features]; bf16_idx int64 [k], ascending."""

    scale: Tensor
    zero_point: Tensor
    bf16_idx: Tensor
    num_bits: int


@dataclass(frozen=True)
class CommPlan:
    """{site: SitePlan} of one tensor-parallel size.

    gathers: of the inputs of column-parallel linears, {first linear that reads it: SitePlan of one sender}, for the
    all-gather of sequence parallelism; empty where it stays in full precision.
    """

    sites: dict[str, SitePlan]
    tp_size: int
    fingerprint: Fingerprint
    description: str = "hybrid"
    gathers: dict[str, SitePlan] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        tensors = {}
        both = {**self.sites, **self.gathers}
        for site, plan in both.items():
            for name in ("scale", "zero_point", "bf16_idx"):
                tensors[f"{site}.{name}"] = getattr(plan, name)
        meta = {
            "fingerprint": self.fingerprint,
            "tp_size": self.tp_size,
            "description": self.description,
            "num_bits": {site: plan.num_bits for site, plan in both.items()},
            "gathers": list(self.gathers),
        }
        _save(Path(folder) / f"comm_plan_tp{self.tp_size}", tensors, meta)

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
        tensors, meta = _load(stem, "fingerprint", "tp_size", "description", "num_bits")
        if meta["tp_size"] != tp_size:
            raise LowBitError(
                f"{str(stem)!r} was calibrated for tp_size {meta['tp_size']}, not {tp_size}; calibrate again"
            )
        with _complete(stem):
            sites = {
                site: SitePlan(
                    tensors[f"{site}.scale"], tensors[f"{site}.zero_point"], tensors[f"{site}.bf16_idx"], bits
                )
                for site, bits in meta["num_bits"].items()
            }
        gathers = {name: sites.pop(name) for name in meta.get("gathers", [])}
        return cls(sites, tp_size, meta["fingerprint"], meta["description"], gathers)


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
        meta = _read_meta(stem, *keys)
        scheme = Scheme.parse(meta["scheme"])
        with _complete(stem):
            tensors: dict[str, Tensor] = {}
            for file, checksum in meta["files"].items():
                tensors |= _read_tensors(Path(folder) / file, checksum)
            linears = {
                name: QuantizedWeight(
                    **_pop(tensors, name, _WEIGHT), num_bits=scheme.weight_bits, in_features=in_features
                )
                for name, in_features in meta["in_features"].items()
            }
            plans = {
                name: ReassemblyPlan(**_pop(tensors, name, _PLAN), in_features=in_features, width=width)
                for name, (in_features, width) in meta["reassembly"].items()
            }
            low_rank = {name: LowRank(**_pop(tensors, name, _LOW_RANK)) for name in meta["low_rank"]}
        return cls(
            linears,
            tensors,
            scheme,
            meta["scheme"],
            meta["shard_groups"],
            meta["fingerprint"],
            plans,
            low_rank,
            meta["attention_bits"],
        )

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
    """Write lowbit.json over the files of `part`, and remove those of the checkpoint that was there before."""
    folder = Path(folder)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "scheme": scheme,
        "shard_groups": shard_groups,
        "attention_bits": attention_bits,
        **part,
    }
    write_json(folder / "lowbit.json", meta)
    for file in folder.glob("lowbit*.safetensors"):
        if file.name not in part["files"]:
            _discard(file)


def _pop(tensors: dict[str, Tensor], name: str, leaves: tuple[str, ...]) -> dict[str, Any]:
    return {leaf: tensors.pop(f"{name}.{leaf}") for leaf in leaves}


@dataclass(frozen=True)
class Artifact:
    """What an adapter applies: a checkpoint (None: full-precision weights), plans by tp_size (empty: bf16)."""

    checkpoint: LowBitCheckpoint | None = None
    plans: dict[int, CommPlan] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Artifact:
        """Whatever of the two the folder holds. Raises LowBitError if it holds neither."""
        folder = Path(folder)
        if not folder.is_dir():
            raise LowBitError(f"artifact folder {str(folder)!r} does not exist; write one with calibrate or quantize")
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


def ensure_writable(folder: str | Path) -> Path:
    """Create the folder and prove that files can be written there; raises LowBitError."""
    folder = Path(folder)
    probe = folder / f".write-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LowBitError(f"output_dir {str(folder)!r} is not writable ({error.strerror}); choose another") from None
    return folder


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise LowBitError(f"cannot write {str(path)!r}: {error.strerror}") from None


def _save(stem: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    checksum = write_tensors(stem.with_suffix(".safetensors"), tensors)
    write_json(stem.with_suffix(".json"), {"format": FORMAT, "sha256": checksum, **meta})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically; returns its sha256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors leaves files that only their owner can read
        checksum = _sha256(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        raise LowBitError(f"cannot write {str(path)!r}: {one_line(error)}") from None
    return checksum


def _load(stem: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta = _read_meta(stem, "sha256", *keys)
    return _read_tensors(stem.with_suffix(".safetensors"), meta["sha256"]), meta


def _read_meta(stem: Path, *keys: str) -> dict[str, Any]:
    meta = read_json(stem.with_suffix(".json"))
    if "format" in meta and meta["format"] != FORMAT:
        raise LowBitError(f"{str(stem)!r} has format {meta['format']}; this version reads {FORMAT}: write it again")
    if not {"format", *keys} <= set(meta):
        raise LowBitError(f"cannot read {str(stem)!r}: its JSON is incomplete; write it again")
    return meta


def verify_files(folder: Path, part: PartMeta) -> None:
    """Raise LowBitError where a file of `part` is missing or not what was written."""
    for name, checksum in part["files"].items():
        if not (folder / name).exists() or _sha256(folder / name) != checksum:
            raise LowBitError(f"{str(folder / name)!r} is missing or corrupt (its checksum differs)")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left half written."""
    for file in folder.glob(".lowbit*.tmp"):
        _discard(file)


def remove_plans(folder: str | Path) -> None:
    """Delete the folder's communication plans: they belong to a checkpoint that is about to be replaced."""
    for size in _plan_sizes(Path(folder)):
        for suffix in (".json", ".safetensors"):
            _discard(Path(folder) / f"comm_plan_tp{size}{suffix}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises LowBitError."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("its JSON is incomplete")
        return value
    except (OSError, ValueError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


def _read_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if _sha256(path) != checksum:
            raise LowBitError(f"{str(path)!r} is truncated or corrupt (its checksum differs); write it again")
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LowBitError(f"cannot read {str(path.with_suffix(''))!r}: {one_line(error)}; write it again") from None


@contextlib.contextmanager
def _complete(stem: Path) -> Iterator[None]:
    """Around the use of loaded tensors: JSON and safetensors that do not belong together are one clear error."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LowBitError(f"{str(stem)!r} is incomplete ({one_line(error)}); write it again") from None


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def _plan_sizes(folder: Path) -> list[int]:
    """The tensor-parallel sizes that the folder has plans for."""
    found = (re.fullmatch(r"comm_plan_tp(\d+)", path.stem) for path in folder.glob("comm_plan_tp*.json"))
    return sorted(int(match.group(1)) for match in found if match)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
