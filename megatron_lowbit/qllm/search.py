"""Choose an input group's reassembly: the candidate with the smallest error of the block's own output (QLLM, eq. 6).

    column-parallel (q/k/v, gate/up)   error of what the owner hands to its row-parallel linear: the attention's output
                                       before o_proj, SiLU(gate) up before down_proj
    row-parallel (down, o)             error of the partial sums, shard by shard; then of their sum

The target is the full-precision owner on the same input. A candidate is scored as it would be deployed: split, then
merged, then quantized, with Q, K and V quantized where they will be; and the identity is one of the candidates. For
a row-parallel weight, whose scale spans all shards, the shards' choices are confirmed together: where their joint
error is not below that of no reassembly, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.qllm.capture_inputs import OwnerForward, captured_inputs
from megatron_lowbit.qllm.reassembly import ChannelStats, candidate_plans
from megatron_lowbit.qllm.shard_groups import ordered_sum
from megatron_lowbit.qllm.sharded_linear import ShardedLinear, prepare
from megatron_lowbit.quant.affine import Scheme, fake_quantize, fake_quantize_with, qparams_from_range
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

Forwards = Callable[[], Iterator[tuple[Callable[[], Any], Tensor]]]
Errors = tuple[float, float] | None  # of the choice, and of no reassembly; None: not scored
Tried = list[tuple[int, float]]  # (channels added, squared error) of every candidate
WIDEST = 8  # channels whose largest |x| is kept, before and after reassembly


class Choice(NamedTuple):
    """Hold one plan for all inputs (column) or one per shard of this rank (row), what `describe` says of it, and its
    squared error (None: not scored)."""

    plans: list[ReassemblyPlan]
    description: dict[str, Any]
    error: float | None


class Search:
    """Choose the reassembly of every input group of one block.

    forwards(): an iterator over all calibration batches, of (forward of the block, mask bool [windows, length]).
    attention_bits: of Q, K and V, as deployed.
    """

    def __init__(
        self,
        block: nn.Module,
        forwards: Forwards,
        config: QuantizeConfig,
        attention_bits: int,
        tp_group: dist.ProcessGroup | None,
        dp_group: dist.ProcessGroup | None,
    ):
        self.block, self.forwards, self.config = block, forwards, config
        self.scheme = Scheme(16, 16)  # of the group at hand
        self.attention_bits, self.tp_group, self.dp_group = attention_bits, tp_group, dp_group
        self.device = next(m for m in block.modules() if isinstance(m, ShardedLinear)).hp_weights[0].device

    @torch.no_grad()
    def choose(self, group: InputGroup, scheme: Scheme) -> Choice:
        """Return the plans of the smallest error under `scheme`. Raises LowBitError where the input has NaN or Inf on
        any rank."""
        self.scheme = scheme
        linears = [self._linear(name) for name in group.linears]
        stats = self._channel_stats(group, linears[0])
        grams = self._weight_grams(linears, stats[0].gram)
        candidates = [candidate_plans(s, g, self.config.reassembly) for s, g in zip(stats, grams, strict=True)]
        errors: Errors
        if group.kind == "column":
            plan, errors, tried = self._best_for_columns(group, linears, candidates[0])
            plans = [plan]
        else:
            plans, errors, tried = self._best_for_rows(group, linears[0], candidates)
        description = describe(plans, [s.max_abs for s in stats], errors, tried)
        return Choice(plans, description, None if errors is None else errors[0])

    def _channel_stats(self, group: InputGroup, linear: ShardedLinear) -> list[ChannelStats]:
        """Return statistics of the input's channels over all ranks' tokens: of all (column), or of each shard (row).

        linear: the first of the group.
        """
        shards = len(linear.hp_weights) if group.kind == "row" else 1
        stats: list[ChannelStats] = []
        for x, mask, _ in self._inputs(group):
            for s, x_s in enumerate(x.chunk(shards, -1)):
                if len(stats) == s:
                    stats.append(ChannelStats(x_s.shape[-1], x.device))
                for window, real in zip(x_s, mask, strict=True):
                    stats[s].update(window[real])
        for shard_stats in stats:
            shard_stats.all_reduce(self.dp_group)
            finite = torch.isfinite(shard_stats.max_abs).all().to(torch.int32)
            if self.tp_group is not None:  # all ranks have to leave together
                dist.all_reduce(finite, dist.ReduceOp.MIN, self.tp_group)
            if not finite:
                raise LowBitError(f"{linear.name} is given NaN or Inf; check the model's weights and dtype")
        return stats

    def _weight_grams(self, linears: Sequence[ShardedLinear], like: Tensor) -> list[Tensor]:
        """Return float64 Gram matrices of the weights' input channels, over all outputs that read them."""
        if linears[0].kind == "row":
            return [(w.T @ w).to(like) for w in linears[0].hp_weights]
        gram = torch.zeros_like(like)
        for linear in linears:
            for w in linear.hp_weights:
                gram += w.T @ w
        if self.tp_group is not None:
            dist.all_reduce(gram, group=self.tp_group)
        return [gram]

    def _best_for_columns(
        self, group: InputGroup, linears: Sequence[ShardedLinear], plans: list[ReassemblyPlan]
    ) -> tuple[ReassemblyPlan, Errors, Tried]:
        if len(plans) == 1:
            return plans[0], None, []
        owner = self.block.get_submodule(group.owner)
        weights = [[self._candidate_weights(linear, [plan]) for linear in linears] for plan in plans]
        errors = torch.zeros(len(plans), dtype=torch.float64)
        for x, mask, owner_forward in self._inputs(group):
            target = owner_forward(x)[mask]
            for number, plan in enumerate(plans):
                with quantized_owner(owner, linears, weights[number], self.attention_bits):
                    output = owner_forward(prepare(x, plan, self.scheme.act_bits))
                errors[number] += (output[mask] - target).float().square().sum(dtype=torch.float64).cpu()
        best = self._smallest(errors)
        tried = [(added_by(plan), error) for plan, error in zip(plans, errors.tolist(), strict=True)]
        return plans[best], (errors[best].item(), errors[0].item()) if plans[0].is_identity else None, tried

    def _best_for_rows(
        self, group: InputGroup, linear: ShardedLinear, plans: list[list[ReassemblyPlan]]
    ) -> tuple[list[ReassemblyPlan], Errors, Tried]:
        if self.config.reassembly.mode == "fixed":
            return [candidates[0] for candidates in plans], None, []
        low = torch.stack([w.amin(1, keepdim=True) for w in linear.hp_weights]).amin(0)
        high = torch.stack([w.amax(1, keepdim=True) for w in linear.hp_weights]).amax(0)
        if self.tp_group is not None:
            dist.all_reduce(low, dist.ReduceOp.MIN, self.tp_group)
            dist.all_reduce(high, dist.ReduceOp.MAX, self.tp_group)
        weights = []
        for w, candidates in zip(linear.hp_weights, plans, strict=True):
            reassembled = [plan.weights(w) for plan in candidates]
            weights.append([self._rounded_within(r, low, high) for r in reassembled])
        errors = [torch.zeros(len(candidates), dtype=torch.float64) for candidates in plans]
        act_bits = self.scheme.act_bits
        for x, mask, _ in self._inputs(group):
            for s, x_s in enumerate(x.chunk(len(plans), -1)):
                x_s = x_s[mask]
                target = F.linear(x_s, linear.hp_weights[s].to(x.dtype))
                for number, plan in enumerate(plans[s]):
                    output = F.linear(prepare(x_s, plan, act_bits), weights[s][number].to(x.dtype))
                    errors[s][number] += (output - target).float().square().sum(dtype=torch.float64).cpu()
        chosen = [candidates[self._smallest(e, tp=False)] for candidates, e in zip(plans, errors, strict=True)]
        none = [ReassemblyPlan.identity(plan.in_features).to(plan.src_idx.device) for plan in chosen]
        better, together, of_none = self._better_together(group, linear, chosen, none)
        # The joint error is known of two candidates: of the shards' choices together, and of none.
        tried = [(sum(map(added_by, chosen)), together), (0, of_none)]
        return (chosen, (together, of_none), tried) if better else (none, (of_none, of_none), tried)

    def _better_together(
        self, group: InputGroup, linear: ShardedLinear, chosen: list[ReassemblyPlan], none: list[ReassemblyPlan]
    ) -> tuple[bool, float, float]:
        """Tell whether the sum over shards, as deployed, is nearer with `chosen` than with `none`; and both errors."""
        errors = torch.zeros(2, dtype=torch.float64)
        weights = [self._candidate_weights(linear, plans) for plans in (chosen, none)]
        for x, mask, _ in self._inputs(group):
            slices = [x_s[mask] for x_s in x.chunk(len(chosen), -1)]
            target = self._sum(slices, linear.hp_weights)
            for number, plans in enumerate((chosen, none)):
                prepared = [prepare(x_s, plan, self.scheme.act_bits) for x_s, plan in zip(slices, plans, strict=True)]
                output = self._sum(prepared, weights[number])
                errors[number] += (output - target).float().square().sum(dtype=torch.float64).cpu()
        better = self._smallest(errors, tp=False) == 0 and bool(errors[0] < errors[1])
        return better, errors[0].item(), errors[1].item()

    def _sum(self, slices: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        parts = [F.linear(x_s, w.to(x_s.dtype)) for x_s, w in zip(slices, weights, strict=True)]
        return ordered_sum(parts, self.tp_group)

    def _candidate_weights(self, linear: ShardedLinear, plans: Sequence[ReassemblyPlan]) -> list[Tensor]:
        """Return the linear's weights as it would deploy them under one plan (column) or one per shard (row)."""
        return linear.weights_under(plans, self.scheme, self.config.weights)

    def _rounded_within(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return a shard's quantized weight if the other shards' range is that of the original weight [out, 1]."""
        bits, how = self.scheme.weight_bits, self.config.weights
        if how.group_size is not None:
            return fake_quantize(weight, bits, how.symmetric, how.group_size, real_zero=how.real_zero)
        low = torch.minimum(low, weight.amin(1, keepdim=True)).float()
        high = torch.maximum(high, weight.amax(1, keepdim=True)).float()
        return fake_quantize_with(weight, *qparams_from_range(low, high, bits, how.symmetric, how.real_zero), bits)

    def _smallest(self, errors: Tensor, tp: bool = True) -> int:
        """Return the first smallest error's index, over all ranks' tokens (and, for tp, their channels)."""
        for group in (self.dp_group, self.tp_group if tp else None):
            if group is not None:
                on_device = errors.to(self.device)
                dist.all_reduce(on_device, group=group)
                errors.copy_(on_device)
        return int(torch.where(errors.isfinite(), errors, torch.inf).argmin())

    def _linear(self, name: str) -> ShardedLinear:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, ShardedLinear)
        return linear

    def _inputs(self, group: InputGroup) -> Iterator[tuple[Tensor, Tensor, OwnerForward]]:
        return captured_inputs(self.block, group, self.forwards())


def added_by(plan: ReassemblyPlan) -> int:
    """Return the channels that a plan adds by splitting."""
    return int((torch.bincount(plan.src_idx, minlength=plan.in_features) - 1).sum())


def describe(
    plans: Sequence[ReassemblyPlan], max_abs: Sequence[Tensor], errors: Errors, tried: Tried
) -> dict[str, Any]:
    """Return what one input's plans do, over all its shards.

    max_abs: of every plan's channels, float32 [channels]. Keys: threshold (the largest theta that splits so; None:
    nothing is split), splits (the largest T), added (channels), expansion (added / width), error (relative to that of
    no reassembly; None: not scored), search ([added, error relative to that of no reassembly] of every candidate, by
    what it adds), widest_before and widest_after (the largest |x| of the WIDEST channels, descending; after, of a
    merged channel, the mean of its channels' largest, which it cannot exceed), median_before (of all channels).
    """
    counts = [torch.bincount(plan.src_idx, minlength=plan.in_features) for plan in plans]
    added = sum(map(added_by, plans))
    thresholds = [(m / count).max().item() for m, count in zip(max_abs, counts, strict=True) if (count > 1).any()]
    return {
        "threshold": max(thresholds, default=None),
        "splits": max(int(count.max()) for count in counts),
        "added": added,
        "expansion": added / sum(plan.in_features for plan in plans),
        "error": None if errors is None else errors[0] / errors[1] if errors[1] else 1.0,
        "search": [[count, error / errors[1]] for count, error in sorted(tried)] if errors and errors[1] else [],
        "widest_before": _widest(max_abs),
        "widest_after": _widest([plan.activations(m) for plan, m in zip(plans, max_abs, strict=True)]),
        "median_before": torch.cat(list(max_abs)).median().item(),
    }


def _widest(max_abs: Sequence[Tensor]) -> list[float]:
    """Return the largest values of all shards, to four digits: they are looked at, not computed with."""
    values = torch.cat(list(max_abs))
    return [float(f"{value:.4g}") for value in values.topk(min(WIDEST, len(values))).values.tolist()]


def word(rotated: bool, reassembled: bool) -> str:
    """Return what was done to an input group before it is rounded: rotate, reassemble, both or none."""
    return ("both" if reassembled else "rotate") if rotated else ("reassemble" if reassembled else "none")


@contextmanager
def quantized_owner(
    owner: nn.Module, linears: Sequence[ShardedLinear], weights: Sequence[list[Tensor]], attention_bits: int
) -> Iterator[None]:
    """Have the owner of a column group compute with the given weights, and Q, K and V quantized, inside the context."""
    attention.set_bits([owner], attention_bits)
    for linear, shards in zip(linears, weights, strict=True):
        linear.freeze(shards)
    try:
        yield
    finally:
        attention.set_bits([owner], 16)
        for linear in linears:
            linear.unfreeze()
