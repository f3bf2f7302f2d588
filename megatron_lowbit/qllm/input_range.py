"""The quantizer of one site's activations while a model is quantized: per token, in a range that may be trained.

    low = a min x      high = b max x      a, b: of the site; sigmoids of two logits while they are trained

A site's ratios have a gradient from every shard and every head. Shards' are added up in their order (shard_groups.py);
those of heads, whose number on a rank depends on the ranks, are summed in float64 head by head, then in the order of
the heads: the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.qllm.shard_groups import replicate
from megatron_lowbit.quant.affine import fake_quantize, value_range
from megatron_lowbit.quant.input_clipping import WHOLE, Clip, as_clip
from megatron_lowbit.quant.learned_clipping import FIRST_LOGIT, fake_quantize_trained, qparams_of_trained
from megatron_lowbit.runtime.distributed import all_gather_stack


class InputRange(nn.Module):
    """Quantize x [..., features] to act_bits per token; 16: leave it as it is. clip: the site's ratios."""

    def __init__(self, act_bits: int):
        super().__init__()
        self.act_bits = act_bits
        self.clip: Clip = WHOLE
        self.logits: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._quantize(x, self.logits)

    def for_shards(self, count: int, tp_group: dist.ProcessGroup | None) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return the quantizers of this rank's `count` shards of the input."""
        if self.logits is None:
            return [self] * count
        return [partial(self._quantize, logits=logits) for logits in replicate(self.logits, count, tp_group)]

    def train_from(self, device: torch.device) -> nn.Parameter:
        """Create the logits [2], which forward reads from now on, and return them."""
        self.logits = nn.Parameter(torch.full((2,), FIRST_LOGIT, device=device))
        return self.logits

    def settle(self) -> None:
        """Take what was trained for the site's ratios."""
        if self.logits is not None:
            low, high = self.logits.detach().sigmoid().tolist()
            self.clip, self.logits = as_clip(low, high), None

    def _quantize(self, x: Tensor, logits: Tensor | None) -> Tensor:
        if self.act_bits == 16:
            return x
        if logits is None:
            return fake_quantize(x, self.act_bits, clip=self.clip)
        with torch.no_grad():
            low, high = value_range(x)
        qparams = qparams_of_trained(*self._ends(low, high, logits.sigmoid()), self.act_bits)
        return fake_quantize_trained(x, *qparams, self.act_bits)

    def _ends(self, low: Tensor, high: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
        return low * ratios[0], high * ratios[1]


class HeadRange(InputRange):
    """Quantize Q, K or V, [windows, heads of this rank, tokens, features], per token and head."""

    def __init__(self, act_bits: int, tp_group: dist.ProcessGroup | None):
        super().__init__(act_bits)
        self.tp_group = tp_group

    def _ends(self, low: Tensor, high: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
        return _EndsOfHeads.apply(low, high, ratios, self.tp_group)


class _EndsOfHeads(torch.autograd.Function):
    """Multiply low, high [windows, heads, tokens, 1] by two ratios, whose gradient is that of all ranks' heads."""

    @staticmethod
    def forward(ctx, low: Tensor, high: Tensor, ratios: Tensor, group: dist.ProcessGroup | None):  # type: ignore[override]
        ctx.save_for_backward(low, high)
        ctx.group = group
        return low * ratios[0], high * ratios[1]

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        of_heads = torch.stack(
            [
                (grad.double() * end.double()).transpose(0, 1).flatten(1).contiguous().sum(1)
                for grad, end in zip(grads, ctx.saved_tensors, strict=True)
            ]
        )  # [2, heads of this rank]
        whole = torch.cat(list(all_gather_stack(of_heads, ctx.group).unbind(0)), 1)
        total = torch.zeros_like(whole[:, 0])
        for head in whole.unbind(1):
            total = total + head
        return None, None, total.float(), None
