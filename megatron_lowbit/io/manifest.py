"""What the JSON files of an artifact hold, key by key: types and ranges. Their values are trusted only after this.

lowbit.json          CheckpointManifest         calibration.json     Manifest
comm_plan_tp<N>.json PlanManifest
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Width = Annotated[int, Field(ge=1, le=2**31)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^lowbit[-\w]*\.safetensors$")]  # never a path out of the folder

OtherName = Annotated[str, Field(pattern=r"^\w[-.\w]*$")]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]!r} is listed twice")
    return names


Names = Annotated[list[str], AfterValidator(_unique)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class FingerprintManifest(_Strict):
    """Besides `weights` the shape fields of the model's config."""

    model_config = ConfigDict(extra="allow")
    weights: dict[str, Annotated[int, Field(ge=-(2**63), lt=2**63)]]


class Manifest(_Strict):
    fingerprint: FingerprintManifest


class PlanManifest(Manifest):
    tp_size: Annotated[int, Field(ge=1, le=2**16)]
    description: str
    sites: Names
    gathers: Names


class HeadManifest(_Strict):
    """A quantized output projection."""

    name: str
    embedding: str | None
    bits: Annotated[int, Field(ge=2, le=8)]
    in_features: Width
    kl: Annotated[float, Field(allow_inf_nan=False)]
    tokens: Annotated[int, Field(ge=1)]


class RotationManifest(_Strict):
    """What of a rotated checkpoint runs online, and how it was rotated."""

    kind: Literal["hadamard", "learned"]
    residual: bool
    attention: bool
    inputs: Names


class AllocationManifest(_Strict):
    """The bits of every linear's weight, where each has its own."""

    bits: dict[str, Annotated[int, Field(ge=2, le=8)]]
    budget: Annotated[float, Field(ge=2, le=8)]
    kl: Annotated[float, Field(allow_inf_nan=False, ge=0)]


class ExpertsManifest(_Strict):
    """Experts in codes: their bits, and the width of each projection of all experts."""

    scheme: Annotated[str, Field(pattern="^W[2-8]A([2-8]|16)$")]
    in_features: Annotated[dict[str, Width], Field(min_length=1)]


class CheckpointManifest(Manifest):
    files: Annotated[dict[FileName, Sha256], Field(min_length=1)]
    scheme: Annotated[str, Field(pattern="^(W[2-8]|auto)A([2-8]|16)$")]
    shard_groups: Width
    attention_bits: Annotated[int, Field(ge=2, le=16)]
    in_features: Annotated[dict[str, Width], Field(min_length=1)]
    reassembly: dict[str, Annotated[list[Width], Field(min_length=2, max_length=2)]]  # [in_features, width]
    low_rank: Names
    head: HeadManifest | None = None  # in formats 5 and 6 alone
    rotation: RotationManifest | None = None  # in format 6 alone, as the next three
    clipping: dict[str, Annotated[list[Ratio], Field(min_length=2, max_length=2)]] = {}
    allocation: AllocationManifest | None = None
    experts: ExpertsManifest | None = None
    beside: dict[OtherName, Sha256] = {}  # config, generation config, tokenizer; not in artifacts of earlier versions


M = TypeVar("M", bound=Manifest)


def checked(kind: type[M], meta: dict[str, Any]) -> M:
    """Return `meta` as a manifest. Raises ValueError naming the first key that is missing or wrong."""
    try:
        return kind.model_validate(meta)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        found = first["input"]
        given = f" (it is {str(found)[:60]!r})" if isinstance(found, (str, int, float)) else ""
        raise ValueError(f"{key}: {first['msg']}{given}") from None
