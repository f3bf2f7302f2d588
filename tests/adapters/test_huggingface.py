"""Patched Hugging Face models against the unpatched ones, and against models quantized by other code."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict

import pytest
import tiny_models
import torch
from tiny_models import ARCHITECTURES, build, logits, make_artifact, make_stats, save_artifact
from torch import Tensor, nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.config import CommConfig, LowBitError
from megatron_lowbit.layers.linear import QuantLinear, QuantRowParallelLinear

FUSED = {"qkv_proj": "self_attn", "gate_up_proj": "mlp"}
SEPARATE = dict.fromkeys(["q_proj", "k_proj", "v_proj"], "self_attn") | dict.fromkeys(["gate_proj", "up_proj"], "mlp")
ROWS = {"o_proj": "self_attn", "down_proj": "mlp"}
BF16_ROUNDING = 2.0**-8  # relative: half a unit in the last of 8 significant bits


@functools.cache
def original(architecture: str) -> tuple[nn.Module, Tensor]:
    """A model that no test touches, and its logits."""
    model = build(architecture)
    return model, logits(model)


def expected_names(architecture: str) -> dict[str, str]:
    columns = FUSED if architecture == "phi3" else SEPARATE
    kinds = {f"{owner}.{name}": "column" for name, owner in columns.items()}
    kinds |= {f"{owner}.{name}": "row" for name, owner in ROWS.items()}
    return {f"model.layers.{layer}.{name}": kind for layer in range(2) for name, kind in kinds.items()}


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Energy of the difference over energy of the reference."""
    return ((y.double() - reference.double()).square().sum() / reference.double().square().sum()).item()


def quantized_by_hand(weight: Tensor, bits: int) -> Tensor:
    """Min-max quantization per output channel in float64: what round to nearest means, written down again."""
    low, high = weight.double().amin(1, keepdim=True), weight.double().amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    codes = ((weight.double() / step).round() + zero).clip(0, 2**bits - 1)
    return (codes - zero) * step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_are_found_by_structure(architecture):
    model, _ = original(architecture)
    found = huggingface.find_linears(model)
    assert {name: kind for name, (kind, _) in found.items()} == expected_names(architecture)
    assert all(linear is model.get_submodule(name) for name, (_, linear) in found.items())
    # Whatever else is linear stays as it is: that is lm_head alone.
    left = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)} - set(found)
    assert left == {"lm_head"}


def test_linears_outside_attention_and_mlp_are_left_alone():
    """A lone linear, like a router, and a pair that never writes hidden_size features have no row-parallel half."""
    model = build("llama")
    block = model.model.layers[0]
    block.router = nn.Sequential(OrderedDict(gate=nn.Linear(64, 64)))
    block.scorer = nn.Sequential(OrderedDict(up=nn.Linear(64, 16), down=nn.Linear(16, 4)))
    # One that neither reads nor writes the residual stream, inside an MLP that has both.
    block.mlp.inner = nn.Linear(172, 172)
    assert {name: kind for name, (kind, _) in huggingface.find_linears(model).items()} == expected_names("llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_quantized_on_one_rank_is_the_model_itself(architecture):
    model = build(architecture)
    assert lowbit.apply_to_huggingface(model, Artifact()) is model
    assert len(patching.row_parallel_modules(model)) == 4
    # The same matrix products on the same weights; a bias is added afterwards instead of inside, one float32 rounding.
    torch.testing.assert_close(logits(model), original(architecture)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("virtual_tp", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_quantized_on_virtual_ranks(architecture, virtual_tp):
    model, sites = build(architecture), {}

    def check(name: str):
        linear = original(architecture)[0].get_submodule(name)

        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x, weight = inputs[0].double(), linear.weight.double()
            partials = torch.stack(
                [a @ b.T for a, b in zip(x.chunk(virtual_tp, -1), weight.chunk(virtual_tp, 1), strict=True)]
            )
            bias = 0.0 if linear.bias is None else linear.bias.double()
            error = (output.double() - partials.sum(0) - bias).abs()
            # One bf16 rounding per rank, one of their sum; float32 sums of at most 172 products, and of the bias.
            magnitude = partials.abs().sum(0)
            float32 = 2.0**-24 * (x.shape[-1] + 4) * (x.abs() @ weight.abs().T + abs(bias))
            assert (error <= 2 * BF16_ROUNDING * (1 + BF16_ROUNDING) * magnitude + float32).all()
            assert error.max() > float32.max(), "the sum was not rounded to bf16 at all"
            sites[name] = True

        return hook

    lowbit.apply_to_huggingface(model, Artifact(), virtual_tp, comm_mode="bf16")
    for name, module in patching.row_parallel_modules(model).items():
        module.register_forward_hook(check(name))
    y = logits(model)
    assert sorted(sites) == sorted(name for name, kind in expected_names(architecture).items() if kind == "row")
    # A rounding to bf16 is at most 2^-8 of a value, so its energy at most 2^-16 / 3 = 5e-6 of the value's. There are up
    # to 5 roundings at each of 4 sites, of partial sums that may be larger than their sum: times 10, that is 1e-3.
    assert 0 < relative_error(y, original(architecture)[1]) < 1e-3
    for name, traffic in patching.site_traffic(model).items():
        assert (traffic.values, traffic.bits_per_value) == (tiny_models.token_ids().numel() * 64, 16.0), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_only_equals_a_model_with_rounded_weights(architecture):
    model = build(architecture)
    rounded = copy.deepcopy(model)
    for name, linear in rounded.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data.copy_(quantized_by_hand(linear.weight, 4))
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A16"))
    expected = logits(rounded)
    # float32 rounding of matrix products over at most 172 inputs, through two blocks.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert relative_error(expected, original(architecture)[1]) > 1e-3, "4 bits changed nothing"


@pytest.mark.parametrize("virtual_tp", [1, 2, 4])
def test_shards_are_columns_of_the_rounded_weight(virtual_tp):
    """172 columns over four ranks: 43 each, so that a shard begins inside a packed byte."""
    model = build("llama")
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A16"), virtual_tp)
    for name, site in patching.row_parallel_modules(model).items():
        weight = original("llama")[0].get_submodule(name).weight
        width = weight.shape[1] // virtual_tp
        columns = torch.cat([shard(torch.eye(width)) for shard in site.shards])  # each puts out its own columns
        torch.testing.assert_close(columns.T.double(), quantized_by_hand(weight, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_w8a8_is_close_and_w4a4_is_not(architecture):
    model = build(architecture)
    errors = {}
    for scheme in ("W8A8", "W4A4"):
        lowbit.apply_to_huggingface(model, make_artifact(lowbit.remove(model), scheme))
        errors[scheme] = relative_error(logits(model), original(architecture)[1])
    # A row of Gaussian values spans about 5 deviations; its 255 steps of 5/255 have a noise energy of (5/255)^2 / 12 =
    # 3.2e-5. Weights and inputs of 14 linears: 9e-4 if all of it added up. 4 bits: 17^2 times as much.
    assert 0 < errors["W8A8"] < 1e-2
    assert errors["W4A4"] > 20 * errors["W8A8"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_remove_restores_the_very_same_modules(architecture):
    model = build(architecture)
    modules = {name: id(module) for name, module in model.named_modules()}
    keys, training = list(model.state_dict()), model.training
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A8", (2,)), 2)
    assert relative_error(logits(model), original(architecture)[1]) > 1e-4
    assert sum(isinstance(m, QuantRowParallelLinear) for m in model.modules()) == 4
    assert lowbit.remove(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == keys and model.training == training
    assert torch.equal(logits(model), original(architecture)[1])
    assert patching.original_modules(model) == {}  # a second remove finds nothing
    assert torch.equal(logits(lowbit.remove(model)), original(architecture)[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_applying_twice_is_applying_once(architecture):
    model = build(architecture)
    artifact, other = make_artifact(model, "W4A8", (2,)), make_artifact(model, "W8A8", (4,))
    once = logits(lowbit.apply_to_huggingface(model, artifact, 2))
    names = [name for name, _ in model.named_modules()]
    assert torch.equal(logits(lowbit.apply_to_huggingface(model, artifact, 2)), once)
    assert [name for name, _ in model.named_modules()] == names
    # Another artifact replaces the first one, it is not put on top.
    lowbit.apply_to_huggingface(model, other, 4)
    assert torch.equal(logits(lowbit.apply_to_huggingface(model, artifact, 2)), once)
    assert torch.equal(logits(lowbit.remove(model)), original(architecture)[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hybrid_error_shrinks_with_more_bits(architecture):
    model, errors = build(architecture), {}
    ids = tiny_models.token_ids(1, 48)
    stats = make_stats(model, (2,), [(ids, ids > 0)])  # on this very window, so that hardly a value leaves its range
    for bits in (4, 6, 8):
        artifact = Artifact(None, {2: build_plan(stats, 2, CommConfig(preset="paper", bits=bits))})
        y = logits(lowbit.apply_to_huggingface(model, artifact, 2), ids)
        errors[bits] = relative_error(y, logits(lowbit.remove(model), ids))
    # Two more bits are four times the levels, so a sixteenth of the energy. The errors of the first block move values
    # of the second a little beyond their range, which does not shrink as fast: a quarter is asked for.
    assert errors[4] > 4 * errors[6] > 16 * errors[8] > 0
    assert errors[4] < 0.5, "the patched model has lost its function"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_artifact_gives_the_same_logits(architecture, tmp_path):
    model = build(architecture)
    artifact = make_artifact(model, "W4A8", (2, 4))
    folder = save_artifact(artifact, tmp_path / "artifact")
    for virtual_tp in (1, 2, 4):
        expected = logits(lowbit.apply_to_huggingface(model, artifact, virtual_tp))
        for given in (folder, str(folder), Artifact.load(folder)):
            assert torch.equal(logits(lowbit.apply_to_huggingface(build(architecture), given, virtual_tp)), expected)


def test_row_parallel_inputs_are_quantized_alike_at_every_tp_size():
    """Activation scales are per shard group, so the shard of a site does not depend on the number of ranks."""
    model = build("mistral")
    artifact = make_artifact(model, "W4A8")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    sums = {}
    for virtual_tp in (1, 2, 4, 8):
        lowbit.apply_to_huggingface(model, artifact, virtual_tp)
        site = patching.row_parallel_modules(model)["model.layers.0.self_attn.o_proj"]
        slices = zip(site.shards, x.chunk(virtual_tp, dim=1), strict=True)
        sums[virtual_tp] = torch.stack([shard(part) for shard, part in slices]).sum(0)
    for virtual_tp in (2, 4, 8):  # the same integers; only float32 sums of 128 products differ
        torch.testing.assert_close(sums[virtual_tp], sums[1], rtol=1e-5, atol=1e-4)


def test_generate_runs_on_a_patched_model():
    model = build("llama")
    ids = tiny_models.token_ids(2, 5)
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    lowbit.apply_to_huggingface(model, make_artifact(model, "W8A8", (2,), bits=8), 2)
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert out.shape == expected.shape == (2, 11) and torch.equal(out[:, :5], ids)


@pytest.mark.parametrize("training", [False, True])
def test_modules_take_the_mode_of_what_they_replace(training):
    model = build("llama").train(training)
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A8"))
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    assert {m.training for m in model.modules()} == {training}


def test_lm_head_and_embedding_stay_tied():
    model = build("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    lowbit.apply_to_huggingface(model, make_artifact(model, "W4A8", (2,)), 2)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("part", ["checkpoint", "plan"])
def test_artifact_of_another_model_is_refused(part):
    other = build("llama", intermediate_size=96)
    artifact = make_artifact(other, "W4A8") if part == "checkpoint" else make_artifact(other, tp_sizes=(2,))
    with pytest.raises(LowBitError, match=r"belongs to another model .*intermediate_size 96 there, 172 here"):
        lowbit.apply_to_huggingface(build("llama"), artifact, 2)
    # The same shapes, other weights.
    tuned = build("llama")
    artifact = make_artifact(tuned, "W4A8") if part == "checkpoint" else make_artifact(tuned, tp_sizes=(2,))
    tuned.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1.0
    with pytest.raises(LowBitError, match=r"other values in 1 of 14 weights, the first model\.layers\.1\.mlp\.down"):
        lowbit.apply_to_huggingface(tuned, artifact, 2)


def test_artifact_for_another_tp_size_is_refused(tmp_path):
    model = build("llama")
    artifact = make_artifact(model, tp_sizes=(2,))
    with pytest.raises(
        LowBitError, match=r"no communication plan for tp_size 4 \(there are \[2\]\).*comm.tp_sizes=\[4\]"
    ):
        lowbit.apply_to_huggingface(model, artifact, 4)
    with pytest.raises(LowBitError, match=r"no communication plan for tp_size 2"):
        lowbit.apply_to_huggingface(model, Artifact(), 2, comm_mode="one_shot")
    with pytest.raises(LowBitError, match="does not exist"):
        lowbit.apply_to_huggingface(model, tmp_path / "nowhere", 2)
    with pytest.raises(LowBitError, match=r"no lowbit\.json and no comm_plan_tp"):
        lowbit.apply_to_huggingface(model, tmp_path, 2)
    assert torch.equal(logits(model), original("llama")[1])


def test_bf16_communication_can_be_asked_for_despite_a_plan():
    model = build("llama")
    artifact = make_artifact(model, tp_sizes=(2,))
    expected = logits(lowbit.apply_to_huggingface(model, Artifact(), 2, comm_mode="bf16"))
    assert torch.equal(logits(lowbit.apply_to_huggingface(model, artifact, 2, comm_mode="bf16")), expected)


def test_virtual_tp_that_does_not_divide_the_model_is_refused():
    with pytest.raises(
        LowBitError, match=r"virtual_tp=3 does not divide the model's num_attention_heads=8.*\[1, 2, 4\]"
    ):
        lowbit.apply_to_huggingface(build("llama"), Artifact(), 3)
    with pytest.raises(LowBitError, match=r"virtual_tp=8 does not divide the model's intermediate_size=172"):
        lowbit.apply_to_huggingface(build("llama"), Artifact(), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowbit.apply_to_huggingface(build("mistral"), Artifact(), 8)  # KV heads do not bind virtual ranks


def test_a_model_without_decoder_blocks_is_refused():
    class Flat(nn.Module):
        config = build("llama").config

    with pytest.raises(LowBitError, match="Flat has no list of 2 decoder blocks"):
        lowbit.apply_to_huggingface(Flat(), Artifact())
