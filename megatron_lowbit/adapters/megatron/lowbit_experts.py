"""The experts of a GPTModel in codes: what takes the place of Megatron's, made from an artifact.

    y[t] = p[t] * Q(act(Q(x[t]) Q(U_e)^T)) Q(D_e)^T      token t of expert e, with the router's share p

A rank multiplies with its share of the rows of U and of the columns of D, and returns its part of the sum: Megatron's
token dispatcher adds the parts up, in full precision. The artifact's scale of a token of D's input spans all columns,
so the ranks that share an expert agree on its range first: two floats per token, once per block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.megatron.experts import (
    PROJECTIONS,
    Experts,
    expert_layout,
    find_experts,
    projection_shape,
)
from megatron_lowbit.adapters.megatron.layout import find_prefix
from megatron_lowbit.adapters.megatron.training import held_message, is_held
from megatron_lowbit.comm.reducers import OverRanks
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import FLOAT_BITS
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import fake_quantize_with, qparams_from_range
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.experts import QuantizedExperts
from megatron_lowbit.runtime.distributed import world_size


class LowBitExperts(OverRanks):
    """Called as Megatron's experts: tokens [n, hidden] in the order of the experts, how many each has, and the router's
    share of each [n] -> ([n, hidden], None), this rank's part of the sum.

    up, down: this rank's share of every expert's projections. act: of Megatron's config, between [gate | up]'s halves.
    act_bits: of both projections' inputs. tp_group: the ranks that share an expert; None: there is one.
    """

    def __init__(self, up: list[QuantLinear], down: list[QuantLinear], act: Any, act_bits: int, tp_group: Any):
        super().__init__()
        self.up, self.down = nn.ModuleList(up), nn.ModuleList(down)
        self.act, self.act_bits, self.tp_group = act, act_bits, tp_group

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        if not len(tokens):  # of expert-parallel ranks one may have no work
            return tokens, None
        counts = tokens_per_expert.tolist()
        inner = self._rounded(_each(self.up, tokens, counts, self._inner))
        found = _each(self.down, inner, counts, lambda down, h: down(h, tokens.dtype))
        return (found * probs.unsqueeze(-1)).to(tokens.dtype), None

    def _inner(self, up: nn.Module, x: Tensor) -> Tensor:
        gate, value = up(x).chunk(2, dim=-1)
        return self.act(gate) * value

    def _rounded(self, inner: Tensor) -> Tensor:
        """Return what the codes of inner [n, width / N] stand for, float32, by the range of the whole token; as it is
        where the down projection rounds it itself, or nothing does."""
        if self.tp_group is None or self.act_bits == FLOAT_BITS:
            return inner
        values = inner.detach().float()
        ends = torch.stack([-values.amin(1), values.amax(1)])
        dist.all_reduce(ends, dist.ReduceOp.MAX, self.tp_group)
        low, high = (end.unsqueeze(1) for end in (-ends[0], ends[1]))
        return fake_quantize_with(inner.float(), *qparams_from_range(low, high, self.act_bits), self.act_bits)

    def backward_dw(self) -> None:
        """Do nothing: weights in codes have no gradient that could be delayed."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Refuse: Megatron's distributed checkpoints hold experts in full precision."""
        raise LowBitError(
            f"{prefix.rstrip('.')} holds experts in codes, which are not kept in distributed checkpoints; save the "
            "artifact, or the model after megatron_lowbit.remove"
        )


def _each(
    linears: nn.ModuleList, x: Tensor, counts: list[int], compute: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Compute every expert's part of x, of the experts that have one."""
    parts = zip(linears, x.split(counts), strict=True)
    return torch.cat([compute(linear, part) for linear, part in parts if len(part)])


def expert_replacements(model: Any, checkpoint: LowBitCheckpoint) -> dict[str, nn.Module]:
    """Return {path: replacement} of the experts that the checkpoint has quantized, for this rank."""
    if checkpoint.experts is None:
        return {}
    prefix = find_prefix(checkpoint.linears)
    return {
        f"{experts.path}.experts": _replacement(model, experts, prefix, checkpoint.experts)
        for experts in find_experts(model)
    }


def _replacement(model: Any, here: Experts, prefix: str, experts: QuantizedExperts) -> LowBitExperts:
    layout, rank = expert_layout(model)
    up, down = (experts.weights[here.name(prefix, role)] for role in PROJECTIONS)
    count, group, act_bits = model.config.num_moe_experts, model.pg_collection.expt_tp, experts.act_bits
    shared = world_size(group) > 1
    rows = layout.rank_rows("linear_fc1", rank)
    first = len(up.packed_weight) // count  # rows of an expert
    return LowBitExperts(
        [QuantLinear(up.take_out(e * first + rows), None, act_bits) for e in here.numbers],
        [
            QuantLinear(
                down.shard_out(e, count).shard_in(rank, layout.tp_size), None, FLOAT_BITS if shared else act_bits
            )
            for e in here.numbers
        ],
        model.config.activation_func,
        act_bits,
        group if shared else None,
    )


def check_experts(model: Any, checkpoint: LowBitCheckpoint) -> None:
    """Raise LowBitError where the experts that a checkpoint has quantized are not those of the model, or cannot be
    replaced."""
    if checkpoint.experts is None:
        return
    prefix = find_prefix(checkpoint.linears)
    for here in find_experts(model):
        _check_computed_alike(model.config)
        layout, _ = expert_layout(model)
        for role in PROJECTIONS:
            name, (count, rows, width) = here.name(prefix, role), projection_shape(model, layout, role)
            for path, parameter in here.weights(role):
                if is_held(parameter) and here.module.training:
                    raise LowBitError(held_message(path))
            weight = checkpoint.experts.weights.get(name)
            if weight is None:
                raise LowBitError(f"the artifact has no quantized experts {name}; quantize this model again")
            if (len(weight.packed_weight), weight.in_features) != (count * rows, width):
                raise LowBitError(
                    f"{name} is {count} x [{rows}, {width}] in the GPTModel and [{len(weight.packed_weight)}, "
                    f"{weight.in_features}] in the artifact; build the model with the config that was quantized"
                )


def _check_computed_alike(config: Any) -> None:
    """Raise LowBitError for experts that compute something else between their projections, or around them."""
    expected = {
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        "moe_apply_probs_on_input": False,
        "moe_latent_size": None,
    }
    for name, value in expected.items():
        given = getattr(config, name, value)
        if given != value:
            raise LowBitError(
                f"the artifact's experts are computed with {name}={value}, and the GPTModel has {name}={given}; "
                "quantize without weights.experts, or build the model with the config that was quantized"
            )
