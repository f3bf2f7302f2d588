"""LowBitCheckpoint: packed weights under Hugging Face names, whole (unsharded) tensors.

<folder>/lowbit*.safetensors, lowbit.json
<folder>/config.json, tokenizer...          and generation_config.json, where the model has one, so that the folder
                                            loads without the original model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.files import (
    EXTENDED,
    FORMAT,
    WITH_HEAD,
    WITHOUT_SEAL,
    complete,
    discard,
    read_meta,
    read_tensors,
    sha256,
    write_sealed,
    write_tensors,
)
from megatron_lowbit.io.fingerprint import Fingerprint
from megatron_lowbit.io.manifest import CheckpointManifest, checked
from megatron_lowbit.io.tensors import refuse_unused, short_repr
from megatron_lowbit.quant.affine import PER_LINEAR, LowRank, QuantizedWeight, Scheme
from megatron_lowbit.quant.experts import QuantizedExperts
from megatron_lowbit.quant.head import QuantizedHead
from megatron_lowbit.quant.input_clipping import HEADS, Clip, as_clip
from megatron_lowbit.quant.online_rotation import OnlineRotation
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.quant.weight_bits import Allocation

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "sentencepiece*"),
)


@dataclass
class CheckpointPart:
    """The part that some blocks contribute to a LowBitCheckpoint, as one safetensors file.

    linears and other tensors by Hugging Face name; reassembly by the module that carries it out (a norm, whose
    output it is, or a linear, whose input); low_rank by linear; clipping by site (input_clipping.py). head: the output
    projection, where it is quantized. experts: the projections of experts that are quantized.
    """

    linears: dict[str, QuantizedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reassembly: dict[str, ReassemblyPlan] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    head: QuantizedHead | None = None
    clipping: dict[str, Clip] = field(default_factory=dict)
    experts: dict[str, QuantizedWeight] = field(default_factory=dict)

    __repr__ = short_repr

    def save(self, path: Path) -> PartMeta:
        """Write the file; returns what lowbit.json has to say about it."""
        tensors = dict(self.tensors)
        heads = {} if self.head is None else {self.head.name: self.head.weight}
        packed = {**self.linears, **heads, **self.experts}
        for owner, names in ((packed, WEIGHT), (self.reassembly, PLAN), (self.low_rank, _LOW_RANK)):
            for name, value in owner.items():
                tensors |= {f"{name}.{leaf}": getattr(value, leaf) for leaf in names}
        return {
            "files": {path.name: write_tensors(path, tensors)},
            "in_features": {name: weight.in_features for name, weight in self.linears.items()},
            "reassembly": {name: [plan.in_features, plan.width] for name, plan in self.reassembly.items()},
            "low_rank": sorted(self.low_rank),
            **({} if self.head is None else {"head": self.head.describe()}),
            **({"clipping": {name: list(clip) for name, clip in self.clipping.items()}} if self.clipping else {}),
            **(
                {"experts": {name: weight.in_features for name, weight in self.experts.items()}} if self.experts else {}
            ),
        }


PartMeta = dict[str, Any]


WEIGHT = ("packed_weight", "scale", "zero_point")


PLAN = ("src_idx", "dst_idx", "coefficient")


_LOW_RANK = ("lora_a", "lora_b")


_EXTENSIONS = ("rotation", "clipping", "allocation", "experts")  # in format 6 alone


def merge_parts(parts: Sequence[PartMeta]) -> PartMeta:
    """Return the description of several parts as one."""
    merged: PartMeta = {"files": {}, "in_features": {}, "reassembly": {}, "low_rank": []}
    for part in parts:
        for key in ("files", "in_features", "reassembly"):
            merged[key].update(part[key])
        merged["low_rank"] += part["low_rank"]
        if "head" in part:
            merged["head"] = part["head"]
        for key in ("clipping", "experts"):
            if key in part:
                merged.setdefault(key, {}).update(part[key])
    return merged


@dataclass(frozen=True)
class LowBitCheckpoint:
    """A model's quantized linears and all its other tensors, whole, independent of framework and number of ranks.

    Args:
        linears: {name in the Hugging Face model: QuantizedWeight}, with packed_weight uint8 [out, bytes of a row],
            scale and zero_point float32 [out, groups].
        tensors: {name: tensor} of all that is not quantized.
        scheme: bits of weights and activations.
        scheme_name: its name, such as "W4A8", or "autoA8" where each linear has its own bits.
        shard_groups: slices of a row-parallel linear's input that have a scale of their own per token, so that each
            rank can quantize its share by itself.
        fingerprint: shapes and checksums of the model that was quantized.
        reassembly: {norm or linear that carries it out: ReassemblyPlan}; a norm reassembles its output's channels, a
            linear those of its input.
        low_rank: {linear: LowRank}, factors lora_a bf16 [rank, in] and lora_b bf16 [out, rank].
        attention_bits: of Q, K and V; 16 leaves them as they are.
        head: the output projection, and the embedding that is tied to it, in codes; None leaves them among `tensors`.
        rotation: what of the model is rotated, and what of that runs online; None: nothing.
        clipping: {linear, or "attention:q", "attention:k", "attention:v": what is left of the two ends of its tokens'
            ranges}, ratios above 0 and at most 1; others keep all.
        allocation: of scheme auto: the bits of every linear, and what they were chosen by.
        experts: the experts of a mixture of experts, in codes; None leaves them among `tensors`.

    Example:
        >>> import megatron_lowbit as lowbit
        >>> checkpoint = lowbit.LowBitCheckpoint.load("artifact")
        >>> weight = checkpoint.linears["model.layers.0.self_attn.q_proj"]
        >>> weight.packed_weight.shape, weight.dequantize().shape
        (torch.Size([64, 32]), torch.Size([64, 64]))
        >>> checkpoint.ideal_bytes() <= checkpoint.linear_bytes() <= checkpoint.nbytes()
        True
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
    head: QuantizedHead | None = None
    rotation: OnlineRotation | None = None
    clipping: dict[str, Clip] = field(default_factory=dict)
    allocation: Allocation | None = None
    experts: QuantizedExperts | None = None

    __repr__ = short_repr

    def save(self, folder: str | Path) -> None:
        """Write lowbit.safetensors, and lowbit.json with its checksum and those of config and tokenizer.

        Args:
            folder: an existing folder. The files of a checkpoint that was there are replaced.

        Raises:
            LowBitError: it cannot be written.
        """
        experts = {} if self.experts is None else self.experts.weights
        parts = (self.linears, self.tensors, self.reassembly, self.low_rank, self.head, self.clipping, experts)
        part = CheckpointPart(*parts)
        meta = part.save(Path(folder) / "lowbit.safetensors")
        about = (
            self.scheme_name,
            self.shard_groups,
            self.attention_bits,
            self.fingerprint,
            self.rotation,
            self.allocation,
            None if self.experts is None else self.experts.scheme,
        )
        write_checkpoint(folder, meta, *about)

    @classmethod
    def load(cls, folder: str | Path) -> LowBitCheckpoint:
        """Read lowbit.json and the tensor files that it names.

        Args:
            folder: where `save`, or `megatron-lowbit quantize`, has written them.

        Returns:
            The LowBitCheckpoint. Its tensors are mapped from their files: pages come into memory as they are used.

        Raises:
            LowBitError: a file is missing, damaged or was changed, or the tensors do not fit together.
        """
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
        meta = read_meta(stem, *keys, formats=(EXTENDED, WITH_HEAD, FORMAT, WITHOUT_SEAL))
        with complete(stem.with_suffix(".json")):
            checked(CheckpointManifest, meta)
        _check_beside(Path(folder), meta.get("beside", {}))
        tensors: dict[str, Tensor] = {}
        where: dict[str, Path] = {}
        for file, checksum in meta["files"].items():
            path = Path(folder) / file
            found = read_tensors(path, checksum)
            with complete(path):
                refuse_unused(found.keys() & tensors.keys())
            tensors |= found
            where |= dict.fromkeys(found, path)
        scheme, allocation = Scheme.parse(meta["scheme"]), None
        with complete(stem.with_suffix(".json")):
            extensions = [key for key in _EXTENSIONS if key in meta]
            if extensions and meta["format"] != EXTENDED:
                raise ValueError(f"{extensions[0]} in format {meta['format']}")
            if meta["format"] == EXTENDED and not extensions:
                raise ValueError(f"format {EXTENDED} lacks {' and '.join(_EXTENSIONS)}")
            if (scheme.weight_bits == PER_LINEAR) != ("allocation" in meta):
                raise ValueError(f"scheme {meta['scheme']} {'with' if 'allocation' in meta else 'without'} allocation")
            if "allocation" in meta:
                allocation = Allocation(**meta["allocation"])
            bits_of = {n: allocation.bits[n] if allocation else scheme.weight_bits for n in meta["in_features"]}

        def take(name: str, leaves: tuple[str, ...]) -> dict[str, Tensor]:
            return {leaf: tensors.pop(f"{name}.{leaf}") for leaf in leaves}

        linears: dict[str, QuantizedWeight] = {}
        plans: dict[str, ReassemblyPlan] = {}
        low_rank: dict[str, LowRank] = {}
        for name, in_features in meta["in_features"].items():
            with complete(where.get(f"{name}.packed_weight", stem)):
                weight = QuantizedWeight(**take(name, WEIGHT), num_bits=bits_of[name], in_features=in_features)
                weight.validate(name)
                linears[name] = weight
        for name, (in_features, width) in meta["reassembly"].items():
            with complete(where.get(f"{name}.src_idx", stem)):
                plans[name] = ReassemblyPlan(**take(name, PLAN), in_features=in_features, width=width)
                plans[name].validate(name)
        for name in meta["low_rank"]:
            with complete(where.get(f"{name}.lora_a", stem)):
                low_rank[name] = LowRank(**take(name, _LOW_RANK))
                low_rank[name].validate(name, linears[name].in_features, len(linears[name].packed_weight))
        head = rotation = experts = None
        clips: dict[str, Clip] = {}
        with complete(stem.with_suffix(".json")):
            if "rotation" in meta:
                rotation = OnlineRotation.read(meta["rotation"])
            if "clipping" in meta:
                clips = {name: as_clip(*ratios) for name, ratios in meta["clipping"].items()}
        if meta["format"] == WITH_HEAD or (meta["format"] == EXTENDED and "head" in meta):
            with complete(stem.with_suffix(".json")):
                about = meta["head"]
            with complete(where.get(f"{about['name']}.packed_weight", stem)):
                head = QuantizedHead.read(about, take(about["name"], WEIGHT))
        if "experts" in meta:
            with complete(stem.with_suffix(".json")):
                about = meta["experts"]
                bits_of_experts = Scheme.parse(about["scheme"]).weight_bits
            found_experts: dict[str, QuantizedWeight] = {}
            for name, width in about["in_features"].items():
                with complete(where.get(f"{name}.packed_weight", stem)):
                    found_experts[name] = QuantizedWeight(
                        **take(name, WEIGHT), num_bits=bits_of_experts, in_features=width
                    )
                    found_experts[name].validate(name)
            experts = QuantizedExperts(about["scheme"], found_experts)
        bits, fingerprint = meta["attention_bits"], meta["fingerprint"]
        names = (scheme, meta["scheme"], meta["shard_groups"], fingerprint)
        checkpoint = cls(linears, tensors, *names, plans, low_rank, bits, head, rotation, clips, allocation, experts)
        with complete(stem.with_suffix(".json")):
            checkpoint.validate()
        return checkpoint

    def validate(self) -> None:
        """Check that the parts, each of which is valid by itself, fit together.

        Raises:
            ValueError: they do not; the message names the tensor.
        """
        experts = [] if self.experts is None else list(self.experts.weights)
        packed = [*self.linears, *experts, *([] if self.head is None else [self.head.name])]
        strange = [name for name in packed if name not in self.fingerprint["weights"]]
        if strange:
            raise ValueError(f"its fingerprint lacks the linear {strange[0]}")
        if self.attention_bits not in (16, self.scheme.act_bits):
            raise ValueError(f"attention_bits is {self.attention_bits}, not 16 or those of {self.scheme_name}")
        for name, plan in self.reassembly.items():
            readers = [self.linears[name]] if name in self.linears else self.linears.values()
            if not any(weight.in_features == plan.width for weight in readers):
                raise ValueError(f"{name} is reassembled to {plan.width} channels, which no linear reads")
        owners = {name.rpartition(".")[0] for name in self.linears}
        for site in self.clipping:
            owner, colon, head = site.partition(":")
            known = site in self.linears if not colon else owner in owners and head in HEADS
            if not known or self.scheme.act_bits == 16 or (colon and self.attention_bits == 16):
                raise ValueError(f"{site} is clipped, but nothing is quantized there")
        if self.allocation is not None and self.allocation.bits.keys() != self.linears.keys():
            raise ValueError("its allocation of bits names other linears")
        if self.head is not None:
            refuse_unused(self.head.replaced & self.tensors.keys())
        refuse_unused(name for name in experts if name in self.tensors)
        if self.rotation is not None:
            self.rotation.validate(self.linears, self.attention_bits)
        leaves = {*WEIGHT, *PLAN, *_LOW_RANK} - {"scale"}  # a model may have a tensor of that name
        refuse_unused(name for name in self.tensors if name.rpartition(".")[2] in leaves)

    def nbytes(self) -> int:
        """Return the bytes of all tensors, packed.

        Returns:
            An int.
        """
        head = 0 if self.head is None else self.head.nbytes
        experts = 0 if self.experts is None else self.experts.nbytes
        return self.linear_bytes() + head + experts + sum(t.nbytes for t in self.tensors.values())

    def linear_bytes(self) -> int:
        """Return the bytes of the quantized linears: codes, scales, zero points, plans and branches.

        Returns:
            An int.
        """
        owners = ((self.linears, WEIGHT), (self.reassembly, PLAN), (self.low_rank, _LOW_RANK))
        return sum(getattr(v, leaf).nbytes for owner, names in owners for v in owner.values() for leaf in names)

    def ideal_bytes(self) -> float:
        """Return bits * parameters / 8 of the quantized linears: what no format can be below.

        Returns:
            A float.
        """
        return sum(w.packed_weight.shape[0] * w.in_features * w.num_bits / 8 for w in self.linears.values())


def write_checkpoint(
    folder: str | Path,
    part: PartMeta,
    scheme: str,
    shard_groups: int,
    attention_bits: int,
    fingerprint: Fingerprint,
    rotation: OnlineRotation | None = None,
    allocation: Allocation | None = None,
    experts: str | None = None,
) -> None:
    """Write lowbit.json over the files of `part` and the model's config and tokenizer, which are there already, and
    remove the files of the checkpoint that was there before. experts: the scheme of those in `part`."""
    folder = Path(folder)
    usual = WITH_HEAD if "head" in part else FORMAT
    meta = {
        "format": EXTENDED if rotation or allocation or part.keys() & {"clipping", "experts"} else usual,
        "fingerprint": fingerprint,
        "scheme": scheme,
        "shard_groups": shard_groups,
        "attention_bits": attention_bits,
        **part,
        **({} if rotation is None else {"rotation": rotation.describe()}),
        **({} if allocation is None else {"allocation": allocation.describe()}),
        **({} if experts is None else {"experts": {"scheme": experts, "in_features": part["experts"]}}),
        "beside": _beside(folder),
    }
    write_sealed(folder / "lowbit.json", meta)
    for file in folder.glob("lowbit*.safetensors"):
        if file.name not in part["files"]:
            discard(file)


def _beside(folder: Path) -> dict[str, str]:
    """Return {name: checksum} of the folder's config, generation config and tokenizer."""
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


def verify_files(folder: Path, part: PartMeta) -> None:
    """Raise LowBitError where a file of `part` is missing or not what was written."""
    for name, checksum in part["files"].items():
        if not (folder / name).exists() or sha256(folder / name) != checksum:
            raise LowBitError(f"{str(folder / name)!r} is missing or corrupt (its checksum differs)")
