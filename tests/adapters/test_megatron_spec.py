"""lowbit_spec: which classes of a ModuleSpec it replaces, and the models that are built from what it returns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import megatron_spec_cases
import pytest
import tiny_models
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from megatron_cases import token_ids
from tiny_models import build, make_artifact
from torch import nn

import megatron_lowbit as lowbit
from megatron_lowbit.config import LowBitError, WeightsConfig

pytestmark = [needs_megatron, pytest.mark.filterwarnings("ignore:.*Apex")]


@pytest.fixture(scope="module")
def spec():
    """A new local spec of one layer of Megatron's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec


def inside(node: Any) -> Any:
    """The submodules of a ModuleSpec, or of the functools.partial that newer versions of Megatron use in its place."""
    return node.keywords["submodules"] if isinstance(node, functools.partial) else node.submodules


def parts(node: Any) -> Any:
    """A spec as nested tuples, which can be compared: two partials of the same parts are not equal."""
    if isinstance(node, functools.partial):
        return "partial", parts(node.func), parts(node.args), parts(node.keywords)
    if isinstance(node, dict):
        return {key: parts(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [parts(value) for value in node]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return type(node), {field.name: parts(getattr(node, field.name)) for field in dataclasses.fields(node)}
    return node


def linears(layer: Any) -> dict[str, Any]:
    attention, mlp = (inside(getattr(inside(layer), name)) for name in ("self_attention", "mlp"))
    return {
        "linear_qkv": attention.linear_qkv,
        "linear_proj": attention.linear_proj,
        "linear_fc1": mlp.linear_fc1,
        "linear_fc2": mlp.linear_fc2,
    }


def assert_low_bit(layer: Any, weights: WeightsConfig | None = None) -> None:
    from megatron_lowbit.adapters.megatron.layers import LowBitColumnParallelLinear, LowBitRowParallelLinear

    for name, kind in linears(layer).items():
        base = LowBitColumnParallelLinear if name in ("linear_qkv", "linear_fc1") else LowBitRowParallelLinear
        assert issubclass(kind, base) and kind.default_recipe == weights, name


def test_the_linears_of_a_layer(spec):
    """They alone: all else in the copy is what it was, and so is the whole original."""
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    original = spec()
    rewritten = lowbit_spec(original)
    assert_low_bit(rewritten)
    assert parts(original) == parts(spec()), "the original was changed"
    assert rewritten is not original and parts(rewritten) != parts(original)
    ours = {id(low_bit): linears(original)[name] for name, low_bit in linears(rewritten).items()}

    def back(node: Any) -> Any:
        """The spec with the original's linears in the place of the low-bit ones."""
        if isinstance(node, dict):
            return {key: back(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(back(value) for value in node)
        return ours.get(id(node), node)

    assert back(parts(rewritten)) == parts(original)


@pytest.mark.parametrize(
    "weights", ["W4A16", WeightsConfig(scheme="W4A4", group_size=8), WeightsConfig(scheme="W8A8", symmetric=True)]
)
def test_a_scheme_is_the_classes_own(spec, weights):
    """Two specs with two schemes do not know of each other, nor does one without."""
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    rewritten, other = lowbit_spec(spec(), weights), lowbit_spec(spec(), "W6A6")
    assert_low_bit(rewritten, WeightsConfig(scheme=weights) if isinstance(weights, str) else weights)
    assert_low_bit(other, WeightsConfig(scheme="W6A6"))
    assert_low_bit(lowbit_spec(spec()))


def test_a_block_of_layers(spec):
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    block = TransformerBlockSubmodules([spec(), spec(qk_layernorm=True)], layer_norm=nn.LayerNorm)
    rewritten = lowbit_spec(block, "W4A8")
    assert type(rewritten) is TransformerBlockSubmodules and rewritten.layer_norm is nn.LayerNorm
    for layer in rewritten.layer_specs:
        assert_low_bit(layer, WeightsConfig(scheme="W4A8"))
    assert parts(block.layer_specs) == parts([spec(), spec(qk_layernorm=True)])


@dataclasses.dataclass
class Nest:
    many: list
    named: dict
    pair: tuple
    number: int = 3
    partial: Any = None


def test_nested_containers_and_partials():
    """Wherever specs keep classes; what holds none comes back as the very same object."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_lowbit.adapters.megatron.layers import LowBitColumnParallelLinear, LowBitRowParallelLinear
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    plain = functools.partial(nn.Linear, 2)
    inner = functools.partial(RowParallelLinear, 4, bias=False)
    bound = functools.partial(max, ColumnParallelLinear, key=ModuleSpec(RowParallelLinear, params={"a": 1}))
    nest = Nest([ColumnParallelLinear, [nn.Linear]], {"row": inner, "no": plain}, (RowParallelLinear, 1), 3, bound)
    found = lowbit_spec(nest)
    assert found.many == [LowBitColumnParallelLinear, [nn.Linear]] and found.pair == (LowBitRowParallelLinear, 1)
    row = found.named["row"]
    assert (row.func, row.args, row.keywords) == (LowBitRowParallelLinear, (4,), {"bias": False})
    assert found.named["no"] is plain and found.number == 3
    assert found.partial.func is max and found.partial.args == (LowBitColumnParallelLinear,)
    assert found.partial.keywords == {"key": ModuleSpec(LowBitRowParallelLinear, params={"a": 1})}
    assert nest.many[0] is ColumnParallelLinear and nest.named["row"] is inner and inner.func is RowParallelLinear
    assert bound.args == (ColumnParallelLinear,) and nest.pair[0] is RowParallelLinear


def test_a_spec_without_linears_is_refused():
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    for nothing in (ModuleSpec(module=nn.Identity), Nest([], {}, ()), None):
        with pytest.raises(LowBitError, match=r"^the spec names no ColumnParallelLinear or RowParallelLinear;.*$"):
            lowbit_spec(nothing)


def test_experts_and_router_stay(spec, one_rank):
    """In the spec, and in the model that is built from it; the embedding and the output layer are no part of it. The
    shared expert, which no router chooses, is an MLP."""
    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    original = spec(num_experts=2)
    rewritten = lowbit_spec(original)
    mixtures = [inside(inside(layer).mlp) for layer in (rewritten, original, spec(num_experts=2))]
    assert parts(mixtures[1]) == parts(mixtures[2])
    assert parts(mixtures[0].experts) == parts(mixtures[1].experts)
    assert parts(mixtures[0].shared_experts) != parts(mixtures[1].shared_experts)
    (classes,) = one_rank.run(megatron_spec_cases.moe)
    layer = "decoder.layers.0"
    assert classes[f"{layer}.self_attention.linear_qkv"] == "LowBitColumnParallelLinear"
    assert classes[f"{layer}.self_attention.linear_proj"] == "LowBitRowParallelLinear"
    expected = {
        f"{layer}.mlp": "MoELayer",
        f"{layer}.mlp.router": "TopKRouter",
        f"{layer}.mlp.shared_experts": "SharedExpertMLP",
        f"{layer}.mlp.shared_experts.linear_fc1": "LowBitColumnParallelLinear",
        f"{layer}.mlp.shared_experts.linear_fc2": "LowBitRowParallelLinear",
        "output_layer": "ColumnParallelLinear",
        "embedding.word_embeddings": "VocabParallelEmbedding",
    }
    for expert in range(2):
        expected |= {
            f"{layer}.mlp.experts.local_experts.{expert}.linear_fc1": "ColumnParallelLinear",
            f"{layer}.mlp.experts.local_experts.{expert}.linear_fc2": "RowParallelLinear",
        }
    assert {name: classes[name] for name in expected} == expected


def test_transformer_engine_that_is_not_there(monkeypatch):
    """Its names are importable mocks, so that a spec can be written; nothing would run."""
    from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_lowbit.adapters.megatron.spec import lowbit_spec

    if transformer_engine.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    provider = transformer_engine_spec_provider.TESpecProvider
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider, raising=False)
    monkeypatch.setattr(transformer_engine_spec_provider, "is_te_min_version", lambda version: True)
    with pytest.raises(LowBitError, match=r"^the spec names Transformer Engine's layers, which is not installed;.*$"):
        lowbit_spec(gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(), "W4A8")


READY = {
    "llama_lowbit_spec": ("llama", "W4A8"),
    "llama_w4a16_spec": ("mistral", "W4A16"),
    "llama_w4a4_spec": ("qwen2", "W4A4"),
    "qwen3_lowbit_spec": ("qwen3", "W4A8"),
}


@pytest.mark.parametrize("name", READY)
def test_ready_specs(one_rank, name):
    """As `--spec megatron_lowbit.adapters.megatron NAME` and a Megatron checkpoint; against Hugging Face with an
    artifact of that scheme."""
    architecture, scheme = READY[name]
    (results,) = one_rank.run(megatron_spec_cases.built_by_name, name, architecture)
    assert results["before"] == {"NoneType"} and results["schemes"] == {scheme}
    assert results["kinds"] == {"LowBitColumnParallelLinear": 4, "LowBitRowParallelLinear": 4}
    hf = build(architecture)
    lowbit.apply_to_huggingface(hf, make_artifact(hf, scheme))
    assert_equal_but_for_flips(results["logits"], tiny_models.logits(hf, token_ids()), windows=1 / 4, flip=0.5)


def test_a_spec_without_a_scheme_is_megatrons_own(two_ranks):
    """Same names in the checkpoint, same bits, and the same artifact applies to both."""
    for results in two_ranks.run(megatron_spec_cases.unquantized_spec, make_artifact(build("llama"), "W4A8", (2,))):
        assert results["same_names"]
        assert torch.equal(results["built"], results["plain"]) and torch.equal(results["removed"], results["plain"])
        assert torch.equal(results["applied to built"], results["applied to plain"])
        assert not torch.equal(results["applied to built"], results["plain"])
