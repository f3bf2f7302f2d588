"""The output projection (lm_head) in low bits, and the embedding with it where the model ties the two.

Weight-only, rounded to nearest with a scale and a zero point per row, a token of the vocabulary. How much that costs is
measured when the artifact is made: the KL divergence of the next-token distribution, on the same hidden states h of
calibration text that the last block puts out,

    KL = mean_t sum_v p_t(v) log( p_t(v) / q_t(v) )        p = softmax(f(h W^T + b)),  q = softmax(f(h W^^T + b))

in nats per token; f is what the model does to its logits (a soft cap, a scale). On text that the model itself would
write, the logarithm of the perplexity rises by just this much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.tensors import check_tensor, short_repr
from megatron_lowbit.quant.affine import QuantizedWeight

if TYPE_CHECKING:
    from megatron_lowbit.quant.checkpoint import LowBitCheckpoint

# Nats per token: a perplexity 1 % higher. Blocks in W4A8 cost several times as much (0.06 on the embedded model), so a
# projection below this is not what limits a model; 8 bits are a hundred times below it.
KL_LIMIT = 0.01
KL_WINDOWS, KL_LENGTH = 8, 256  # it is a mean over the first tokens of a few windows
_ROWS = 2**14  # of a weight that are in float32 at once

Texts = Iterable[tuple[Tensor, Tensor]]  # (ids int64 [1, length], mask bool [1, length], True on real tokens)


@dataclass(frozen=True)
class QuantizedHead:
    """A quantized output projection.

    weight: in codes; name: the linear's in the Hugging Face model; embedding: the name of the embedding that is the
    same weight, None where it has its own; kl: what the rounding costs, in nats per token, over `tokens` tokens.
    """

    weight: QuantizedWeight
    name: str
    embedding: str | None
    kl: float
    tokens: int

    __repr__ = short_repr

    @property
    def replaced(self) -> set[str]:
        """Return the names of the model's tensors that the codes stand for."""
        return {f"{name}.weight" for name in (self.name, self.embedding) if name is not None}

    @property
    def nbytes(self) -> int:
        """Return the bytes of the codes, scales and zero points."""
        return self.weight.packed_weight.nbytes + self.weight.scale.nbytes + self.weight.zero_point.nbytes

    def describe(self) -> dict[str, Any]:
        """Return what lowbit.json says of it."""
        return {
            "name": self.name,
            "embedding": self.embedding,
            "bits": self.weight.num_bits,
            "in_features": self.weight.in_features,
            "kl": self.kl,
            "tokens": self.tokens,
        }

    def __str__(self) -> str:
        both = f"{self.name} and the embedding" if self.embedding else self.name
        return f"{both} in {self.weight.num_bits} bits (KL {self.kl:.2g} nats per token)"

    @classmethod
    def read(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedHead:
        """Return the head that `describe` wrote down, with its tensors. Raises ValueError where they do not fit."""
        weight = QuantizedWeight(**tensors, num_bits=about["bits"], in_features=about["in_features"])
        weight.validate(about["name"])
        check_tensor(f"{about['name']}.scale", weight.scale, torch.float32, (len(weight.packed_weight), 1))
        return cls(weight, about["name"], about["embedding"], about["kl"], about["tokens"])


def attach_head(checkpoint: LowBitCheckpoint, head: QuantizedHead, bit_sum: int) -> LowBitCheckpoint:
    """Return the checkpoint with the head in place of the full-precision tensors. bit_sum: of its weight, by which
    the artifact knows its model."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in head.replaced}
    weights = {**checkpoint.fingerprint["weights"], head.name: bit_sum}
    return replace(checkpoint, tensors=tensors, fingerprint={**checkpoint.fingerprint, "weights": weights}, head=head)


def make_head(
    name: str,
    embedding: str | None,
    linear: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    texts: Texts,
    run: Callable[[Tensor], Tensor],
) -> QuantizedHead:
    """Round the output projection `name` to nearest and measure what that costs.

    linear: the module that stands for it in the model; weight [vocab, hidden], bias [vocab]: its own, full-precision
    ones. run(ids [1, length]) returns the model's logits [1, length, vocab] and calls `linear` on the way. Raises
    LowBitError where the KL is above KL_LIMIT, and for a model that does not use the module.
    """
    quantized = QuantizedWeight.from_float(weight, bits, name=f"{name}.weight")
    return judge(quantized, name, embedding, measure_kl(linear, weight, quantized, bias, texts, run))


def judge(
    quantized: QuantizedWeight, name: str, embedding: str | None, parts: Sequence[tuple[float, int]]
) -> QuantizedHead:
    """Return the head, whose KL divergence the parts add up to: (its sum, tokens) of each text, in their order.

    Raises LowBitError where it is above KL_LIMIT.
    """
    tokens = sum(count for _, count in parts)
    kl = max(sum(total for total, _ in parts) / tokens, 0.0)  # equal distributions: a rounding may leave -1e-18
    if not kl <= KL_LIMIT:
        more = "raise it to 8, or leave it out" if quantized.num_bits < 8 else "leave it out"
        raise LowBitError(
            f"weights.lm_head_bits={quantized.num_bits} costs a KL divergence of {kl:.3g} nats per token, above the "
            f"limit of {KL_LIMIT}; {more}"
        )
    return QuantizedHead(quantized, name, embedding, kl, tokens)


@torch.no_grad()
def measure_kl(
    linear: nn.Module,
    weight: Tensor,
    quantized: QuantizedWeight,
    bias: Tensor | None,
    texts: Texts,
    run: Callable[[Tensor], Tensor],
) -> list[tuple[float, int]]:
    """Return (KL in nats, summed over its tokens; tokens) of each text, of `quantized` against `weight`.

    The other arguments are as of make_head. Both heads are computed in float32 on the hidden states that `linear` is
    given, and go on through the model as two windows of one batch. The sums are float64.
    """

    def both(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0].float()
        rounded = _multiply(hidden, lambda rows: _rows(quantized, rows).dequantize(), len(weight), bias)
        return torch.cat([_multiply(hidden, lambda rows: weight[rows], len(weight), bias), rounded])

    parts = []
    handle = linear.register_forward_hook(both)
    try:
        for ids, mask in texts:
            logits = run(ids)
            if len(logits) != 2 * len(ids):
                raise LowBitError(
                    "weights.lm_head_bits: the model does not compute its logits with its output projection alone; "
                    "leave it out"
                )
            real, total = mask[0].to(logits.device), 0.0
            for p, q in zip(*(window[real].split(64) for window in logits), strict=True):  # 64 tokens in float64
                full, rounded = p.double().log_softmax(-1), q.double().log_softmax(-1)
                total += (full.exp() * (full - rounded)).sum().item()
            parts.append((total, int(real.sum())))
    finally:
        handle.remove()
    return parts


def first_tokens(ids: Tensor, mask: Tensor) -> Texts:
    """Return the first tokens of the first windows, one by one. ids, mask: [windows, length]; padding is at the end."""
    return [(ids[w : w + 1, :KL_LENGTH], mask[w : w + 1, :KL_LENGTH]) for w in range(min(KL_WINDOWS, len(ids)))]


def _multiply(hidden: Tensor, rows: Callable[[slice], Tensor], outputs: int, bias: Tensor | None) -> Tensor:
    """Compute hidden W^T + bias in float32, some rows of W after others: rows(slice) returns them in any dtype."""
    parts = [slice(start, min(start + _ROWS, outputs)) for start in range(0, outputs, _ROWS)]
    y = torch.cat([F.linear(hidden, rows(part).to(hidden.device, torch.float32)) for part in parts], -1)
    return y if bias is None else y + bias.to(hidden.device, torch.float32)


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    tensors = weight.packed_weight[rows], weight.scale[rows], weight.zero_point[rows]
    return QuantizedWeight(*tensors, weight.num_bits, weight.in_features)
