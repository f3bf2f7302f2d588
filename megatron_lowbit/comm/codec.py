"""How the values of one sender travel: which features in how many bits, with which scales.

    Codec       the plan: tensors of all senders, in the features' own order; what an artifact stores
    WireFormat  the same laid out for the kernels, as buffers of a module that follows the model's device

Both static ranges (arXiv 2411.07942) and per-token scales (ours: step(t, f) = s_t c_f, with c_f the calibrated standard
deviation of feature f and s_t the token's own size in |x - mean| / c) are described in kernels/wire_format.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.tensors import check_scale, check_tensor, one_value, short_repr
from megatron_lowbit.kernels import (
    BF16_BITS,
    Format,
    hybrid_pack,
    hybrid_row_bytes,
    hybrid_unpack_reduce,
    hybrid_unpack_reduce_into,
    hybrid_unpack_reduce_requantize,
)
from megatron_lowbit.quant.affine import Float32QParams


@dataclass(frozen=True)
class Codec:
    """scale, zero_point: float32 [senders, E]; bits: uint8 [E], 16 for bf16; the same bits for every sender.

    per_token: scale is the features' standard deviation and zero_point minus their mean over it.
    """

    scale: Tensor
    zero_point: Tensor
    bits: Tensor
    per_token: bool = False

    __repr__ = short_repr

    def validate(self, name: str, senders: int, features: int | None = None) -> None:
        """Raise ValueError, naming the tensor, where this is no plan of so many senders and features (None: any)."""
        check_tensor(f"{name}.scale", self.scale, torch.float32, (senders, features), finite=True)
        check_tensor(f"{name}.zero_point", self.zero_point, torch.float32, self.scale.shape, finite=True)
        check_tensor(f"{name}.bits", self.bits, torch.uint8, self.scale.shape[1:])
        check_scale(f"{name}.scale", self.scale)
        unknown = [bits for bits in self.bits.unique().tolist() if not (2 <= bits <= 8 or bits == BF16_BITS)]
        if unknown:
            raise ValueError(f"{name}.bits holds {unknown[0]}, not 2..8 or {BF16_BITS}")

    @property
    def senders(self) -> int:
        return self.scale.shape[0]

    @property
    def bf16_idx(self) -> Tensor:
        """Return int64 [k], ascending: the features that travel in bf16."""
        return (self.bits == BF16_BITS).nonzero().squeeze(1)

    def order(self) -> Tensor:
        """Return int64 [E]: the features as they lie on the wire, widest tier first, ascending inside a tier."""
        return torch.sort(self.bits.int(), descending=True, stable=True).indices

    def tiers(self) -> list[int]:
        """Return [bits, count, bits, count, ...], widest first."""
        widths, counts = self.bits.unique(return_counts=True)
        pairs = sorted(zip(widths.tolist(), counts.tolist(), strict=True), reverse=True)
        return [number for pair in pairs for number in pair]

    def bits_per_value(self) -> float:
        return 8 * hybrid_row_bytes(self.tiers(), self.per_token) / len(self.bits)

    def tensors(self) -> dict[str, Tensor]:
        """Return what an artifact stores."""
        # Artifacts keep the name that per-token scales had when the format was made: "rank1", and "rank-1" in a plan's
        # description (build_plan.describe).
        per_token = torch.tensor([self.per_token], dtype=torch.uint8)
        return {"scale": self.scale, "zero_point": self.zero_point, "bits": self.bits, "rank1": per_token}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Codec:
        """Build it from what `tensors` returns. Raises KeyError where one is missing."""
        per_token = bool(one_value("rank1", tensors))
        return cls(tensors["scale"], tensors["zero_point"], tensors["bits"], per_token)


class WireFormat(Float32QParams):
    """Encodes and decodes as a Codec says.

    Counts, on the device, values, those of them far from what was calibrated (beyond their static range, or 16 standard
    deviations away with per-token scales), and tokens that travel as NaN.
    """

    scale: Tensor  # float32 [senders, E]; inf for bf16
    zero_point: Tensor  # 0 for bf16
    order: Tensor  # int64 [E]
    tally: Tensor  # int64 [ranks, 3], by who encoded

    def __init__(self, codec: Codec, ranks: int | None = None):
        """Set up the buffers of a codec. ranks: that encode with it; None: the senders."""
        super().__init__()
        order = codec.order()
        self.per_token, self.tiers, self.senders = codec.per_token, codec.tiers(), codec.senders
        self.row_bytes = hybrid_row_bytes(self.tiers, self.per_token)
        bf16 = codec.bits == BF16_BITS
        self.register_buffer("scale", codec.scale.masked_fill(bf16, torch.inf), persistent=False)
        self.register_buffer("zero_point", codec.zero_point.masked_fill(bf16, 0.0), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("tally", torch.zeros(ranks or self.senders, 3, dtype=torch.int64), persistent=False)

    @property
    def can_saturate(self) -> bool:
        """Return whether any value is coded."""
        return any(bits != BF16_BITS for bits in self.tiers[::2])

    def of_all(self) -> Format:
        """Return how the messages of all senders are laid out."""
        return Format(self.scale, self.zero_point, self.order, self.tiers, self.per_token)

    def of_sender(self, sender: int) -> Format:
        """Return how those of one are."""
        return Format(self.scale[sender], self.zero_point[sender], self.order, self.tiers, self.per_token)

    def pack(self, x: Tensor, sender: int) -> Tensor:
        """Encode x float [tokens, E] -> uint8 [tokens, row_bytes]."""
        self._follow(x)
        if x.shape[-1] != len(self.order):
            raise LowBitError(
                f"a message of {x.shape[-1]} features, where the communication plan has {len(self.order)}: "
                "it belongs to another model; calibrate this one"
            )
        message, tally = hybrid_pack(x, *self.of_sender(sender))
        self.tally[sender].add_(tally)
        return message

    def unpack_reduce(self, messages: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode and sum uint8 [senders, tokens, row_bytes] -> the decoded sum [tokens, E]."""
        self._follow(messages)
        return hybrid_unpack_reduce(messages, self.of_all(), dtype)

    def unpack_reduce_into(self, messages: Tensor, out: Tensor) -> None:
        """Decode and sum uint8 [senders, tokens, row_bytes] into `out` [tokens, E]."""
        self._follow(messages)
        hybrid_unpack_reduce_into(messages, *self.of_all(), out)

    def requantize(self, messages: Tensor, second: WireFormat, rank: int = 0) -> Tensor:
        """Decode the messages of all senders, add them up, and return their sum as `rank` encodes it with `second`:
        uint8 [tokens, row_bytes]."""
        self._follow(messages)
        second._follow(messages)
        message, tally = hybrid_unpack_reduce_requantize(messages, *self.of_all(), *second.of_sender(0))
        second.tally[rank].add_(tally)
        return message

    def _follow(self, x: Tensor) -> None:
        if self.scale.device != x.device:  # plans are loaded on the CPU
            self.to(x.device)
