"""Round the experts of a block, each for the tokens that the router sends it.

An expert's weights are clipped and rounded for its own tokens alone, as its linears read them: its inputs quantized,
and those of its down projection behind its rounded up projection. Sums over tokens are float64, window by window in
their order, whichever rank they were on (as in input_sums.py): the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface.experts import expert_weight, find_experts, projections, without_weights
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.layers.experts import QuantExperts
from megatron_lowbit.qllm.capture_inputs import arguments_of
from megatron_lowbit.qllm.input_sums import gram, squares
from megatron_lowbit.qllm.sharded_linear import prepare
from megatron_lowbit.quant.affine import QuantizedWeight, Scheme
from megatron_lowbit.quant.experts import round_expert, stack_experts
from megatron_lowbit.quant.gptq import InverseFactor
from megatron_lowbit.runtime.distributed import all_gather_stack

Forwards = Callable[[], Iterable[tuple[Callable[[], Any], Tensor]]]  # (forward of the block on a batch, its mask)


@torch.no_grad()
def round_experts(
    block: nn.Module, block_name: str, forwards: Forwards, config: WeightsConfig, dp_group: dist.ProcessGroup | None
) -> dict[str, QuantizedWeight]:
    """Put rounded experts into a block, in place of its own; return {name in the model: all experts' codes}.

    forwards(): as captured_inputs takes them, from the first again at every call. Raises LowBitError on all ranks for
    NaN or Inf in a weight or an input.
    """
    stored: dict[str, QuantizedWeight] = {}
    for name, module in find_experts(block).items():
        fqn, leaves, count = f"{block_name}.{name}", projections(module), len(module.down_proj)
        act_bits = Scheme.parse(config.experts).act_bits
        rounder = ExpertRounder(module, config, fqn, act_bits)

        def inputs(name=name, module=module) -> Iterator[tuple[Tensor, Tensor]]:
            return routed_windows(block.get_submodule(name), forwards(), dp_group)

        up = rounder.round(leaves[0], inputs(), lambda _, x: x)
        # What the down projection reads does not depend on its own weights: any stand in for them.
        half = QuantExperts(without_weights(module), count, up, rounder.to_nearest(leaves[1]), act_bits)
        down = rounder.round(leaves[1], inputs(), half.inner)
        block.set_submodule(name, QuantExperts(without_weights(module), count, up, down, act_bits))
        stored |= {f"{fqn}.{leaves[0]}": up, f"{fqn}.{leaves[1]}": down}
    return stored


class ExpertRounder:
    """Round the projections of one experts module. fqn: its name in the model; act_bits: of the experts' inputs."""

    def __init__(self, module: Any, config: WeightsConfig, fqn: str, act_bits: int):
        self.module, self.config, self.fqn, self.act_bits = module, config, fqn, act_bits

    def round(
        self, leaf: str, windows: Iterable[tuple[Tensor, Tensor]], read: Callable[[int, Tensor], Tensor]
    ) -> QuantizedWeight:
        """Round the projection `leaf` of all experts. windows: as routed_windows yields them; read(expert, its tokens)
        returns what the projection multiplies, before it is quantized."""
        gptq, mse = self.config.rounding == "gptq", self.config.clipping == "mse"
        if not gptq and not mse:
            return self.to_nearest(leaf)
        statistic = gram if gptq else squares
        weights = [self._weight(leaf, expert) for expert in range(len(self.module.down_proj))]
        width = weights[0].shape[1]
        shape = (width, width) if gptq else (width,)
        sums = [torch.zeros(shape, dtype=torch.float64, device=weights[0].device) for _ in weights]
        for x, choices in windows:
            for expert in choices.unique().tolist():
                if expert >= 0:  # -1: no real token
                    tokens = x[(choices == expert).any(1)]
                    sums[expert] += statistic(prepare(read(expert, tokens), None, self.act_bits))
        rounded = []
        for expert, (weight, total) in enumerate(zip(weights, sums, strict=True)):
            if not torch.isfinite(total).all():
                raise LowBitError(
                    f"{self.fqn}.{leaf}[{expert}] is given NaN or Inf; check the model's weights and dtype"
                )
            factor = InverseFactor.of(total) if gptq else None
            rounded.append(self._round(leaf, expert, weight, total.diagonal() if gptq else total, factor))
        return stack_experts(rounded)

    def to_nearest(self, leaf: str) -> QuantizedWeight:
        """Round the projection without its input."""
        experts = range(len(self.module.down_proj))
        return stack_experts([self._round(leaf, expert, self._weight(leaf, expert)) for expert in experts])

    def _weight(self, leaf: str, expert: int) -> Tensor:
        return expert_weight(self.module, leaf, expert).float().contiguous()

    def _round(
        self,
        leaf: str,
        expert: int,
        weight: Tensor,
        importance: Tensor | None = None,
        factor: InverseFactor | None = None,
    ) -> QuantizedWeight:
        return round_expert(weight, self.config, f"{self.fqn}.{leaf}[{expert}]", importance, factor)


def routed_windows(
    experts: nn.Module, forwards: Iterable[tuple[Callable[[], Any], Tensor]], dp_group: dist.ProcessGroup | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (what the experts read [tokens, hidden], the experts of each token int64 [tokens, k]) of every window of
    all ranks, in order; -1 in place of the experts of padding."""
    for forward, mask in forwards:
        x, choices = arguments_of(experts, forward)[:2]
        choices = choices.masked_fill(~mask.reshape(-1, 1).to(choices.device), -1)
        windows = zip(x.view(len(mask), -1, x.shape[-1]), choices.view(len(mask), -1, choices.shape[-1]), strict=True)
        for mine in windows:
            # Window i was on rank i % ranks.
            yield from zip(*(all_gather_stack(part.contiguous(), dp_group) for part in mine), strict=True)
