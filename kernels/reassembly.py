"""Channel reassembly (QLLM, arXiv 2310.08041, eqs. 3 and 4) as one gather, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def reassemble(x: Tensor, src_idx: Tensor, dst_idx: Tensor, coefficient: Tensor, width: int) -> Tensor:
    """Compute x'_c = sum over entries e -> c of coefficient[e] * x[src_idx[e]] (QLLM, eqs. 3 and 4).

    x: float [..., in]; src_idx, dst_idx: int64 [entries]; coefficient: float32 [entries]. Entries 0 .. width-1 go to
    channels 0 .. width-1, so only those of merged groups have to be added. Float32 arithmetic (float64 for a float64
    x), in x's dtype; differentiable.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    coefficient = coefficient.to(exact)
    gathered = x.index_select(-1, src_idx[:width]).to(exact) * coefficient[:width]
    if len(src_idx) > width:
        merged = x.index_select(-1, src_idx[width:]).to(exact) * coefficient[width:]
        gathered = gathered.index_add(-1, dst_idx[width:], merged)
    return gathered.to(x.dtype)
