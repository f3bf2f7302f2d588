"""The experts of a mixture of experts, quantized: what takes the place of a model's experts module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import QuantizedWeight


class QuantExperts(nn.Module):
    """Experts that a router has chosen: y[t] = sum_k p[t, k] * down_e(gate(up_e(x[t]))), e = choice k of token t.

    host: the experts module of transformers without its weights: its gate and its biases. up, down: the two projections
    of all experts, whose rows each expert has an equal share of. act_bits: of both projections' inputs; 16 leaves them
    as they are. Every token of every expert is rounded by itself, so a result does not depend on the batch.
    """

    def __init__(self, host: nn.Module, experts: int, up: QuantizedWeight, down: QuantizedWeight, act_bits: int):
        super().__init__()
        self.host = host
        self.up, self.down = (
            nn.ModuleList(QuantLinear(weight.shard_out(e, experts), None, act_bits) for e in range(experts))
            for weight in (up, down)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts' outputs, weighted and summed: [tokens, hidden] of hidden_states [tokens, hidden].

        top_k_index: int64 [tokens, k], the experts of each token; top_k_weights: [tokens, k], what they count.
        """
        choices = top_k_index.reshape(-1)
        order, counts = choices.argsort(stable=True), choices.bincount(minlength=len(self.up)).tolist()
        found = hidden_states.new_empty(len(choices), hidden_states.shape[-1])
        for expert, rows in enumerate(order.split(counts)):
            if len(rows):
                x = hidden_states[rows // top_k_index.shape[1]]
                found[rows] = self.expert(expert, x)
        weighted = found.view(*top_k_index.shape, hidden_states.shape[-1]) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """Compute one expert's output [tokens, hidden] of x [tokens, hidden]."""
        return self._project(self.down, "down_proj_bias", number, self.inner(number, x))

    def inner(self, number: int, x: Tensor) -> Tensor:
        """Compute what one expert's down projection reads: [tokens, inner] of x [tokens, hidden]."""
        host: Any = self.host
        bias = "gate_up_proj_bias" if host.has_gate else "up_proj_bias"
        y = self._project(self.up, bias, number, x)
        return host._apply_gate(y) if host.has_gate else host.act_fn(y)

    def _project(self, linears: nn.ModuleList, bias: str, number: int, x: Tensor) -> Tensor:
        y = linears[number](x)
        return y + getattr(self.host, bias)[number] if self.host.has_bias else y
