"""Files: CalibrationStats, CommPlan and LowBitCheckpoint, each as safetensors + JSON. The only module that opens any.

    <folder>/calibration.{safetensors,json}     per-feature ranges of every row-parallel site, per tensor-parallel size
    <folder>/comm_plan_tp<N>.{safetensors,json} what N ranks send at every site
    <folder>/lowbit.{safetensors,json}          packed weights under Hugging Face names, whole (unsharded) tensors
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.config import LowBitError, one_line
from megatron_lowbit.quantizer import QuantizedWeight, Scheme

FORMAT = 1
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
    fields = {name: value for name in _FINGERPRINT_FIELDS if (value := getattr(config, name, None)) is not None}
    if not weights:
        raise LowBitError("the model has no tensor-parallel linears that megatron_lowbit knows")
    names = sorted(weights)
    sums = torch.stack([_bit_sum(weights[name].detach()) for name in names])
    if tp_group is not None:
        dist.all_reduce(sums, group=tp_group)
    return {**fields, "weights": dict(zip(names, sums.tolist(), strict=True))}


def _bit_sum(weight: Tensor) -> Tensor:
    rounded = weight.to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < 2.0**-14, 0, rounded)
    return rounded.contiguous().view(torch.int16).sum(dtype=torch.int64)


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
    """{site: SitePlan} of one tensor-parallel size."""

    sites: dict[str, SitePlan]
    tp_size: int
    fingerprint: Fingerprint
    description: str = "hybrid"

    def save(self, folder: str | Path) -> None:
        tensors = {}
        for site, plan in self.sites.items():
            for name in ("scale", "zero_point", "bf16_idx"):
                tensors[f"{site}.{name}"] = getattr(plan, name)
        meta = {
            "fingerprint": self.fingerprint,
            "tp_size": self.tp_size,
            "description": self.description,
            "num_bits": {site: plan.num_bits for site, plan in self.sites.items()},
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
        return cls(sites, tp_size, meta["fingerprint"], meta["description"])


@dataclass(frozen=True)
class LowBitCheckpoint:
    """Quantized linears and all other tensors under Hugging Face names, independent of framework and tp_size."""

    linears: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor]
    scheme: Scheme
    scheme_name: str
    shard_groups: int
    fingerprint: Fingerprint

    def save(self, folder: str | Path) -> None:
        tensors = dict(self.tensors)
        for name, weight in self.linears.items():
            tensors[f"{name}.packed_weight"] = weight.packed_weight
            tensors[f"{name}.scale"] = weight.scale
            tensors[f"{name}.zero_point"] = weight.zero_point
        meta = {
            "fingerprint": self.fingerprint,
            "scheme": self.scheme_name,
            "shard_groups": self.shard_groups,
            "in_features": {name: weight.in_features for name, weight in self.linears.items()},
        }
        _save(Path(folder) / "lowbit", tensors, meta)

    @classmethod
    def load(cls, folder: str | Path) -> LowBitCheckpoint:
        tensors, meta = _load(Path(folder) / "lowbit", "fingerprint", "scheme", "shard_groups", "in_features")
        scheme = Scheme.parse(meta["scheme"])
        with _complete(Path(folder) / "lowbit"):
            linears = {
                name: QuantizedWeight(
                    tensors.pop(f"{name}.packed_weight"),
                    tensors.pop(f"{name}.scale"),
                    tensors.pop(f"{name}.zero_point"),
                    scheme.weight_bits,
                    in_features,
                )
                for name, in_features in meta["in_features"].items()
            }
        return cls(linears, tensors, scheme, meta["scheme"], meta["shard_groups"], meta["fingerprint"])

    def nbytes(self) -> int:
        """Bytes of all tensors, packed."""
        packed = sum(t.nbytes for w in self.linears.values() for t in (w.packed_weight, w.scale, w.zero_point))
        return packed + sum(t.nbytes for t in self.tensors.values())


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
    path = stem.with_suffix(".safetensors")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors leaves files that only their owner can read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        raise LowBitError(f"cannot write {str(path)!r}: {one_line(error)}") from None
    write_json(stem.with_suffix(".json"), {"format": FORMAT, "sha256": _sha256(path), **meta})


def _load(stem: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = stem.with_suffix(".safetensors")
    try:
        meta = json.loads(stem.with_suffix(".json").read_text())
        if not isinstance(meta, dict) or not {"format", "sha256", *keys} <= set(meta):
            raise ValueError("its JSON is incomplete")
        if meta["format"] != FORMAT:
            raise LowBitError(f"{str(stem)!r} has format {meta['format']}; this version reads {FORMAT}: write it again")
        if _sha256(path) != meta["sha256"]:
            raise LowBitError(f"{str(path)!r} is truncated or corrupt (its checksum differs); write it again")
        return load_file(path), meta
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LowBitError(f"cannot read {str(stem)!r}: {one_line(error)}; write it again") from None


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
