"""Which reassembly an input group gets: the candidate with the smallest error of the block's own output (QLLM, eq. 6).

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
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.comm.observers import as_windows
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.qllm.reassembly import ChannelStats, candidate_plans
from megatron_lowbit.qllm.shard_groups import ordered_sum
from megatron_lowbit.qllm.sharded_linear import ShardedLinear, prepare
from megatron_lowbit.quant.affine import Scheme, fake_quantize, fake_quantize_with, qparams_from_range
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan

Run = Callable[[], Iterator[tuple[Callable[[], Any], Tensor]]]  # (forward of the block on a batch, its mask), per batch


class _Stop(Exception):
    """Ends a block's forward where its rest would be computed for nobody."""


class Search:
    """What the choices for one block share. run(): an iterator over all calibration batches."""

    def __init__(
        self,
        block: nn.Module,
        run: Run,
        config: QuantizeConfig,
        attention_bits: int,
        tp_group: dist.ProcessGroup | None,
        dp_group: dist.ProcessGroup | None,
    ):
        self.block, self.run, self.config = block, run, config
        self.scheme = Scheme.parse(config.weights.scheme)
        self.attention_bits, self.tp_group, self.dp_group = attention_bits, tp_group, dp_group
        self.errors: tuple[float, float] | None = None  # of the last choice, and of no reassembly; None: not scored
        self.device = next(m for m in block.modules() if isinstance(m, ShardedLinear)).hp_weights[0].device

    @torch.no_grad()
    def choose(self, group: InputGroup) -> list[ReassemblyPlan]:
        """One plan for all inputs (column), or one for each of this rank's shards (row)."""
        return self.choose_and_describe(group)[0]

    @torch.no_grad()
    def choose_and_describe(self, group: InputGroup) -> tuple[list[ReassemblyPlan], dict[str, Any]]:
        """The plans, and what to tell of them: see `describe`."""
        linears = [self._linear(name) for name in group.linears]
        shards = len(linears[0].hp_weights) if group.kind == "row" else 1
        stats: list[ChannelStats] = []
        for x, mask, _ in self.inputs(group):
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
                raise LowBitError(f"{linears[0].name} is given NaN or Inf; check the model's weights and dtype")
        grams = self._weight_grams(linears, shards, stats[0].gram)
        candidates = [candidate_plans(s, g, self.config.reassembly) for s, g in zip(stats, grams, strict=True)]
        self.errors = None
        if group.kind == "column":
            plans = [self._best_for_columns(group, linears, candidates[0])]
        else:
            plans = self._best_for_rows(group, linears[0], candidates)
        return plans, describe(plans, [s.max_abs for s in stats], self.errors)

    def _weight_grams(self, linears: Sequence[ShardedLinear], shards: int, like: Tensor) -> list[Tensor]:
        """float64 Gram matrices of the weights' input channels, over all outputs that read them."""
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
    ) -> ReassemblyPlan:
        if len(plans) == 1:
            return plans[0]
        weights = [[self._candidate_weights(linear, plan) for linear in linears] for plan in plans]
        errors = torch.zeros(len(plans), dtype=torch.float64)
        for x, mask, again in self.inputs(group):
            target = again(x)[mask]
            for number, plan in enumerate(plans):
                with _quantized(self.block.get_submodule(group.owner), linears, weights[number], self.attention_bits):
                    output = again(prepare(x, plan, self.scheme.act_bits))
                errors[number] += (output[mask] - target).float().square().sum(dtype=torch.float64).cpu()
        best = self._smallest(errors)
        if plans[0].is_identity:
            self.errors = (errors[best].item(), errors[0].item())
        return plans[best]

    def _best_for_rows(
        self, group: InputGroup, linear: ShardedLinear, plans: list[list[ReassemblyPlan]]
    ) -> list[ReassemblyPlan]:
        if self.config.reassembly.mode == "fixed":
            return [candidates[0] for candidates in plans]
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
        for x, mask, _ in self.inputs(group):
            for s, x_s in enumerate(x.chunk(len(plans), -1)):
                x_s = x_s[mask]
                target = F.linear(x_s, linear.hp_weights[s].to(x.dtype))
                for number, plan in enumerate(plans[s]):
                    output = F.linear(prepare(x_s, plan, act_bits), weights[s][number].to(x.dtype))
                    errors[s][number] += (output - target).float().square().sum(dtype=torch.float64).cpu()
        chosen = [candidates[self._smallest(e, tp=False)] for candidates, e in zip(plans, errors, strict=True)]
        none = [ReassemblyPlan.identity(plan.in_features).to(plan.src_idx.device) for plan in chosen]
        return chosen if self._better_together(group, linear, chosen, none) else none

    def _better_together(
        self, group: InputGroup, linear: ShardedLinear, chosen: list[ReassemblyPlan], none: list[ReassemblyPlan]
    ) -> bool:
        """Whether the sum over shards, quantized as it will be deployed, is nearer with `chosen` than with `none`."""
        errors = torch.zeros(2, dtype=torch.float64)
        weights = [self._candidate_weights(linear, plans) for plans in (chosen, none)]
        for x, mask, _ in self.inputs(group):
            slices = [x_s[mask] for x_s in x.chunk(len(chosen), -1)]
            target = self._sum(slices, linear.hp_weights)
            for number, plans in enumerate((chosen, none)):
                prepared = [prepare(x_s, plan, self.scheme.act_bits) for x_s, plan in zip(slices, plans, strict=True)]
                output = self._sum(prepared, weights[number])
                errors[number] += (output - target).float().square().sum(dtype=torch.float64).cpu()
        better = self._smallest(errors, tp=False) == 0 and bool(errors[0] < errors[1])
        self.errors = (errors[0 if better else 1].item(), errors[1].item())
        return better

    def _sum(self, slices: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        parts = [F.linear(x_s, w.to(x_s.dtype)) for x_s, w in zip(slices, weights, strict=True)]
        return ordered_sum(parts, self.tp_group)

    def _candidate_weights(
        self, linear: ShardedLinear, plan: ReassemblyPlan | Sequence[ReassemblyPlan]
    ) -> list[Tensor]:
        """The linear's quantized weights under a plan, exactly as it would deploy them."""
        before = linear.hp_weights, linear.plans, linear._active, linear.quantized
        linear.set_plans([plan] if isinstance(plan, ReassemblyPlan) else plan)
        linear.quantize(self.scheme, self.config.weights)
        weights = [w.detach() for w in linear.effective_weights()]
        linear.hp_weights, linear.plans, linear._active, linear.quantized = before
        return weights

    def _rounded_within(self, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """A shard's quantized weight if the other shards' range is that of the original weight [out, 1]."""
        bits, group_size = self.scheme.weight_bits, self.config.weights.group_size
        if group_size is not None:
            return fake_quantize(weight, bits, self.config.weights.symmetric, group_size)
        low = torch.minimum(low, weight.amin(1, keepdim=True)).float()
        high = torch.maximum(high, weight.amax(1, keepdim=True)).float()
        return fake_quantize_with(weight, *qparams_from_range(low, high, bits, self.config.weights.symmetric), bits)

    def _smallest(self, errors: Tensor, tp: bool = True) -> int:
        """Index of the smallest error over all ranks' tokens (for tp, also their channels); the first of equals."""
        for group in (self.dp_group, self.tp_group if tp else None):
            if group is not None:
                moved = errors.to(self.device)
                dist.all_reduce(moved, group=group)
                errors.copy_(moved)
        return int(torch.where(errors.isfinite(), errors, torch.inf).argmin())

    def _linear(self, name: str) -> ShardedLinear:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, ShardedLinear)
        return linear

    def inputs(self, group: InputGroup) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """Per batch: what the group reads [windows, length, features], the mask, and again(x): the owner's forward on
        another x, up to what it hands to its row-parallel linear."""
        owner, row = self.block.get_submodule(group.owner), self.block.get_submodule(group.row)
        linears = [self.block.get_submodule(name) for name in group.linears]
        first = linears[0]
        call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        seen: list[Tensor] = []

        def stop_at(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.append((args, kwargs))

        def until(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
            handle = module.register_forward_pre_hook(stop_at)
            try:
                forward()
            except _Stop:
                pass
            finally:
                handle.remove()
            return seen.pop()

        for forward, mask in self.run():
            handle = owner.register_forward_pre_hook(remember, with_kwargs=True)
            try:
                given = until(first, forward)
            finally:
                handle.remove()
            args, kwargs = call.pop()

            def again(other: Tensor, args=args, kwargs=kwargs, given=given, forward=forward, mask=mask) -> Tensor:
                other = other.view(*given.shape[:-1], other.shape[-1])
                if any(value is given for value in (*args, *kwargs.values())):
                    swapped = tuple(other if value is given else value for value in args)
                    named = {name: other if value is given else value for name, value in kwargs.items()}
                    return as_windows(until(row, lambda: owner(*swapped, **named)), mask)
                # The owner makes their input itself: the block runs, and they are given the other one.
                handles = [linear.register_forward_pre_hook(lambda *_: (other,)) for linear in linears]
                try:
                    return as_windows(until(row, forward), mask)
                finally:
                    for handle in handles:
                        handle.remove()

            yield as_windows(given, mask), mask, again


def describe(
    plans: Sequence[ReassemblyPlan], max_abs: Sequence[Tensor], errors: tuple[float, float] | None
) -> dict[str, Any]:
    """Of one input's plans, over all its shards: threshold (the largest theta that splits so; None: nothing is split),
    splits (the largest T), added (channels), expansion (added / width), error (relative to that of no reassembly; None:
    not scored)."""
    counts = [torch.bincount(plan.src_idx, minlength=plan.in_features) for plan in plans]
    added = sum(int((count - 1).sum()) for count in counts)
    thresholds = [(m / count).max().item() for m, count in zip(max_abs, counts, strict=True) if (count > 1).any()]
    return {
        "threshold": max(thresholds, default=None),
        "splits": max(int(count.max()) for count in counts),
        "added": added,
        "expansion": added / sum(plan.in_features for plan in plans),
        "error": None if errors is None else errors[0] / errors[1] if errors[1] else 1.0,
    }


class _quantized:
    """Within: the linears of a column group compute with the given quantized weights on an input that is prepared."""

    def __init__(
        self, owner: nn.Module, linears: Sequence[ShardedLinear], weights: Sequence[list[Tensor]], attention_bits: int
    ):
        self.owner, self.linears, self.weights, self.bits = owner, linears, weights, attention_bits

    def __enter__(self) -> None:
        attention.set_bits([self.owner], self.bits)
        for linear, weights in zip(self.linears, self.weights, strict=True):
            linear._frozen = list(weights)

    def __exit__(self, *exc: object) -> None:
        attention.set_bits([self.owner], 16)
        for linear in self.linears:
            linear.unfreeze()
