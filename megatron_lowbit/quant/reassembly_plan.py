"""A channel reassembly as data: which input channels make up each channel that is quantized (QLLM, arXiv 2310.08041).

    x' = x S      W' = R W      x' W' = x S R W ~ x W                            eqs. 3 and 4; S and R are sparse

Every entry e of a plan adds channel src_idx[e] to channel dst_idx[e]:

    x'_c  = sum over e -> c of coefficient[e] * x[src_idx[e]]
    W'_c  = sum over e -> c of W[src_idx[e]]

A channel that stays is one entry with coefficient 1. One that is split into T sub-channels is T entries with 1/T,
each to a channel of its own. A group that is merged is |G| entries with 1/|G| to one channel: the mean of the
activations, the sum of the weights. Splitting is exact (S R = 1 on that channel); merging costs sum over G of (x_i -
mean x)(W_i - mean W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.tensors import check_index, check_tensor, short_repr
from megatron_lowbit.kernels import reassemble


@dataclass(frozen=True)
class ReassemblyPlan:
    """src_idx, dst_idx int64 [entries], coefficient float32 [entries]; the entries 0 .. width-1 go to channels 0 ..
    width-1.

    The others, which only merged groups have, follow. in_features: channels of x; width: channels of x'.
    """

    src_idx: Tensor
    dst_idx: Tensor
    coefficient: Tensor
    in_features: int
    width: int

    __repr__ = short_repr

    def validate(self, name: str) -> None:
        """Raise ValueError, naming the tensor, where this is no plan from in_features channels to `width`."""
        entries = len(self.src_idx) if self.src_idx.ndim == 1 else None
        check_tensor(f"{name}.src_idx", self.src_idx, torch.int64, (None,))
        check_tensor(f"{name}.dst_idx", self.dst_idx, torch.int64, (entries,))
        check_tensor(f"{name}.coefficient", self.coefficient, torch.float32, (entries,), finite=True)
        check_index(f"{name}.src_idx", self.src_idx, self.in_features)
        check_index(f"{name}.dst_idx", self.dst_idx, self.width)
        if not torch.equal(self.dst_idx[: self.width], torch.arange(self.width, device=self.dst_idx.device)):
            raise ValueError(f"{name}.dst_idx does not begin with the {self.width} channels in their order")

    @classmethod
    def identity(cls, in_features: int) -> ReassemblyPlan:
        index = torch.arange(in_features)
        return cls(index, index.clone(), torch.ones(in_features), in_features, in_features)

    @property
    def is_identity(self) -> bool:
        return len(self.src_idx) == self.in_features == self.width and bool((self.coefficient == 1).all())

    def activations(self, x: Tensor) -> Tensor:
        """Return x S: [..., in_features] -> [..., width], in x's dtype."""
        return reassemble(x, self.src_idx, self.dst_idx, self.coefficient, self.width)

    def weights(self, weight: Tensor) -> Tensor:
        """Return R W on the input side of a weight [out, in_features]: -> [out, width]."""
        merged = weight.index_select(1, self.src_idx[: self.width])
        return merged.index_add(1, self.dst_idx[self.width :], weight.index_select(1, self.src_idx[self.width :]))

    def fold(self, gain: Tensor) -> ReassemblyPlan:
        """Return the plan that also multiplies by the gain [in_features] of the norm before it: coefficient *
        gain[src].

        x = gain * n  =>  x S = n (diag(gain) S), so the norm and the reassembly are one gather (QLLM, appendix B).
        """
        coefficient = self.coefficient * gain.to(self.coefficient.dtype)[self.src_idx]
        return ReassemblyPlan(self.src_idx, self.dst_idx, coefficient, self.in_features, self.width)

    def to(self, device: torch.device | str) -> ReassemblyPlan:
        src_idx, dst_idx, coefficient = (t.to(device) for t in (self.src_idx, self.dst_idx, self.coefficient))
        return ReassemblyPlan(src_idx, dst_idx, coefficient, self.in_features, self.width)

    def shard(self, rank: int, size: int) -> ReassemblyPlan:
        """Return rank `rank`'s part of a plan that was made within shard groups: no entry crosses the rank's
        boundary."""
        inputs, width = self.in_features // size, self.width // size
        mine = (self.dst_idx >= rank * width) & (self.dst_idx < (rank + 1) * width)
        src, dst = self.src_idx[mine] - rank * inputs, self.dst_idx[mine] - rank * width
        crosses = bool(((src < 0) | (src >= inputs)).any())
        if self.in_features % size or self.width % size or crosses:
            raise LowBitError(
                f"a reassembly from {self.in_features} to {self.width} channels crosses the shards of {size} ranks; "
                "quantize again with a weights.shard_groups that they divide"
            )
        return ReassemblyPlan(src, dst, self.coefficient[mine], inputs, width)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (src int64 [width], coefficient float32 [width], merged_into int64 [in_features]): a form whose shape
        does not depend on what is merged, and whose slices are those of the channels.

        The first two are the entries 0 .. width-1; merged_into[i] is the channel of x' that channel i is added to by
        one of the others, or -1. (A channel is merged once, and its coefficient is that of the group.)
        """
        merged = torch.full((self.in_features,), -1, dtype=torch.int64, device=self.src_idx.device)
        merged[self.src_idx[self.width :]] = self.dst_idx[self.width :]
        return self.src_idx[: self.width], self.coefficient[: self.width], merged

    @classmethod
    def from_dense(cls, src: Tensor, coefficient: Tensor, merged_into: Tensor) -> ReassemblyPlan:
        """Build the plan from what `dense` returns; the merged channels are added in their order."""
        source = (merged_into >= 0).nonzero().squeeze(1)
        target = merged_into[source]
        dst = torch.arange(len(src), device=src.device)
        return cls(
            torch.cat([src, source]),
            torch.cat([dst, target]),
            torch.cat([coefficient, coefficient[target]]),
            len(merged_into),
            len(src),
        )

    @staticmethod
    def join(parts: Sequence[ReassemblyPlan]) -> ReassemblyPlan:
        """Return one plan of the plans of neighbouring slices, in order."""
        src, dst, inputs, width = [], [], 0, 0
        for part in parts:
            src.append(part.src_idx + inputs)
            dst.append(part.dst_idx + width)
            inputs, width = inputs + part.in_features, width + part.width
        heads = [
            (s[: p.width], d[: p.width], p.coefficient[: p.width]) for s, d, p in zip(src, dst, parts, strict=True)
        ]
        tails = [
            (s[p.width :], d[p.width :], p.coefficient[p.width :]) for s, d, p in zip(src, dst, parts, strict=True)
        ]
        src_idx, dst_idx, coefficient = (torch.cat(tensors) for tensors in zip(*heads, *tails, strict=True))
        return ReassemblyPlan(src_idx, dst_idx, coefficient, inputs, width)
