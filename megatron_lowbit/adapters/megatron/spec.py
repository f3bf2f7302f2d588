"""(a) and (c) of adapters/megatron.py: low-bit classes in a ModuleSpec, and ready specs for `--spec`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import inference_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lowbit.adapters.megatron import scripts, versions
from megatron_lowbit.adapters.megatron.attention import SdpaAttention
from megatron_lowbit.adapters.megatron.experts import has_experts
from megatron_lowbit.adapters.megatron.filler import Filler
from megatron_lowbit.adapters.megatron.layers import (
    LowBitColumnParallelLinear,
    LowBitLayerNormColumnParallelLinear,
    LowBitRowParallelLinear,
)
from megatron_lowbit.adapters.megatron.norms import RMSNorm
from megatron_lowbit.adapters.megatron.round_on_load import check_equal_bits
from megatron_lowbit.adapters.megatron.spec_layer import SpecLayer
from megatron_lowbit.adapters.megatron.whole import check_spec, is_moe
from megatron_lowbit.config import LowBitError, WeightsConfig


def lowbit_spec(spec: Any, weights: WeightsConfig | str | None = None) -> Any:
    """Return a copy of a ModuleSpec (a layer's or a block's) with low-bit classes in place of the tensor-parallel
    linears.

    The walk goes through nested specs, dataclasses, lists, dicts and functools.partial. weights: what a loaded
    checkpoint is rounded to, as a scheme's name or a `weights` section; None leaves that to the recipe or to
    apply_to_megatron. Raises LowBitError for a spec with Transformer Engine's layers where that is not installed,
    for one without tensor-parallel linears, and for one with such that are not known, which it names.
    """
    config = WeightsConfig(scheme=weights) if isinstance(weights, str) else weights
    for key in ("lm_head_bits", "rotation", "clipping", "rounding"):
        if config is not None and getattr(config, key) != getattr(WeightsConfig(), key):
            raise LowBitError(f"weights.{key} has no effect on a spec of the layers; leave it out")
    if config is not None:
        check_equal_bits(config, "the spec")
    table = {id(host): _configured(low_bit, config) for host, low_bit in _replacements()}
    rewritten, count = _rewrite(spec, table)
    if count == 0:
        raise LowBitError("the spec names no ColumnParallelLinear or RowParallelLinear; give a GPT layer's spec")
    check_spec(rewritten)
    return rewritten


def _replacements() -> list[tuple[Any, type]]:
    """Return (class of the host, ours). Transformer Engine's names are there, as mocks, even where the package is
    not."""
    pairs: list[tuple[Any, type]] = [
        (ColumnParallelLinear, LowBitColumnParallelLinear),
        (RowParallelLinear, LowBitRowParallelLinear),
    ]
    for low_bit in (LowBitColumnParallelLinear, LowBitLayerNormColumnParallelLinear, LowBitRowParallelLinear):
        name = low_bit.__name__.removeprefix("LowBit")
        pairs.append((getattr(te, f"TE{name}"), low_bit))
        optimized = getattr(inference_layers, f"Inference{name}", None)  # 0.16 has two of the three
        if optimized is not None:
            pairs.append((optimized, low_bit))
    return pairs


def _configured(low_bit: type, config: WeightsConfig | None) -> type:
    """Return a subclass of a low-bit layer that rounds what is loaded into it. (Megatron builds from classes only.)"""
    if config is None:
        return low_bit
    return type(low_bit.__name__, (low_bit,), {"default_recipe": config, "__module__": low_bit.__module__})


def _rewrite(node: Any, table: Mapping[int, Any]) -> tuple[Any, int]:
    """Return (node with every class of `table` replaced, how many were)."""
    if id(node) in table:
        _check_te(node)
        return table[id(node)], 1
    if isinstance(node, functools.partial):
        function, count = _rewrite(node.func, table)
        arguments, more = _rewrite(list(node.args), table)
        keywords, most = _rewrite(dict(node.keywords), table)
        return (
            functools.partial(function, *arguments, **keywords) if count + more + most else node
        ), count + more + most
    if isinstance(node, dict):
        found = {key: _rewrite(value, table) for key, value in node.items()}
        return {key: value for key, (value, _) in found.items()}, sum(count for _, count in found.values())
    if isinstance(node, (list, tuple)) and type(node) in (list, tuple):
        items = [_rewrite(value, table) for value in node]
        return type(node)(value for value, _ in items), sum(count for _, count in items)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        changed, total = {}, 0
        for field in dataclasses.fields(node):
            if is_moe(node) and field.name != "shared_experts":  # experts that a router chooses stay as they are
                continue
            value, count = _rewrite(getattr(node, field.name, None), table)
            if count:
                changed[field.name], total = value, total + count
        return (dataclasses.replace(node, **changed) if changed else node), total
    return node, 0


def _check_te(host: Any) -> None:
    if not te.HAVE_TE and host not in (ColumnParallelLinear, RowParallelLinear):
        raise LowBitError(
            "the spec names Transformer Engine's layers, which is not installed; "
            "install transformer-engine, or rewrite get_gpt_layer_local_spec()"
        )


def llama_spec(qk_layernorm: bool = False, experts: bool = False) -> Any:
    """Return Megatron's local layer spec of a Llama-like model, with torch's fused attention and an RMSNorm that works
    under sequence parallelism too.

    experts: a mixture of experts in place of the MLP, of as many as the TransformerConfig says.
    """
    if experts:
        versions.define_router_product()
    spec = get_gpt_layer_local_spec(
        num_experts=1 if experts else None, normalization="RMSNorm", qk_layernorm=qk_layernorm
    )
    attention = spec.submodules.self_attention
    inside = dataclasses.replace(attention.submodules, core_attention=SdpaAttention)
    if qk_layernorm:
        inside = dataclasses.replace(inside, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    layer = dataclasses.replace(
        spec.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(attention, submodules=inside),
    )
    return dataclasses.replace(spec, submodules=layer)


def block_spec(config: Any, layer: Any = None) -> Any:
    """Return the spec of all layers of this pipeline stage and a final norm, for GPTModel(transformer_layer_spec=...).

    layer: one layer's spec; None: llama_spec, with experts in the blocks that the config says. A layer's spec alone
    leaves the final norm to Megatron, whose choice without Apex or Transformer Engine refuses sequence parallelism.
    """
    layers = [layer or llama_spec(config.qk_layernorm, has) for has in mixtures(config)]
    return TransformerBlockSubmodules(layers, layer_norm=RMSNorm)


def artifact_spec(artifact: str | Path | None = None, spec: Any = None) -> Any:
    """Return a layer's spec whose GPTModel takes in an artifact by itself.

    artifact: its folder; None: what the environment variable MEGATRON_LOWBIT_ARTIFACT names when the model is built, or
    nothing. spec: of one layer; None: llama_lowbit_spec. Building a GPTModel raises LowBitError for an artifact of
    another architecture, before the first layer is there.
    """
    layer = llama_lowbit_spec if spec is None else spec
    filler = Filler(None if artifact is None else Path(artifact))
    return dataclasses.replace(layer, module=SpecLayer, params={**layer.params, "filler": filler})


class StageLayers(Sequence):
    """The specs of the layers that this pipeline stage of a Megatron-LM script has.

    A block's spec lists its layers, but a ready object for `--spec` is made before anything knows how many there will
    be: the list looks at the script's arguments when the block is built. mixture: of the layers that have experts.
    """

    def __init__(self, layer: Any, mixture: Any = None):
        self.layer, self.mixture = layer, layer if mixture is None else mixture

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, index: Any) -> Any:
        return self._layers()[index]

    def _layers(self) -> list[Any]:
        args = scripts.script_arguments()
        if args is None:
            raise LowBitError("a ready block spec is for --spec of Megatron-LM's scripts; elsewhere call block_spec")
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(args)
        stages = [mixtures(config, stage) for stage in range(config.virtual_pipeline_model_parallel_size or 1)]
        if any(stage != stages[0] for stage in stages):
            raise LowBitError("a ready block spec needs virtual pipeline stages of equal layers; use llama_lowbit_spec")
        return [self.mixture if has else self.layer for has in stages[0]]


def mixtures(config: Any, stage: int | None = None) -> list[bool]:
    """Return of every layer of this pipeline stage whether it is a mixture of experts.

    stage: the virtual one, if any.
    """
    count = get_num_layers_to_build(config, vp_stage=stage)
    first = 0 if config.num_moe_experts is None else get_transformer_layer_offset(config, vp_stage=stage)
    return [has_experts(config, first + i) for i in range(count)]


def ready_block(layer: Any, mixture: Any = None) -> Any:
    """Return the spec of a block of these layers, with a final norm that takes sequence parallelism, for `--spec`.

    mixture: of the layers that have experts.
    """
    return TransformerBlockSubmodules(StageLayers(layer, mixture), layer_norm=RMSNorm)


llama_lowbit_spec = artifact_spec(spec=lowbit_spec(llama_spec(), "W4A8"))
llama_w4a16_spec = artifact_spec(spec=lowbit_spec(llama_spec(), "W4A16"))
llama_w4a4_spec = artifact_spec(spec=lowbit_spec(llama_spec(), "W4A4"))
qwen3_lowbit_spec = artifact_spec(spec=lowbit_spec(llama_spec(qk_layernorm=True), "W4A8"))
mixtral_lowbit_spec = artifact_spec(spec=lowbit_spec(llama_spec(experts=True), "W4A8"))
qwen3_moe_lowbit_spec = artifact_spec(spec=lowbit_spec(llama_spec(qk_layernorm=True, experts=True), "W4A8"))
llama_lowbit_block_spec = ready_block(llama_lowbit_spec)
llama_w4a16_block_spec = ready_block(llama_w4a16_spec)
llama_w4a4_block_spec = ready_block(llama_w4a4_spec)
qwen3_lowbit_block_spec = ready_block(qwen3_lowbit_spec)
mixtral_lowbit_block_spec = ready_block(llama_lowbit_spec, mixtral_lowbit_spec)
qwen3_moe_lowbit_block_spec = ready_block(qwen3_lowbit_spec, qwen3_moe_lowbit_spec)
