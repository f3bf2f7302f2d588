"""The wire format of partial sums: how a token's values become bytes. What every backend computes, bit for bit.

One token row (arXiv 2411.07942; tiers of other widths and the token's own size are ours):

    [ header | tier 0 | tier 1 | ... ]     a tier: `count` features of `bits` each; 16 bits are bf16, fewer are codes

`order` lists the features in this order, `tiers` is [bits, count, bits, count, ...], and codes of a tier are packed as
in packing.py. The paper's format is two tiers, 16 and 4 bits.

Both schemes normalize a value by its feature's static qparams, v = x (1 / scale_f) + zero_f, and decode
x^ = (v^ - zero_f) scale_f; L = 2^b - 1 is a tier's largest code:

static     code = clamp(round(v)), v^ = code                    scale_f, zero_f: the feature's calibrated range
           header: none where a tier is bf16, which carries the NaN; else one byte, 1 for a token with NaN or Inf.
per-token  u = v (1 / s_t), w = u + clip(u, K); code = clamp(round(w (L / 2 a_b) + L / 2))
           w^ = (code - L / 2) (2 a_b / L), u^ = w^ - clip(w^ / 2, K), v^ = u^ s_t      clip(u, K) = clamp(u, -K, K)
           scale_f: the feature's calibrated standard deviation, zero_f: minus its mean over that; s_t: the token's
           own size, 2^(j / 8), so that a header of one byte, j + 128, says it. 0: s_t = 0; 255: a v is NaN or Inf.

The size s_t is the geometric mean of the largest |v| of every GROUP neighbouring features. The largest of all would
grow with their number and with every outlier: 4096 Gaussian values have 20.0 dB in 4 bits with the mean, 18.4 with the
largest; Laplacian ones 16.7 and 13.9. A lone large value still has its say: of n coded features s_t is at least the
largest |v| / (1 + n / 1280), about where clipping that one costs as much as the wider step costs all others. So a value
far beyond all calibrated ones takes the bits of its token's others; it alone counts as saturated.

Beyond K a step is twice as wide, since large values are rare: the slopes 2 and 1 of u -> w are all that is left of the
companding that is best for them. a_b = LOADING[b] is where the codes end. (K and a_b: of least error on partial sums of
two small Llamas, on Gaussian and Laplacian ones; the optimum is flat.)

Arithmetic is float32, multiplying by reciprocals, one operation at a time (no fused multiply-add), rounding half to
even, and a token's size is found in integers: so every backend makes the same codes and the same sums. A token that
holds NaN or Inf on any rank comes out as NaN in all its features, on every rank: its header says so or, where a static
format has none, its bf16 features, which are all sent as NaN then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lowbit.kernels.packing import packed_bytes

BF16_BITS = 16
LOADING = {2: 1.1, 3: 1.5, 4: 1.6, 5: 1.7, 6: 1.9, 7: 2.0, 8: 2.2}
KNEE = 0.6  # K, in a token's sizes
GROUP = 64  # features; the C++ kernels' blocks are as many
OCTAVE = 8  # scales of a token from one power of 2 to the next
BROKEN = 255  # header of a token that holds NaN or Inf
FAR = 16.0  # calibrated standard deviations, beyond which a value of a per-token tier counts as saturated

# Mantissa bits of the scales 2^(i / 8), and of the thresholds 2^((i + 1/2) / 8) between them.
MANTISSAS = [round((2 ** (i / OCTAVE) - 1) * 2**23) for i in range(OCTAVE)]
THRESHOLDS = [math.ceil((2 ** ((i + 0.5) / OCTAVE) - 1) * 2**23) for i in range(OCTAVE)]


class Format(NamedTuple):
    """The layout of the messages of one sender, or of N senders.

    scale, zero_point: float32 [E], or [N, E], in the features' own order, inf and 0 for those in bf16 (Triton relies on
    it); order: int64 [E], the features in wire order; tiers: bits, count, bits, count, ...; per_token: with a scale
    per token.
    """

    scale: Tensor
    zero_point: Tensor
    order: Tensor
    tiers: Sequence[int]
    per_token: bool

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one token on the wire."""
        return hybrid_row_bytes(self.tiers, self.per_token)

    @property
    def features(self) -> int:
        return self.order.shape[0]


def tier_slices(tiers: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Return (bits, first feature in wire order, number of features, first byte after the header, number of bytes)."""
    feature = byte = 0
    for bits, count in zip(tiers[::2], tiers[1::2], strict=True):
        size = 2 * count if bits == BF16_BITS else packed_bytes(count, bits)
        yield bits, feature, count, byte, size
        feature, byte = feature + count, byte + size


def header_bytes(tiers: Sequence[int], per_token: bool) -> int:
    """Return the bytes in front of every row."""
    return 1 if per_token or BF16_BITS not in tiers[::2] else 0


def code_span(bits: int) -> float:
    """Return 2 a_b / L: the step of a token's codes in w."""
    return 2 * LOADING[bits] / (2**bits - 1)


def headroom(coded: int) -> int:
    """Return 8 log2 of how many times s_t the largest |v| of so many coded features may be."""
    return math.floor(OCTAVE * math.log2(1 + coded / 1280))


def scale_header(largest: Tensor) -> Tensor:
    """Encode float32 max |v| -> uint8 header of the nearest scale (on a log axis): exact, from the bits of the
    float."""
    bits = largest.view(torch.int32)
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.int32, device=bits.device)
    eighth = ((bits & 0x7FFFFF).unsqueeze(-1) >= thresholds).sum(-1)
    header = (OCTAVE * ((bits >> 23) - 127) + eighth).clamp_(-127, 126) + 128
    header = torch.where(largest > 0, header, 0)
    return torch.where(torch.isfinite(largest), header, BROKEN).to(torch.uint8)


def token_header(size: Tensor, coded: int) -> Tensor:
    """Encode float32 |v| [tokens, E] in the features' own order, 0 for those in bf16 -> uint8 [tokens, 1], the header
    of s_t.

    Groups of zeros have no say. The mean of their headers is rounded half up.
    """
    groups = torch.nn.functional.pad(size, (0, -size.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).amax(2)
    header = scale_header(groups).int()
    largest, count = header.amax(1, keepdim=True), (header > 0).sum(1, keepdim=True)
    mean = (2 * header.sum(1, keepdim=True) + count) // (2 * count.clamp_min(1))
    return torch.where(largest == BROKEN, BROKEN, torch.maximum(mean, largest - headroom(coded))).to(torch.uint8)


def header_scale(header: Tensor) -> Tensor:
    """Decode uint8 -> float32 s_t; NaN for a broken token."""
    j = header.to(torch.int32) - 128
    mantissas = torch.tensor(MANTISSAS, dtype=torch.int32, device=header.device)
    scale = ((((j >> 3) + 127) << 23) | mantissas[(j & 7).long()]).view(torch.float32)
    return torch.where(header == 0, 0.0, torch.where(header == BROKEN, torch.nan, scale))


def squared_sizes(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return s_t^2 of tokens none of whose features is in bf16. x: float [tokens, E]; mean, std: [E]. float64
    [tokens]."""
    normed = torch.where(std > 0, (x - mean) / std, 0.0).float()
    return header_scale(token_header(normed.abs_(), x.shape[1])).double().square().squeeze(1)


def hybrid_row_bytes(tiers: Sequence[int], per_token: bool) -> int:
    """Return the bytes of one token on the wire."""
    return header_bytes(tiers, per_token) + sum(size for *_, size in tier_slices(tiers))
