"""Channel reassembly as a module, and a norm that carries it out on its own output."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import reassemble
from megatron_lowbit.quant.affine import (
    Float32QParams,
)
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan


class Reassembly(Float32QParams):
    """x [..., in_features] -> x S [..., width]."""

    src_idx: Tensor
    dst_idx: Tensor
    coefficient: Tensor
    float32 = ("coefficient",)  # 1/T has to be exact

    def __init__(self, plan: ReassemblyPlan):
        super().__init__()
        self.in_features, self.width = plan.in_features, plan.width
        for name in ("src_idx", "dst_idx", "coefficient"):
            self.register_buffer(name, getattr(plan, name), persistent=False)

    def plan(self) -> ReassemblyPlan:
        return ReassemblyPlan(self.src_idx, self.dst_idx, self.coefficient, self.in_features, self.width)

    def forward(self, x: Tensor) -> Tensor:
        check_width(x, self.in_features)
        return reassemble(x, self.src_idx, self.dst_idx, self.coefficient, self.width)


class ReassembledNorm(Float32QParams):
    """A norm whose output arrives reassembled: [..., hidden] -> [..., width].

    For an RMSNorm the gain is folded into the plan's coefficients, n(h) (diag(gain) S), so both are one gather. Any
    other norm runs as it is, and the gather follows.
    """

    gain: Tensor | None
    float32 = ("gain",)

    def __init__(self, norm: nn.Module, plan: ReassemblyPlan):
        super().__init__()
        weight: Any = getattr(norm, "weight", None)
        if weight is not None and weight.shape[-1] != plan.in_features:
            raise LowBitError(
                f"a reassembly of {plan.in_features} channels after a norm of {weight.shape[-1]}: "
                "the checkpoint belongs to another model; quantize this one"
            )
        rms = rms_gain(norm)
        self.eps, self.offset, self.dtype = 0.0, 0.0, None if weight is None else weight.dtype
        if rms is not None:
            self.eps = rms[1]
            self.offset = round(
                (rms[0] - weight.detach().float()).mean().item()
            )  # 1: the norm multiplies by 1 + weight
        self.norm = norm if rms is None else None
        self.reassembly = Reassembly(plan)
        self.register_buffer("gain", None if rms is None else rms[0].float(), persistent=False)

    @property
    def weight(self) -> Any:
        """Return the gain as the norm held it: some blocks (Mamba's) ask for its dtype."""
        norm: Any = self.norm
        return norm.weight if self.gain is None else (self.gain - self.offset).to(self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.norm is not None or self.gain is None:
            assert self.norm is not None
            return self.reassembly(self.norm(hidden))
        plan = self.reassembly
        coefficient = plan.coefficient * self.gain[plan.src_idx]
        return reassemble(hidden, plan.src_idx, plan.dst_idx, coefficient, plan.width, self.eps)


def rms_gain(norm: nn.Module) -> tuple[Tensor, float] | None:
    """Return (gain float32, eps) of an RMSNorm, whether it multiplies by its weight or by 1 + weight (Gemma); None for
    others.

    Told by what the module computes in float32 for rows whose mean is not zero, not by its name.
    """
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if weight is None or weight.ndim != 1 or getattr(norm, "bias", None) is not None or not isinstance(eps, float):
        return None
    h = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device) + 3
    with torch.no_grad():
        actual = copy.deepcopy(norm).float()(h)
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        for gain in (weight.detach().float(), 1 + weight.detach().float()):
            if torch.allclose(actual, normed * gain, rtol=1e-4, atol=1e-6):
                return gain, eps
    return None


def check_width(x: Tensor, features: int) -> None:
    if x.shape[-1] != features:
        raise LowBitError(
            f"a linear or norm of the artifact reads {features} channels and was given {x.shape[-1]}: the artifact "
            "does not fit this model; quantize this one"
        )
