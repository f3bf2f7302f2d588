"""A tensor-parallel linear while it is being quantized: this rank's shards, in full precision or fake-quantized.

    full precision   y = x W^T
    quantized        y = Q(x S) Q(R W + B A)^T                 merged correction (QLLM, arXiv 2310.08041, eq. 8), or
                     y = Q(x S) Q(R W)^T + Q(x S) A^T B^T      branch

lora_a [rank, in], lora_b [out, rank] are the factors over all shards; for a column-parallel linear A is shared and B is
cut along the outputs, for a row-parallel one A is cut along the inputs and B is shared (`replicate` sums its gradient).
The rounding Q passes the gradient straight through, so what is trained is what is deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.comm.virtual import VirtualReducer
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.kernels import pack_bits
from megatron_lowbit.qllm.input_range import InputRange
from megatron_lowbit.qllm.shard_groups import gather_shards, ordered_sum, partial_sums, replicate
from megatron_lowbit.quant.affine import (
    LowRank,
    QuantizedWeight,
    Scheme,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    qparams_from_range,
    quantize,
    value_range,
)
from megatron_lowbit.quant.clipping import best_ratios
from megatron_lowbit.quant.gptq import InverseFactor, gptq_codes
from megatron_lowbit.quant.learned_clipping import FIRST_LOGIT, fake_quantize_trained, qparams_of_trained
from megatron_lowbit.quant.range_gradient import scale_of, through_ranges
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.runtime.distributed import all_gather_stack, all_gather_values, group_rank, world_size

Kind = Literal["column", "row"]
Ratios = tuple[Tensor, Tensor]  # of the lower and the upper end of ranges, each [out, groups]


Codes = list[tuple[Tensor, Tensor, Tensor]]  # of each shard, with scale and zero point


class ShardedLinear(nn.Module):
    """Compute y = x W^T of this rank's shards.

    name: its fqn; weights: float32 shards [out / G, in] (column) or [out, in / G] (row), which take no gradients.
    It computes in full precision until `quantized` is set. The input of a column-parallel one arrives reassembled and
    quantized where `prepared` is set (its norm did it).
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        tp_group: dist.ProcessGroup | None,
    ):
        super().__init__()
        self.name, self.kind, self.tp_group = name, kind, tp_group
        self.hp_weights = list(weights)  # R W once a plan is set
        self.bias = bias
        self.scheme = Scheme(16, 16)
        self.config = WeightsConfig()
        self.quantized = self.prepared = False
        self.range = InputRange(16)  # quantizes the input; shared by the linears that read the same
        self.plans: list[ReassemblyPlan] | None = None  # of each shard's inputs (row), or one of all inputs (column)
        self.reducer: VirtualReducer | None = None
        self.input_rotation: Any = None  # the hook that rotates the input of all shards (rotation.py)
        self.observer: Callable[[Sequence[Tensor]], None] | None = None  # sees the partial sums of all shards (row)
        self.lora_shared: nn.Parameter | None = None
        self.lora_shards: nn.ParameterList | None = None
        self.branch = False
        self.ratios: list[Ratios] | None = None  # of each shard's range to that of its weights (clipping.py)
        self.clip_logits: nn.ParameterList | None = None  # of ratios that are trained (learned_clipping.py)
        self._active: list[ReassemblyPlan | None] = []  # the plans that do anything
        self._codes: Codes | None = None
        self._frozen: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.effective_weights()
        inputs: Sequence[Tensor] = self.prepared_inputs(x)
        if self.kind == "column":
            inputs = replicate(inputs[0], len(weights), self.tp_group)
        parts = [F.linear(x_s, w_s.to(x.dtype)) for x_s, w_s in zip(inputs, weights, strict=True)]
        if self.quantized and self.branch:
            parts = [y + low for y, low in zip(parts, self._branch(inputs), strict=True)]
        if self.kind == "row":
            y = self._reduce(gather_shards(parts, self.tp_group))
            return y if self.bias is None else y + self.bias
        if self.bias is not None:  # shard by shard: its gradient is a sum over tokens, whose bits depend on the width
            parts = [y_s + b_s for y_s, b_s in zip(parts, self.bias.chunk(len(parts)), strict=True)]
        return torch.cat(parts, -1)

    def prepared_inputs(self, x: Tensor) -> list[Tensor]:
        """Return Q(x S): one tensor that all shards read (column), or each shard's slice (row)."""
        return self.prepare_input([x] if self.kind == "column" else x.chunk(len(self.hp_weights), -1))

    @property
    def features(self) -> tuple[int, int]:
        """Return (inputs, outputs) of the whole linear, reassembled."""
        (outputs, inputs), total = self.hp_weights[0].shape, len(self.hp_weights) * world_size(self.tp_group)
        return (inputs, outputs * total) if self.kind == "column" else (inputs * total, outputs)

    def set_plans(self, plans: Sequence[ReassemblyPlan]) -> None:
        """Reassemble the weights for good: one plan of all inputs (column), one per shard (row)."""
        self.plans = list(plans)
        self._active = [None if plan.is_identity else plan for plan in plans]
        self.hp_weights = self._reassembled(plans)
        self._frozen = self._codes = None

    def quantize(self, scheme: Scheme, config: WeightsConfig, range_: InputRange | None = None) -> None:
        """Compute with quantized weights and activations from here on; range_: that of the linears that read the same
        input."""
        self.scheme, self.config, self.quantized = scheme, config, True
        self.range = range_ or InputRange(scheme.act_bits)

    @torch.no_grad()
    def clip(self, importance: Sequence[Tensor]) -> None:
        """Narrow the weights' ranges where that lowers the error (clipping.py), for good. A collective call over
        tp_group.

        importance: the squares of the inputs, summed over tokens, float64 [in] of all inputs (column) or of each shard.
        """
        weights, bits, symmetric = self.corrected(), self.scheme.weight_bits, self.config.symmetric
        search = partial(best_ratios, real_zero=self.config.real_zero)
        ranges = self._ranges(weights, self.config)
        if self._ranges_span_shards(self.config):
            total = partial(ordered_sum, group=self.tp_group)
            shared = search(weights, *ranges[0], bits, symmetric, importance, total)
            found = [shared] * len(weights)
        else:
            each = list(importance) * len(weights) if self.kind == "column" else importance
            found = [search([w], *pair, bits, symmetric, [d]) for w, pair, d in zip(weights, ranges, each, strict=True)]
        self.ratios = [(ratio, ratio) for ratio in found]

    def add_clipping(self) -> list[nn.Parameter]:
        """Create the logits of the ratios of both ends of every range, [2, out, groups] for each shard, or for all
        shards where they share the scales; returns them as this rank trains them."""
        ranges = self._ranges(self.corrected(), self.config)
        logits = [torch.full_like(torch.stack(pair), FIRST_LOGIT) for pair in ranges]
        spans = self._ranges_span_shards(self.config)
        self.clip_logits = nn.ParameterList(nn.Parameter(values) for values in (logits[:1] if spans else logits))
        self._frozen = self._codes = None
        return list(self.clip_logits)

    @torch.no_grad()
    def round_by_gptq(self, factors: Sequence[InverseFactor]) -> None:
        """Choose the codes of the corrected weights by GPTQ, for good: one factor of all inputs (column), or one per
        shard."""
        weights, bits = self.corrected(), self.scheme.weight_bits
        per_shard = list(factors) * len(weights) if self.kind == "column" else factors
        qparams = self._qparams(weights, bits, self.config, self._ratios())
        self._codes = [
            (gptq_codes(w, *pair, bits, factor), *pair)
            for w, pair, factor in zip(weights, qparams, per_shard, strict=True)
        ]
        self.freeze()

    def take_codes(self) -> Codes | None:
        """Return what GPTQ has chosen, and round to nearest again."""
        codes, self._codes = self._codes, None
        self.freeze()
        return codes

    def put_codes(self, codes: Codes | None) -> None:
        """Compute with what take_codes has returned."""
        self._codes = codes
        self.freeze()

    def add_low_rank(self, rank: int, branch: bool, generator: torch.Generator) -> list[nn.Parameter]:
        """Create A (uniform, variance 1 / (3 in)) and B (zero); returns them as this rank trains them."""
        count, total = len(self.hp_weights), len(self.hp_weights) * world_size(self.tp_group)
        inputs, outputs = self.features
        device = self.hp_weights[0].device
        bound = inputs**-0.5
        whole_a = torch.rand(rank, inputs, generator=generator).mul_(2 * bound).sub_(bound)  # the same at every tp size
        if self.kind == "column":
            self.lora_shared = nn.Parameter(whole_a.to(device))
            shards = [torch.zeros(w.shape[0], rank, device=device) for w in self.hp_weights]
        else:
            self.lora_shared = nn.Parameter(torch.zeros(outputs, rank, device=device))
            first = group_rank(self.tp_group) * count
            shards = [a.contiguous().to(device) for a in whole_a.chunk(total, 1)[first : first + count]]
        self.lora_shards = nn.ParameterList(nn.Parameter(shard) for shard in shards)
        self.branch = branch
        if not branch:
            self._frozen = self._codes = None
        return [self.lora_shared, *self.lora_shards]

    def drop_low_rank(self) -> None:
        """Forget A and B, and the ratios that were trained with them."""
        self.lora_shared, self.lora_shards, self.clip_logits, self.branch = None, None, None, False
        self.freeze()

    def freeze(self, weights: Sequence[Tensor] | None = None) -> None:
        """Multiply with `weights`, one per shard, until the next `unfreeze` or change; None: the effective weights."""
        self._frozen = None
        with torch.no_grad():
            self._frozen = [w.detach() for w in self.effective_weights()] if weights is None else list(weights)

    def unfreeze(self) -> None:
        """Compute the weights anew in every forward."""
        self._frozen = None

    def effective_weights(self) -> list[Tensor]:
        """Return what each shard multiplies with; differentiable in A, B and the ratios' logits."""
        if self._frozen is not None:
            return self._frozen
        if not self.quantized:
            return self.hp_weights
        if self._codes is not None:
            return [dequantize(*codes) for codes in self._codes]
        weights, ratios, bits = self.corrected(), self._ratios(), self.scheme.weight_bits
        if self.clip_logits is None or ratios is None:
            return self._fake_quantized(weights, bits, self.config, ratios)
        clipped = self._clipped_ranges(weights, self.config, ratios)
        qparams = [qparams_of_trained(*pair, bits, self.config.symmetric, self.config.real_zero) for pair in clipped]
        return [fake_quantize_trained(w, *pair, bits) for w, pair in zip(weights, qparams, strict=True)]

    @torch.no_grad()
    def weights_under(self, plans: Sequence[ReassemblyPlan], scheme: Scheme, config: WeightsConfig) -> list[Tensor]:
        """Return what the shards would multiply with, reassembled and rounded to nearest; the linear stays as it is.

        plans: one of all inputs (column), or one per shard (row). A collective call over tp_group.
        """
        return self._fake_quantized(self._reassembled(plans), scheme.weight_bits, config)

    def _reassembled(self, plans: Sequence[ReassemblyPlan]) -> list[Tensor]:
        """Return R W of each shard."""
        per_shard = list(plans) * len(self.hp_weights) if self.kind == "column" else plans
        return [plan.weights(w) for plan, w in zip(per_shard, self.hp_weights, strict=True)]

    def _fake_quantized(
        self, weights: Sequence[Tensor], bits: int, config: WeightsConfig, ratios: Sequence[Ratios] | None = None
    ) -> list[Tensor]:
        qparams = self._qparams(weights, bits, config, ratios)
        if through_ranges() and not config.symmetric:
            qparams = self._with_gradients(weights, qparams, bits, config)
        return [fake_quantize_with(w, *pair, bits) for w, pair in zip(weights, qparams, strict=True)]

    def corrected(self) -> list[Tensor]:
        """Return R W + B A of each shard (R W alone where there is no correction, or a branch), not quantized."""
        if self.lora_shared is None or self.branch:
            return self.hp_weights
        return [w + (b @ a).to(w.dtype) for w, (a, b) in zip(self.hp_weights, self._factors(), strict=True)]

    @torch.no_grad()
    def rounding_errors(self) -> list[Tensor]:
        """Return R W - Q(R W) of each shard, while there is no correction."""
        return [w - q for w, q in zip(self.hp_weights, self.effective_weights(), strict=True)]

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return (A, B) of each shard."""
        assert self.lora_shared is not None and self.lora_shards is not None
        shared = replicate(self.lora_shared, len(self.lora_shards), self.tp_group)
        if self.kind == "column":
            return list(zip(shared, self.lora_shards, strict=True))
        return list(zip(self.lora_shards, shared, strict=True))

    def _branch(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return Q(x S) A^T B^T of each shard, with A and B rounded to bf16 as they are stored."""
        factors = [(_bf16(a, x_s), _bf16(b, x_s)) for (a, b), x_s in zip(self._factors(), inputs, strict=True)]
        return [F.linear(F.linear(x_s, a), b) for x_s, (a, b) in zip(inputs, factors, strict=True)]

    def prepare_input(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Return what is multiplied: the whole input (column), or each shard's, reassembled and quantized, unless the
        norm before has done that."""
        if not self.quantized or self.prepared:
            return list(slices)
        quantizers: Sequence[Callable[[Tensor], Tensor]] = [self.range]
        if self.kind == "row":
            quantizers = self.range.for_shards(len(slices), self.tp_group)
        return [quantize(x) for quantize, x in zip(quantizers, self.reassembled(slices), strict=True)]

    def reassembled(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Return the whole input (column), or each shard's, after the linear's plans."""
        plans = self._active or [None] * len(slices)
        return [x if plan is None else plan.activations(x) for x, plan in zip(slices, plans, strict=True)]

    def _reduce(self, parts: Sequence[Tensor]) -> Tensor:
        if self.observer is not None:
            self.observer(parts)
        if self.quantized and self.reducer is not None:
            assert self.reducer.plan is not None, "training runs through a plan's collective"
            ranks = self.reducer.plan.tp_size
            return self.reducer.all_reduce(partial_sums(parts, ranks))
        return ordered_sum(parts, None)

    @torch.no_grad()
    def _qparams(
        self, weights: Sequence[Tensor], bits: int, config: WeightsConfig, ratios: Sequence[Ratios] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (scale, zero_point) of each shard."""
        ranges = self._clipped_ranges(weights, config, ratios)
        return [qparams_from_range(*pair, bits, config.symmetric, config.real_zero) for pair in ranges]

    def _clipped_ranges(
        self, weights: Sequence[Tensor], config: WeightsConfig, ratios: Sequence[Ratios] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the two ends of each shard's ranges; differentiable in the ratios."""
        ranges = self._ranges(weights, config)
        if ratios is None:
            return ranges
        return [(low * a, high * b) for (low, high), (a, b) in zip(ranges, ratios, strict=True)]

    def _ratios(self) -> Sequence[Ratios] | None:
        """Return the ratios of each shard's range to that of its weights, as they were trained or found; None: 1."""
        if self.clip_logits is None:
            return self.ratios
        logits: Sequence[Tensor] = list(self.clip_logits)
        if self._ranges_span_shards(self.config):
            logits = replicate(logits[0], len(self.hp_weights), self.tp_group)
        return [(ratio[0], ratio[1]) for ratio in (values.sigmoid() for values in logits)]

    def _ranges_span_shards(self, config: WeightsConfig) -> bool:
        """Tell whether all shards share one scale per output channel."""
        return self.kind == "row" and config.group_size is None

    @torch.no_grad()
    def _ranges(self, weights: Sequence[Tensor], config: WeightsConfig) -> list[tuple[Tensor, Tensor]]:
        """Return (smallest, largest) weight of each shard's channels and groups, or of those of all shards together."""
        if not self._ranges_span_shards(config):
            return [value_range(w, config.group_size) for w in weights]
        low = torch.stack([w.amin(1, keepdim=True) for w in weights]).amin(0).float()
        high = torch.stack([w.amax(1, keepdim=True) for w in weights]).amax(0).float()
        if self.tp_group is not None:
            dist.all_reduce(low, dist.ReduceOp.MIN, self.tp_group)
            dist.all_reduce(high, dist.ReduceOp.MAX, self.tp_group)
        return [(low, high)] * len(weights)

    def _with_gradients(
        self, weights: Sequence[Tensor], qparams: Sequence[tuple[Tensor, Tensor]], bits: int, config: WeightsConfig
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the shards' qparams with gradients from the scales to the weights."""
        if not self._ranges_span_shards(config):
            return [
                (scale_of([w], scale, *value_range(w, config.group_size), bits), zero)
                for w, (scale, zero) in zip(weights, qparams, strict=True)
            ]
        scale, zero = qparams[0]
        whole = scale_of(weights, scale, *self._ranges(weights, config)[0], bits)
        return [(copy, zero) for copy in replicate(whole, len(weights), self.tp_group)]

    @torch.no_grad()
    def packed(self) -> QuantizedWeight:
        """Return the whole (unsharded) quantized weight; a collective call over tp_group."""
        bits = self.scheme.weight_bits
        weights = self.corrected()
        if any(not torch.isfinite(w).all() for w in weights):
            raise LowBitError(f"{self.name} holds NaN or Inf after the correction; lower correction.learning_rate")
        if self._codes is None:
            qparams = self._qparams(weights, bits, self.config, self._ratios())
            codes = [quantize(w, *pair, bits) for w, pair in zip(weights, qparams, strict=True)]
            scales, zeros = ([pair[i] for pair in qparams] for i in (0, 1))
        else:
            codes, scales, zeros = ([chosen[i] for chosen in self._codes] for i in (0, 1, 2))
        dim = 0 if self.kind == "column" else 1
        if self._ranges_span_shards(self.config):
            scale, zero_point = scales[0], zeros[0]
        else:
            scale, zero_point = (self._whole(tensors, dim) for tensors in (scales, zeros))
        whole = self._whole(codes, dim)
        packed = pack_bits(whole, bits)
        return QuantizedWeight(packed.cpu(), scale.cpu(), zero_point.cpu(), bits, whole.shape[1])

    @torch.no_grad()
    def low_rank(self) -> LowRank | None:
        """Return the whole bf16 factors of a branch; a collective call over tp_group."""
        if self.lora_shared is None or self.lora_shards is None or not self.branch:
            return None
        shared = self.lora_shared.to(torch.bfloat16)
        whole = self._whole([p.to(torch.bfloat16) for p in self.lora_shards], 0 if self.kind == "column" else 1)
        a, b = (shared, whole) if self.kind == "column" else (whole, shared)
        return LowRank(a.detach().cpu(), b.detach().cpu())

    def whole_plan(self) -> ReassemblyPlan | None:
        """Return the plan of all inputs; a collective call over tp_group for a row-parallel linear."""
        if self.plans is None:
            return None
        plans = [plan.to("cpu") for plan in self.plans]
        if self.kind == "row" and self.tp_group is not None:
            gathered = all_gather_values([vars(plan) for plan in plans], self.tp_group)
            plans = [ReassemblyPlan(**fields) for part in gathered for fields in part]
        return ReassemblyPlan.join(plans)

    def _whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        local = torch.cat(list(parts), dim).contiguous()
        return torch.cat(list(all_gather_stack(local, self.tp_group).unbind(0)), dim)


class PreparedNorm(nn.Module):
    """Quantize the output of a norm, named by its fqn, per token: once for all linears that read it."""

    def __init__(self, name: str, norm: nn.Module, range_: InputRange):
        super().__init__()
        self.name, self.norm, self.range = name, norm, range_

    @property
    def weight(self) -> Any:
        """Return the norm's own: some blocks (Mamba's) ask for its dtype."""
        return self.norm.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.range(self.norm(hidden))


def prepare(x: Tensor, plan: ReassemblyPlan | None, act_bits: int) -> Tensor:
    """Return Q(x S): reassembled and fake-quantized per token, [..., width], of x [..., in]."""
    if plan is not None:
        x = plan.activations(x)
    return x if act_bits == 16 else fake_quantize(x, act_bits)


def _bf16(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(torch.bfloat16).to(like.dtype)
