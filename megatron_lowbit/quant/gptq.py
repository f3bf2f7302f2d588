"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): the codes of a weight, rounded one input channel after another.

The output error of W^ is tr((W - W^) H (W - W^)^T) with H = sum of x^T x over the calibration tokens. Channels are
rounded by descending H_jj; the error of each is compensated by those that are still to come (eq. 3 and section 3.3):

    H^-1 = U^T U,  U upper triangular        w_j <- w_j - sum_(i < j) e_i U_ij        e_j = (w_j - w^_j) / U_jj

1 % of the mean of H's diagonal is added to the diagonal, so H may be singular. A channel whose input was always 0 has
no part in any sum and is rounded to nearest. Scales and zero points are given and stay: only codes change. Channels
are taken in blocks, so that most of the work is a matrix product: a weight of 4096 x 4096 takes half a minute of a CPU
core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.kernels.quantizer import dequantize, unclamped_codes

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
BLOCK = 128  # channels, as in the paper


@dataclass(frozen=True)
class InverseFactor:
    """Hold U of a Hessian, float64 [in, in], and the order in which the channels are rounded, int64 [in]."""

    upper: Tensor
    order: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> InverseFactor:
        """Factor the inverse of a Hessian, float64 [in, in], all finite."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        damped = hessian[order][:, order]
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        if not damped.diagonal()[0] > 0:  # no input but 0: every channel by itself
            damped.diagonal().fill_(1)
        # With the channels in reverse, H = L L^T gives U = L^-1 without inverting H: both are reversed once more.
        lower = torch.linalg.cholesky(damped.flip(0, 1))
        identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
        upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        return cls(upper, order)


@torch.no_grad()
def gptq_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, factor: InverseFactor) -> Tensor:
    """Return the codes of a weight [out, in] with scale and zero_point [out, groups]: uint8 [out, in]."""
    upper, order = factor.upper, factor.order
    inputs, groups = weight.shape[1], scale.shape[1]
    left = weight.double().T[order].contiguous()  # [in, out]: what is still to be rounded, a channel a row
    codes = torch.empty_like(weight.T, dtype=torch.uint8, memory_format=torch.contiguous_format)
    group_of = (order * groups // inputs).tolist()
    channels = order.tolist()
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            wanted = left[j] - upper[start:j, j] @ errors[: j - start]
            s, z = scale[:, group_of[j]], zero_point[:, group_of[j]]
            code = unclamped_codes(wanted, s, z).nan_to_num_(0.0).clamp_(0, 2**num_bits - 1).to(torch.uint8)
            codes[channels[j]] = code
            errors[j - start] = (wanted - dequantize(code[:, None], s[:, None], z[:, None])[:, 0]) / upper[j, j]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return codes.T.contiguous()
