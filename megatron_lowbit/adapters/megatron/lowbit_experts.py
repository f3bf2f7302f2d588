"""The experts of a GPTModel in codes: what takes the place of Megatron's, made from an artifact.

    y[t] = p[t] * Q(act(Q(x[t]) Q(U_e)^T)) Q(D_e)^T      token t of expert e, with the router's share p

A rank multiplies with its share of the rows of U and of the columns of D, and returns its part of the sum: Megatron's
token dispatcher adds the parts up, in full precision. The artifact's scale of a token of D's input spans all columns,
so the ranks that share an expert agree on its range first: two floats per token, once per block.

In Megatron's distributed checkpoints the experts are one axis, and keys are those of its own experts, with the names of
sharded_state.py in place of `weight`: they are saved and loaded at any number of expert- and tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.megatron import sharded_state
from megatron_lowbit.adapters.megatron.experts import (
    PROJECTIONS,
    Experts,
    expert_layout,
    find_experts,
    projection_shape,
)
from megatron_lowbit.adapters.megatron.layout import COLUMN, find_prefix
from megatron_lowbit.adapters.megatron.training import held_message, is_held
from megatron_lowbit.adapters.megatron_names import Role
from megatron_lowbit.comm.reducers import OverRanks
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import FLOAT_BITS
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.quant.affine import QuantizedWeight, fake_quantize_with, qparams_from_range
from megatron_lowbit.quant.checkpoint import LowBitCheckpoint
from megatron_lowbit.quant.experts import QuantizedExperts
from megatron_lowbit.runtime.distributed import group_rank, world_size


class LowBitExperts(OverRanks):
    """Called as Megatron's experts: tokens [n, hidden] in the order of the experts, how many each has, and the router's
    share of each [n] -> ([n, hidden], None), this rank's part of the sum.

    model: the GPTModel. numbers: which experts of the whole model these are. up, down: this rank's share of their
    projections. act_bits: of both projections' inputs. grouped: whether a row of the whole down projection has several
    scales. tp_group: the ranks that share an expert; None: there is one.
    """

    def __init__(
        self,
        model: Any,
        numbers: list[int],
        up: list[QuantizedWeight],
        down: list[QuantizedWeight],
        act_bits: int,
        grouped: bool,
    ):
        super().__init__()
        groups = model.pg_collection
        shared = world_size(groups.expt_tp) > 1
        self.tp_group: Any = groups.expt_tp if shared else None
        self.replica = group_rank(groups.expt_dp)  # which copy of these experts this rank's is
        self.numbers, self.count, self.grouped = numbers, model.config.num_moe_experts, grouped
        self.act, self.act_bits = model.config.activation_func, act_bits
        self.up = nn.ModuleList(QuantLinear(weight, None, act_bits) for weight in up)
        self.down = nn.ModuleList(QuantLinear(weight, None, FLOAT_BITS if shared else act_bits) for weight in down)

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
        """Return the packed experts, one axis of what the checkpoint holds (sharded_state.py)."""
        return sharded_state.sharded_experts(self, prefix, sharded_offsets, metadata)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for role in PROJECTIONS:
            state_dict.pop(f"{prefix}experts.{role}.lowbit", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


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
    count = model.config.num_moe_experts
    rows, first = layout.rank_rows("linear_fc1", rank), len(up.packed_weight) // count  # rows of an expert
    return LowBitExperts(
        model,
        here.numbers,
        [up.take_out(e * first + rows) for e in here.numbers],
        [down.shard_out(e, count).shard_in(rank, layout.tp_size) for e in here.numbers],
        experts.act_bits,
        down.scale.shape[1] > 1,
    )


def empty_experts(model: Any, here: Experts, stored: Any) -> LowBitExperts | None:
    """Return experts of the shapes that a distributed checkpoint holds, with nothing in them; None where it holds no
    codes of experts.

    stored: this layer's tensors there (checkpoint.py). Raises LowBitError for experts of other sizes, and for a tp that
    splits a packed byte.
    """
    paths: dict[Role, str] = {role: f"mlp.experts.experts.{role}" for role in PROJECTIONS}
    shapes: dict[Role, Any] = {role: stored.lowbit(path) for role, path in paths.items()}
    if None in shapes.values():
        return None
    _check_untrained(here)
    _check_computed_alike(model.config)
    layout, _ = expert_layout(model)
    weights: dict[Role, list[QuantizedWeight]] = {}
    for role, shape in shapes.items():
        *there, scales = stored.shape(paths[role], "scale")
        count, rows, width = projection_shape(model, layout, role)
        if [*there, shape.width] != [count, rows, width]:
            raise LowBitError(
                f"{here.path}.experts has {role} of {count} x [{rows}, {width}] in the GPTModel and {there[0]} x "
                f"[{there[1]}, {shape.width}] in the checkpoint; build the model with the config that was quantized"
            )
        if role in COLUMN:
            rows //= layout.tp_size
        else:
            width //= layout.tp_size
            scales //= layout.tp_size if shape.grouped else 1
            sharded_state.check_bytes(f"{here.path}.experts.{role}", width, shape.weight_bits)
        weights[role] = [sharded_state.empty_weight(rows, width, shape.weight_bits, scales) for _ in here.numbers]
    down = shapes["linear_fc2"]
    up_weights, down_weights = weights.values()
    return LowBitExperts(model, here.numbers, up_weights, down_weights, down.act_bits, bool(down.grouped))


def _check_untrained(here: Experts) -> None:
    """Raise LowBitError where an optimizer holds weights of experts that are about to be replaced."""
    for role in PROJECTIONS:
        for path, parameter in here.weights(role):
            if is_held(parameter) and here.module.training:
                raise LowBitError(held_message(path))


def check_experts(model: Any, checkpoint: LowBitCheckpoint) -> None:
    """Raise LowBitError where the experts that a checkpoint has quantized are not those of the model, or cannot be
    replaced."""
    if checkpoint.experts is None:
        return
    prefix = find_prefix(checkpoint.linears)
    for here in find_experts(model):
        _check_computed_alike(model.config)
        _check_untrained(here)
        layout, _ = expert_layout(model)
        for role in PROJECTIONS:
            name, (count, rows, width) = here.name(prefix, role), projection_shape(model, layout, role)
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
