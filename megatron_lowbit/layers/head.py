"""A quantized output projection, and an embedding that looks its rows up in the same codes: one tensor for both.

On a CPU the linear puts its weight into the order of the kernels at its first forward (kernels/csrc/panels.h), and
keeps no rows. The lookup reads the few rows it needs out of that order: the codes lie in memory once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lowbit.kernels import dequantize, unpack_bits
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import QuantizedWeight

_PANEL, _GROUP, _STEP, _VECTOR = 64, 16, 16, 64  # outputs, outputs, inputs, bytes: as in panels.h


class QuantHead(QuantLinear):
    """An output projection: weight-only, one scale and zero point per row, and rows that can be looked up."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None):
        super().__init__(weight, bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows `ids` int64 [...] of the weight, dequantized: float32 [..., in_features].

        Raises IndexError for an id that the weight has no row for.
        """
        rows = ids.reshape(-1)
        scale, zero_point = self.scale.index_select(0, rows), self.zero_point.index_select(0, rows)
        if self._panels is None:
            codes = unpack_bits(self.packed_weight.index_select(0, rows), self.weight_bits, self.in_features)
        else:
            codes = panel_rows(self._panels, rows, self.out_features, self.in_features, self.weight_bits)
        return dequantize(codes, scale, zero_point).view(*ids.shape, self.in_features)


class QuantEmbedding(nn.Module):
    """The embedding of a model that ties it to its output projection: it reads the rows of `head`.

    dtype: of what it returns. The head is no submodule: state_dict() names its tensors once.
    """

    head: QuantHead
    like: Tensor  # empty, in the dtype and on the device of the result: .to() of a model changes both

    def __init__(self, head: QuantHead, dtype: torch.dtype):
        super().__init__()
        object.__setattr__(self, "head", head)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.head.out_features

    @property
    def embedding_dim(self) -> int:
        return self.head.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of int64 ids [...] -> [..., hidden]."""
        return self.head.lookup(ids.to(self.head.scale.device)).to(self.like)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.head.weight_bits}"


def panel_rows(panels: Tensor, rows: Tensor, outputs: int, inputs: int, num_bits: int) -> Tensor:
    """Return the codes uint8 [n, inputs] of single rows of a weight in panels of pairs, with one scale per row.

    panels: uint8 [bytes], as panels_of(..., blocks=1, pairs=True) makes them of [outputs, inputs]; rows: int64 [n].
    """
    stored = num_bits + num_bits % 2  # bits that a code takes
    count, steps = -(-outputs // _PANEL), -(-inputs // _STEP)
    bytes_of_step = _STEP * _PANEL // 8 * stored
    panel, group, lane = rows // _PANEL, rows % _PANEL // _GROUP, rows % _GROUP
    by_step = panels[: count * steps * bytes_of_step].view(count, steps, bytes_of_step)
    codes = torch.zeros((), dtype=torch.int32, device=panels.device)
    start = low = 0
    for bits in (4, 2) if stored == 6 else (stored,):
        vectors, size = bits // 2, bits // 2 * _VECTOR * _PANEL // _GROUP
        plane = by_step[..., start : start + size].view(count, steps, _PANEL // _GROUP, vectors, _GROUP, 2, 2)
        words = plane[panel, :, group, :, lane].int()  # [n, steps, vectors, even or odd input, low or high byte]
        words = words[..., 0] | words[..., 1] << 8
        shifts = torch.arange(0, 16, bits, device=panels.device, dtype=torch.int32)[:, None]
        codes = codes | ((words[..., None, :] >> shifts) & (2**bits - 1)).flatten(1) << low
        start, low = start + size, low + bits
    return codes.to(torch.uint8)[:, :inputs]
