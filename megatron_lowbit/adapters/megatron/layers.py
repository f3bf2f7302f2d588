"""Megatron-Core's tensor-parallel linears over packed weights, with low-bit collectives.

    column    y_r = Q(x) Q(W_r)^T          x copied to the ranks, or gathered along the sequence (HybridGather or bf16)
    row       y   = sum_r Q(x_r) Q(W_r)^T  all-reduced, or reduce-scattered along the sequence (HybridReducer)

Both subclass Megatron's own layer. As long as `low_bit` is None they hold that layer's weight, so a ModuleSpec can name
them and a bf16 checkpoint loads into them. Without a recipe they are that layer. With one they round the weight in
every forward pass, which trains it straight through the rounding; a checkpoint that is loaded into a model that is not
trained (megatron_training) is packed instead: then `low_bit` computes and there is no weight. Activations are
[tokens, batch, features] as everywhere in Megatron. The gradient is that of Megatron's mappings.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters import training
from megatron_lowbit.adapters.megatron import sharded_state
from megatron_lowbit.adapters.megatron import training as megatron_training
from megatron_lowbit.adapters.megatron.round_on_load import (
    StraightThrough,
    StraightThroughShard,
    parse_recipe,
    round_column,
    round_row,
    with_shard_groups,
)
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import SitePlan
from megatron_lowbit.comm.sequence_parallel import HybridGather
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.fingerprint import row_bit_sums
from megatron_lowbit.layers.linear import DenseShard, QuantLinear, QuantRowParallelLinear
from megatron_lowbit.runtime.distributed import world_size

OVERLAP = (
    "moe_shared_expert_overlap=True sends the sums of the shared expert apart from its linears, in full precision; "
    "set it to False"
)


def tp_group(host: Any) -> dist.ProcessGroup | None:
    """Return the tensor-parallel group of one of Megatron's or Transformer Engine's linears; None for a single rank."""
    group = getattr(host, "tp_group", None) or getattr(host, "_tp_group", None)
    return group if group is not None and world_size(group) > 1 else None


class _LowBitLayer:
    """The part that the two layers share: taking the place of a host, quantizing on load, distributed checkpoints."""

    is_row = False
    default_recipe: WeightsConfig | None = None  # a spec's own classes set it
    low_bit: Any
    recipe: WeightsConfig | None  # how to quantize a checkpoint that is loaded
    gated: bool  # rows are [gate_r | up_r]
    grouped: bool  # rows have several scales
    attention_bits: int  # of Q, K and V, kept here for distributed checkpoints
    rotated: (
        bool | None
    )  # a row's input, and of linear_qkv Q and K; None: nothing of the artifact is, or it is no artifact
    stores_reassembly: bool  # some layer of this role reassembles its own input
    plans: dict[int, Any]  # for distributed checkpoints: SitePlans by tp_size; of a column {1: Codec of its gather}
    weight_loaded = False  # with the state dict that is being loaded
    name_there = ""  # this layer's, in that state dict
    held: bool  # a trainer holds the weight of the layer whose place this one has taken
    row_sums: Tensor | None  # row_bit_sums of the weight that was rounded on load: the model's identity

    def _full_precision(self, gated: bool = False) -> None:
        """Set the state before anything is quantized."""
        if getattr(self.config, "inference_fuse_tp_communication", False):
            raise LowBitError(
                "inference_fuse_tp_communication=True reduces, norms and gathers in one kernel of full precision, of "
                "which there is no low-bit one; set it to False"
            )
        self.low_bit, self.recipe, self.plans, self.row_sums = None, self.default_recipe, {}, None
        self.gated, self.grouped, self.attention_bits, self.stores_reassembly = gated, False, 16, False
        self.held, self.rotated = False, None
        megatron_training.mark_unreported(self)

    def adopt(self, host: nn.Module, low_bit: nn.Module, gated: bool = False) -> None:
        """Become the low-bit replacement of `host`, a layer of Megatron's or Transformer Engine's, which stays as it
        is."""
        nn.Module.__init__(self)  # type: ignore[arg-type]
        source: Any = host
        self.config, self.is_expert = source.config, False
        self.tp_group = getattr(source, "tp_group", None) or getattr(source, "_tp_group", None)
        self.sequence_parallel = source.sequence_parallel and world_size(self.tp_group) > 1
        self.skip_bias_add = getattr(source, "skip_bias_add", None)
        if self.skip_bias_add is None:  # Transformer Engine's name for it
            self.skip_bias_add = source.te_return_bias
        bias = getattr(source, "bias", None)
        has_bias = isinstance(bias, nn.Parameter) and bias.numel() > 0  # Transformer Engine's "none" is an empty tensor
        self.register_parameter("bias", bias if has_bias else None)  # type: ignore[attr-defined]
        self.weight, self.explicit_expert_comm = None, False
        self._full_precision(gated)
        self.low_bit, self.held = low_bit, megatron_training.is_held(source.weight)
        if sharded_state.quantized_linear(self) is not None:
            megatron_training.forget(host)
        self._register_load_state_dict_pre_hook(  # type: ignore[attr-defined]
            lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state")
        )

    def finish_init(self, quantization_config: Any) -> None:
        """Take this layer's entry of Megatron's per-layer recipe file, or None; GPTModel calls it.

        The entry's keys are those of our `weights` section: scheme, group_size, symmetric, zero_point, shard_groups.
        Raises LowBitError for other keys or values, and for a layer that a shared expert is to call without its sums.
        """
        if self.explicit_expert_comm and not self.is_expert:
            raise LowBitError(OVERLAP)
        if quantization_config is not None:
            self.recipe = parse_recipe(quantization_config)

    def rounding(self) -> StraightThrough | None:
        """Return how the full-precision weight is rounded in every forward pass; None: it is not, or there is none."""
        if self.low_bit is not None or self.is_expert or self.recipe is None or self.recipe.scheme == "none":
            return None
        recipe = with_shard_groups(self.recipe, self.config)
        return StraightThrough(recipe, self.is_row, tp_group(self) if self.is_row else None)

    def on_load(self, name: str) -> None:
        """Pack the full-precision weight that has been loaded (round to nearest), unless it is trained.

        name: this layer's, in the model.
        """
        if self.rounding() is not None and not megatron_training.is_trained(self):
            weight: Any = self.weight
            self.quantize_(self.recipe)  # type: ignore[attr-defined]
            training.mark_packed(weight, name)

    def train(self, mode: bool = True) -> Any:
        """Set the training mode, like nn.Module.train. Raises LowBitError for packed weights in the place of weights
        that a trainer holds."""
        if mode and self.held and sharded_state.quantized_linear(self) is not None:
            raise LowBitError(megatron_training.held_message("a packed linear"))
        return super().train(mode)  # type: ignore[misc]

    def _rounded(self, low_bit: nn.Module, config: WeightsConfig) -> None:
        """Drop the weight: from now on low_bit computes."""
        assert self.weight is not None, "a layer is rounded once"
        self.row_sums, self.grouped = row_bit_sums(self.weight.detach()), config.group_size is not None
        self.weight, self.low_bit = None, low_bit
        megatron_training.mark_unreported(self)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Return Megatron's own until the layer is low-bit; then packed weights, qparams, reassembly, branch and
        plans."""
        if self.low_bit is None:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        return sharded_state.sharded_state(self, prefix, sharded_offsets, metadata)

    def _after_load_state_dict(self, *_: Any) -> None:
        if self.weight_loaded:
            self.on_load(self.name_there)
            megatron_training.report_when_loaded()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.weight_loaded = f"{prefix}weight" in state_dict  # a partial load must not round what is not there yet
        self.name_there = prefix.rstrip(".")
        sharded_state.take_plans(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def set_extra_state(self, state: Any) -> None:
        """Do nothing, since there is none: what a low-bit layer needs to know lies in its tensors."""

    def get_extra_state(self) -> None:
        return None

    def backward_dw(self) -> None:
        """Do nothing: weights of a low-bit layer have no gradient that could be delayed."""


class LowBitColumnParallelLinear(_LowBitLayer, ColumnParallelLinear):
    """x [tokens (/ N under sequence parallelism), batch, in] -> ([tokens, batch, out / N], bias or None)."""

    low_bit: QuantLinear | DenseShard | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._full_precision(self.config.gated_linear_unit and kwargs.get("tp_comm_buffer_name") == "fc1")
        self.gather: HybridGather | None = None
        self.register_load_state_dict_post_hook(self._after_load_state_dict)

    @classmethod
    def from_host(
        cls,
        host: nn.Module,
        low_bit: QuantLinear | DenseShard,
        gated: bool,
        gather: Codec | None,
        drift_threshold: float | None = None,
    ) -> LowBitColumnParallelLinear:
        """Make the low-bit replacement of a column-parallel layer; gated: rows are [gate_r | up_r]; gather,
        drift_threshold: of the all-gather of its input."""
        layer = cls.__new__(cls)
        layer.adopt(host, low_bit, gated)
        layer.gather = None
        layer.set_gather(gather, drift_threshold)
        layer.gather_output = getattr(host, "gather_output", False)
        rows = low_bit.weight.shape[0] if isinstance(low_bit, DenseShard) else low_bit.out_features
        layer.output_size_per_partition, layer.input_size = rows, host_in_features(host)
        layer.output_size = rows * world_size(layer.tp_group)
        return layer

    def set_gather(self, plan: Codec | None, drift_threshold: float | None = None) -> None:
        """Gather the input in low bits, where sequence parallelism has to gather it."""
        self.plans = {} if plan is None else {1: plan}
        if plan is not None and self.sequence_parallel and self.tp_group is not None:
            self.gather = HybridGather(plan, self.tp_group, drift_threshold)

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        rounding = self.rounding()
        megatron_training.report_rounding()
        if self.low_bit is None and rounding is None:
            return super().forward(input_, weight, runtime_gather_output)
        x = self.gathered_input(input_)
        if self.low_bit is not None:
            output = self.low_bit(x)
        else:
            assert rounding is not None
            output = rounding(x, full_weight(self) if weight is None else weight)
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            output = gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return _with_bias(output, self.bias, self.skip_bias_add)

    def gathered_input(self, input_: Tensor) -> Tensor:
        """Return the whole input on every rank; its gradient is summed over them."""
        if self.sequence_parallel:
            if self.gather is not None:
                return self.gather.all_gather(input_)
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group)

    @torch.no_grad()
    def quantize_(self, config: WeightsConfig) -> None:
        """Round this rank's rows to config.scheme and drop the weight."""
        low_bit = round_column(full_weight(self), config)
        self._rounded(low_bit, config)


class LowBitLayerNormColumnParallelLinear(LowBitColumnParallelLinear):
    """Takes the place of Transformer Engine's LayerNormLinear: norms its input first.

    The norm's gain and bias have Transformer Engine's names, and stay in full precision when the weight is packed. The
    reassembly is carried out by the linear, on its own input.
    """

    layer_norm_weight: nn.Parameter
    layer_norm_bias: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        weight = full_weight(self)
        ones = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
        zeros = torch.zeros_like(ones)
        self.layer_norm_weight = nn.Parameter(zeros.clone() if self.config.layernorm_zero_centered_gamma else ones)
        self.register_parameter(
            "layer_norm_bias", None if self.config.normalization == "RMSNorm" else nn.Parameter(zeros)
        )
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:  # sums its gradient over the ranks, as Megatron's norms ask for
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def set_gain(self, gain: Tensor) -> None:
        """Take an artifact's gain, where it has trained the norm."""
        gain = gain.to(self.layer_norm_weight)
        if not torch.equal(gain, self.layer_norm_weight):
            self.layer_norm_weight = nn.Parameter(gain, requires_grad=False)

    @classmethod
    def from_host(cls, host: Any, *args: Any, **kwargs: Any):  # type: ignore[override]
        layer = super().from_host(host, *args, **kwargs)
        layer.layer_norm_weight = host.layer_norm_weight
        layer.register_parameter("layer_norm_bias", getattr(host, "layer_norm_bias", None))
        return layer

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        config, features = self.config, (input_.shape[-1],)
        gain = self.layer_norm_weight + 1 if config.layernorm_zero_centered_gamma else self.layer_norm_weight
        if config.normalization == "RMSNorm":
            normed = nn.functional.rms_norm(input_.float(), features, gain.float(), config.layernorm_epsilon)
        else:
            bias = None if self.layer_norm_bias is None else self.layer_norm_bias.float()
            normed = nn.functional.layer_norm(input_.float(), features, gain.float(), bias, config.layernorm_epsilon)
        return super().forward(normed.to(input_.dtype), weight, runtime_gather_output)


class LowBitRowParallelLinear(_LowBitLayer, RowParallelLinear):
    """x [tokens, batch, in / N] -> ([tokens (/ N under sequence parallelism), batch, out], bias or None)."""

    is_row = True
    low_bit: QuantRowParallelLinear | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._full_precision()
        self.register_load_state_dict_post_hook(self._after_load_state_dict)

    @classmethod
    def from_host(
        cls, host: nn.Module, low_bit: QuantRowParallelLinear, plans: dict[int, SitePlan]
    ) -> LowBitRowParallelLinear:
        """Make the low-bit replacement of a row-parallel layer."""
        layer = cls.__new__(cls)
        layer.adopt(host, low_bit)
        layer.plans = plans
        layer.input_is_parallel = getattr(host, "input_is_parallel", True)
        layer.input_size_per_partition = host_in_features(host)
        layer.input_size = layer.input_size_per_partition * world_size(layer.tp_group)
        layer.output_size = getattr(host, "output_size", None) or host.out_features
        return layer

    def forward(self, input_: Tensor):
        rounding = self.rounding()
        megatron_training.report_rounding()
        if self.low_bit is None and rounding is None:
            return super().forward(input_)
        if not self.input_is_parallel:
            input_ = scatter_to_tensor_model_parallel_region(input_, group=self.tp_group)
        if self.low_bit is not None:
            return _with_bias(self.low_bit(input_), self.bias, self.skip_bias_add)
        assert rounding is not None
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        output = reduce(rounding(input_, full_weight(self)), group=self.tp_group)
        return _with_bias(output, self.bias, self.skip_bias_add)

    @torch.no_grad()
    def quantize_(self, config: WeightsConfig) -> None:
        """Round this rank's columns to config.scheme and drop the weight. A collective call: one scale per output
        channel spans all ranks."""
        group, config = tp_group(self), with_shard_groups(config, self.config)
        low_bit = round_row(full_weight(self), config, group, self.sequence_parallel and group is not None)
        self._rounded(low_bit, config)


def weight_rows(layer: Any) -> Tensor:
    """Return the row_bit_sums of a layer's full-precision weight, also of one that has been rounded on load."""
    return row_bit_sums(layer.weight.detach()) if layer.weight is not None else layer.row_sums


def dense_shard(host: Any) -> Any:
    """Return the matrix product of a layer whose communication alone becomes low-bit: in full precision, rounded in
    every forward pass, or as it has been packed, whichever the layer does."""
    if host.weight is None:
        return host.low_bit.shards[0] if host.is_row else host.low_bit
    rounding = host.rounding() if isinstance(host, _LowBitLayer) else None
    return DenseShard(host.weight) if rounding is None else StraightThroughShard(host.weight, rounding)


def full_weight(layer: Any) -> Tensor:
    """Return a layer's own full-precision weight. Raises LowBitError for one that has been rounded on load."""
    if layer.weight is None:
        raise LowBitError("the model's linears are quantized; remove(model), or build it without a scheme")
    return layer.weight


def host_in_features(host: Any) -> int:
    """Return the number of inputs of this rank's share of a layer."""
    if host.weight is not None:
        return int(host.weight.shape[1])
    return int(host.input_size_per_partition if host.is_row else host.input_size)


def _with_bias(output: Tensor, bias: Tensor | None, skip_bias_add: bool | None) -> tuple[Tensor, Tensor | None]:
    if skip_bias_add:
        return output, bias
    return (output if bias is None else output + bias), None


__all__ = [
    "LowBitColumnParallelLinear",
    "LowBitLayerNormColumnParallelLinear",
    "LowBitRowParallelLinear",
    "dense_shard",
    "full_weight",
    "host_in_features",
    "tp_group",
    "weight_rows",
]
