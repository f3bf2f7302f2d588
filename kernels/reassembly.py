"""Channel reassembly (QLLM, arXiv 2310.08041, eqs. 3 and 4) as one gather, after an RMS norm or without."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lowbit.kernels.ops import define, fake

NO_NORM = -1.0  # as eps


def reassemble_reference(
    x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float
) -> Tensor:
    """Compute x'_c = sum over entries e -> c of coefficient[e] * x[src_idx[e]] (QLLM, eqs. 3 and 4).

    x: float [..., in]; src_idx, dst_idx: int64 [entries]; coefficient: float32 [entries]. Entries 0 .. width-1 go to
    channels 0 .. width-1, so only those of merged groups have to be added. eps: x is x / sqrt(mean of x^2 + eps)
    first, the mean in float64; NO_NORM: x as it is. Float32 arithmetic (float64 for a float64 x), in x's dtype;
    differentiable.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    coefficient, values = coefficient.to(exact), x
    if eps != NO_NORM:
        factor = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).to(exact)
        values = x.to(exact) * factor
    gathered = values.index_select(-1, src_idx[:width]).to(exact) * coefficient[:width]
    if len(src_idx) > width:
        merged = values.index_select(-1, src_idx[width:]).to(exact) * coefficient[width:]
        gathered = gathered.index_add(-1, dst_idx[width:], merged)
    return gathered.to(x.dtype)


reassemble_op = define(
    "reassemble(Tensor x, Tensor src_idx, Tensor dst_idx, Tensor coefficient, int width, float eps) -> Tensor",
    reassemble_reference,
)


@fake(reassemble_op)
def _(x, src_idx, dst_idx, coefficient, width, eps):
    return x.new_empty((*x.shape[:-1], width))


def reassemble(
    x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int, eps: float = NO_NORM
) -> Tensor:
    """Compute reassemble_reference, by the kernel of the device where no gradient is asked for."""
    if torch.is_grad_enabled() and (x.requires_grad or coefficient.requires_grad):
        return reassemble_reference(x, src_idx, dst_idx, coefficient, width, eps)
    return reassemble_op(x, src_idx, dst_idx, coefficient, width, eps)
