"""Injected outlier channels: the model's function stays, the activations grow (adapters/outliers.py)."""

from __future__ import annotations

import functools

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.outliers import inject_outliers, outlier_scales, scale_linear, scale_norm
from megatron_lowbit.config import LowBitError

MODELS = ("llama", "gemma2", "mistral", "qwen2", "llama with biases")  # mistral: head_dim 16, attention of width 128
PLACES = ("norm", "up_down", "v_o")
# The linears whose inputs get outliers, and whose columns are divided.
READERS = {
    "norm": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    "up_down": ("down_proj",),
    "v_o": ("o_proj",),
}


@functools.cache
def original(architecture: str) -> tuple[nn.Module, Tensor]:
    model = tiny_models.build(architecture)
    return model, tiny_models.logits(model)


def injected(architecture: str, factor: float, *at: str, seed: int = 0) -> nn.Module:
    model = tiny_models.build(architecture)
    inject_outliers(model, factor, at, seed)
    return model


@torch.inference_mode()
def inputs(model: nn.Module) -> dict[str, Tensor]:
    """{fqn of a linear: max|x| of each of its input channels}, on the usual ids."""
    seen: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).abs().amax(0))
        )
        for name, (_, linear) in huggingface.find_linears(model).items()
    ]
    tiny_models.logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("at", [(place,) for place in PLACES] + [PLACES], ids="+".join)
@pytest.mark.parametrize("factor", (2.0, 64.0))
def test_powers_of_two_leave_every_bit(architecture, at, factor):
    """Scaling by 2^k commutes with every rounding in between. So it does with Gemma's 1 + weight for k >= 0: gain * s
    - 1 is a multiple of the last place of gain * s."""
    _, before = original(architecture)
    model = injected(architecture, factor, *at)
    assert torch.equal(tiny_models.logits(model), before)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("at", [(place,) for place in PLACES] + [PLACES], ids="+".join)
@pytest.mark.parametrize("factor", (10.0, 0.1))
def test_other_factors_leave_the_function(architecture, at, factor):
    """Each scaled weight is rounded once more, 2^-24; through two blocks the logits stay within 2^-17."""
    _, before = original(architecture)
    after = tiny_models.logits(injected(architecture, factor, *at))
    assert (after - before).abs().max() <= 2.0**-17 * before.abs().max()


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("place", PLACES)
def test_outliers_appear(architecture, place):
    """1 % of the channels, one of these widths at least, are exactly 64 times larger in what reads them; no other."""
    before, after = inputs(original(architecture)[0]), inputs(injected(architecture, 64.0, place))
    for name in before:
        ratio = after[name] / before[name]
        scaled = ratio == 64
        assert ((ratio == 1) | scaled).all(), name
        chosen = max(1, round(0.01 * len(ratio)))
        if place == "v_o":  # of V's channels, each read by two query heads
            chosen = max(1, round(0.01 * len(ratio) / 2)) * 2
        assert int(scaled.sum()) == (chosen if name.endswith(READERS[place]) else 0), name


@pytest.mark.parametrize("architecture", ("llama", "gemma2"))
@pytest.mark.parametrize("place", PLACES)
def test_outliers_are_outliers(architecture, place):
    """A factor of 64 puts the scaled channel above all others of most of the linears that read it."""
    after = inputs(injected(architecture, 64.0, place))
    above = []
    for name, peak in after.items():
        if name.endswith(READERS[place]):
            above.append((peak.amax() / peak.median()).item() > 8)
    assert sum(above) >= 0.8 * len(above)


def test_all_places_together():
    """Each place's outliers are there, and each weight has the factors of both its sides."""
    before = inputs(original("mistral")[0])
    after = inputs(injected("mistral", 64.0, *PLACES))
    for name in before:
        ratio = after[name] / before[name]
        assert set(ratio.tolist()) == {1.0, 64.0}, name


def test_grouped_query_attention():
    """A row of V belongs to the same channel of every query head of its group: head h reads KV head h // 2."""
    model, plain = injected("llama", 64.0, "v_o"), original("llama")[0]
    for block, before in zip(model.model.layers, plain.model.layers, strict=True):
        rows = (block.self_attn.v_proj.weight / before.self_attn.v_proj.weight).amax(1)  # 4 heads of 8 channels
        columns = (block.self_attn.o_proj.weight / before.self_attn.o_proj.weight).amin(0)  # 8 heads of 8
        (row,) = (rows == 64).nonzero().flatten().tolist()
        head, channel = divmod(row, 8)
        assert (columns == 1 / 64).nonzero().flatten().tolist() == [(2 * head + g) * 8 + channel for g in (0, 1)]
        assert int((columns == 1).sum()) == 62 and int((rows == 1).sum()) == 31


def test_weights_are_scaled_where_they_should():
    """norm: the gain and the columns of exactly the linears that read it; up_down: rows of up, not of gate."""
    plain = original("llama")[0].state_dict()
    for place, changed in {
        "norm": {"input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        "up_down": {"up_proj", "down_proj"},
        "v_o": {"v_proj", "o_proj"},
    }.items():
        after = injected("llama", 64.0, place).state_dict()
        different = {name.split(".")[-2] for name in plain if not torch.equal(plain[name], after[name])}
        assert different == changed, place


def test_biases_of_scaled_rows():
    """The output of up and v is scaled, so their bias is; the biases of what reads a norm are not."""
    plain, after = original("llama with biases")[0], injected("llama with biases", 64.0, *PLACES)
    attention, before = after.model.layers[0].self_attn, plain.model.layers[0].self_attn
    ratio = attention.v_proj.bias / before.v_proj.bias
    assert sorted(set(ratio.tolist())) == [1.0, 64.0] and int((ratio == 64).sum()) == 1
    assert torch.equal(attention.q_proj.bias, before.q_proj.bias)
    assert torch.equal(attention.o_proj.bias, before.o_proj.bias)


def test_seed_and_block_choose_the_channels():
    """The same seed chooses the same channels; another seed, and the next block, others."""

    def scaled(model: nn.Module) -> list[Tensor]:
        plain = original("llama")[0]
        pairs = zip(model.model.layers, plain.model.layers, strict=True)
        return [a.mlp.down_proj.weight != b.mlp.down_proj.weight for a, b in pairs]

    first = scaled(injected("llama", 64.0, "up_down"))
    assert all(map(torch.equal, first, scaled(injected("llama", 64.0, "up_down"))))
    assert not any(map(torch.equal, first, scaled(injected("llama", 64.0, "up_down", seed=1))))
    assert not torch.equal(first[0], first[1])
    assert all(int(block[0].sum()) == 2 for block in first)  # round(1 % of 172)


def test_nothing_is_injected_at_no_place():
    model = injected("llama", 64.0)
    assert torch.equal(tiny_models.logits(model), original("llama")[1])
    assert all(map(torch.equal, model.state_dict().values(), original("llama")[0].state_dict().values()))


def group(linears: tuple[str, ...], kind: str = "column", norm: str | None = None) -> huggingface.InputGroup:
    return huggingface.InputGroup(kind, linears, "mlp", norm, "mlp.down")  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "linear"), [("up_down", "up_proj"), ("v_o", "v_proj")])
def test_unknown_place(place, linear):
    """Blocks without such a linear: the message says which key to change."""
    groups = [group(("mlp.fc1",)), group(("mlp.down",), "row")]
    config = tiny_models.build("llama").config
    with pytest.raises(LowBitError, match=rf"inject_at={place}.*no {linear}"):
        outlier_scales(groups, lambda name: (8, 8), config, 64.0, (place,), 0, 0)


def test_norm_that_is_no_rms_norm():
    norm = nn.LayerNorm(8)
    with pytest.raises(LowBitError, match="LayerNorm is no RMSNorm"):
        scale_norm(norm, torch.ones(8))
    assert torch.equal(norm.weight, torch.ones(8))


def test_shared_inputs_multiply():
    """A linear that reads a scaled norm and is itself scaled has both factors."""
    groups = [group(("mlp.up_proj",), norm="norm"), group(("mlp.down",), "row")]
    config = tiny_models.build("llama").config
    scales = outlier_scales(groups, lambda name: (200, 100), config, 4.0, ("norm", "up_down"), 0, 0)
    gain, none = scales["norm"]
    outputs, columns = scales["mlp.up_proj"]
    assert gain is not None and outputs is not None and columns is not None and none is None
    assert torch.equal(columns, 1 / gain) and len(gain) == 100 and len(outputs) == 200
    assert int((gain == 4).sum()) == 1 and int((outputs == 4).sum()) == 2
    down = scales["mlp.down"][1]
    assert down is not None and torch.equal(down, 1 / outputs)
    weight = torch.ones(200, 100)
    scale_linear(weight, outputs, columns)
    assert torch.equal(weight, torch.outer(outputs, columns))
