"""Norms of a GPTModel: one that works under sequence parallelism, and one that reassembles its output."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.megatron import sharded_state
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan


class RMSNorm(nn.Module):
    """h [..., hidden] -> gain * h / rms(h), as Llama computes it: float32 inside, the gain in the weights' dtype.

    torch.nn.RMSNorm, which Megatron's local spec takes, refuses sequence parallelism; Apex and Transformer Engine need
    a GPU.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps, self.offset = eps, float(config.layernorm_zero_centered_gamma)  # 1: multiplies by 1 + weight
        self.weight = nn.Parameter(torch.full((hidden_size,), 1 - self.offset, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # sums its gradient

    def forward(self, hidden: Tensor) -> Tensor:
        h = hidden.float()
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight + self.offset) * normed.to(hidden.dtype)


class LowBitNorm(nn.Module):
    """A norm with the gain of an artifact, whose output arrives reassembled: [..., hidden] -> [..., width].

    plan: the identity where nothing is reassembled, so that all layers are stored alike.
    """

    def __init__(self, host: nn.Module, gain: Tensor, plan: ReassemblyPlan):
        super().__init__()
        self.norm: Any = copy.deepcopy(host)
        self.norm.weight = nn.Parameter(gain.clone(), requires_grad=False)
        self.set_plan(plan)

    def set_plan(self, plan: ReassemblyPlan) -> None:
        """Reassemble by this plan from now on, with the norm's present gain."""
        self.reassembled = None if plan.is_identity else ReassembledNorm(self.norm, plan.to(self.norm.weight.device))

    def plan(self) -> ReassemblyPlan:
        if self.reassembled is not None:
            return self.reassembled.reassembly.plan()
        return ReassemblyPlan.identity(len(self.norm.weight)).to(self.norm.weight.device)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.reassembled is None else self.reassembled(hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Return the gain under the norm's own key, and the plan (ReassemblyPlan.dense); the same on all ranks."""
        tensors = {"weight": self.norm.weight, **sharded_state.dense_tensors(self.plan())}
        return sharded_state.replicated(tensors, prefix, sharded_offsets, metadata, {"weight": "norm.weight"})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        plan = sharded_state.take_reassembly(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if plan is not None:
            weight = state_dict.get(f"{prefix}norm.weight")
            if weight is not None:
                self.norm.weight.data.copy_(weight)
            self.set_plan(plan)
