"""What a rotated checkpoint asks of whoever runs it: the rotations that no weight can hold, and those that reach beyond
the quantized linears (qllm/rotation.py has the equations)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

RotationKind = Literal["hadamard", "learned"]


@dataclass(frozen=True)
class OnlineRotation:
    """Say what of a model is rotated.

    residual: whether the residual stream is, so that embeddings, norms and the output projection are the artifact's.
    attention: whether Q and K are multiplied by the Hadamard matrix of a head, after RoPE, before they are quantized.
    inputs: names of the row-parallel linears whose input is multiplied by the Hadamard matrix of each shard group.
    kind: whether the matrices that are folded into weights (of the residual stream and of V) are Hadamard's or learned.
    """

    residual: bool
    attention: bool
    inputs: frozenset[str]
    kind: RotationKind = "hadamard"

    @classmethod
    def read(cls, about: dict[str, Any]) -> OnlineRotation:
        """Return what `describe` wrote down."""
        return cls(about["residual"], about["attention"], frozenset(about["inputs"]), about["kind"])

    def describe(self) -> dict[str, Any]:
        """Return what lowbit.json says of it."""
        what = {"residual": self.residual, "attention": self.attention, "inputs": sorted(self.inputs)}
        return {"kind": self.kind, **what}

    def validate(self, linears: Collection[str], attention_bits: int) -> None:
        """Raise ValueError for an input of no quantized linear, and for a rotated attention that nothing quantizes."""
        strange = sorted(self.inputs - set(linears))
        if strange:
            raise ValueError(f"the input of {strange[0]} is rotated, which is no quantized linear")
        if self.attention and attention_bits == 16:
            raise ValueError("Q and K are rotated, and not quantized")
