"""Bits of every linear under one budget: the knapsack, and what rounding a weight is estimated to cost."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from tiny_models import build, embedded_folder, token_ids
from torch import Tensor

from megatron_lowbit.adapters.huggingface.apply import find_linears, sharing_bits
from megatron_lowbit.config import LowBitError, WeightsConfig
from megatron_lowbit.io.data import token_windows
from megatron_lowbit.quant.affine import fake_quantize
from megatron_lowbit.quant.rounding_costs import window_costs
from megatron_lowbit.quant.weight_bits import CANDIDATES, choose_bits

# The knapsack


def brute_force(sizes: dict[str, int], costs: dict[str, list[float]], budget: float) -> float:
    """The least cost of all 7^groups choices under the budget."""
    fitting = (
        sum(costs[name][bits - 2] for name, bits in zip(sizes, choice, strict=True))
        for choice in itertools.product(CANDIDATES, repeat=len(sizes))
        if sum(bits * size for bits, size in zip(choice, sizes.values(), strict=True)) <= budget * sum(sizes.values())
    )
    return min(fitting)


def random_case(seed: int, largest: int) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Four groups; costs mostly fall with the bits, as they do in models."""
    draw = random.Random(seed)
    sizes = {name: draw.randint(1, largest) for name in "dbca"}
    costs = {name: [draw.uniform(0.2, 1) * size * 4.0**-bits for bits in CANDIDATES] for name, size in sizes.items()}
    return sizes, costs


def bits_in_all(sizes: dict[str, int], bits: dict[str, int]) -> int:
    return sum(bits[name] * size for name, size in sizes.items())


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_solved_exactly(seed):
    sizes, costs = random_case(seed, 40)
    for budget in (2, 2.3, 3.1, 4, 4.5, 6.75, 8):
        bits, cost = choose_bits(sizes, costs, budget)
        assert bits_in_all(sizes, bits) <= budget * sum(sizes.values()) and set(bits) == set(sizes)
        assert cost == pytest.approx(sum(costs[name][bits[name] - 2] for name in sizes), rel=1e-12)
        assert cost == pytest.approx(brute_force(sizes, costs, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_large_sizes_without_a_common_factor(seed):
    """They are rounded up to 2^16 steps: the budget holds, and what one step per group less would allow is reached."""
    sizes, costs = random_case(seed, 10**9)
    total = sum(sizes.values())
    bits, cost = choose_bits(sizes, costs, 4.5)
    assert bits_in_all(sizes, bits) <= 4.5 * total
    less = 4.5 - len(sizes) * (4.5 - 2) / 2**15  # a step is at most twice the room's 2^16th
    assert brute_force(sizes, costs, 4.5) * (1 - 1e-12) <= cost <= brute_force(sizes, costs, less) * (1 + 1e-12)


def test_ties_are_decided_by_fewest_bits_and_then_by_name():
    flat, steps = [1.0] * 7, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert choose_bits({"b": 5, "a": 5}, {"a": flat, "b": flat}, 8)[0] == {"a": 2, "b": 2}
    for sizes in ({"b": 5, "a": 5}, {"a": 5, "b": 5}):  # room for one of the two to have 3 bits
        assert choose_bits(sizes, {"a": steps, "b": steps}, 2.5)[0] == {"a": 3, "b": 2}


# What rounding costs


@pytest.fixture(scope="module")
def model():
    return build("llama")


def linears_of(model) -> dict[str, torch.nn.Linear]:
    return {name: linear for name, (_, linear) in find_linears(model).items()}


@pytest.mark.parametrize("how", ({"symmetric": True}, {"zero_point": "real"}), ids=("symmetric", "real zero points"))
def test_costs_are_the_second_order_term(model, how):
    """1/2 sum (g D)^2 in float64, the labels drawn as documented. 1e-4: float32's 2^-24 in a gradient of sums over 12
    tokens and 2 blocks, which lose two to three digits to cancellation."""
    ids, config = token_ids(1, 12), WeightsConfig(scheme="W4A8", group_size=4, **how)
    found = window_costs(model, linears_of(model), ids, 7, config)
    probabilities = model(input_ids=ids).logits[0].detach().softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    exact = build("llama").double()
    weights = [linear.weight for linear in linears_of(exact).values()]
    loss = exact(input_ids=ids).logits[0].log_softmax(-1)[torch.arange(12), labels].sum()
    gradients = torch.autograd.grad(loss, weights)
    for name, weight, gradient in zip(found, weights, gradients, strict=True):
        for bits, cost in zip(CANDIDATES, found[name], strict=True):
            rounded = fake_quantize(weight.detach().float(), bits, config.symmetric, 4, real_zero=config.real_zero)
            error = rounded.double() - weight.detach()
            assert cost == pytest.approx(0.5 * (gradient * error).square().sum().item(), rel=1e-4), (name, bits)


def test_the_model_is_left_as_it_was(model):
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    window_costs(model, linears_of(model), token_ids(1, 12), 0, WeightsConfig(scheme="W4A8"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_no_number_of_threads_changes_a_bit():
    """Ranks share a machine's threads, so a job of two has half as many in each."""
    wide = build("llama", hidden_size=256, intermediate_size=704, max_position_embeddings=256)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(window_costs(wide, linears_of(wide), token_ids(1, 256), 0, WeightsConfig(scheme="W4A8")))
            assert torch.get_num_threads() == threads, "the caller's number is not what it was"
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def measured_kl(model, names: tuple[str, ...], bits: int, windows: Tensor, reference: Tensor) -> float:
    """KL per token with these linears rounded, in float64."""
    linears = linears_of(model)
    kept = {name: linears[name].weight.data.clone() for name in names}
    for name in names:
        linears[name].weight.data = fake_quantize(kept[name], bits)
    with torch.no_grad():
        rounded = model(input_ids=windows).logits.double().log_softmax(-1)
    for name in names:
        linears[name].weight.data = kept[name]
    return (reference.exp() * (reference - rounded)).sum(-1).mean().item()


def test_costs_are_the_measured_divergence():
    """A trained model, group by group. Costs were within 0.8 to 1.5 times for 3 to 8 bits of a model of five million
    parameters; a sample of labels and third-order terms are what they leave out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = token_windows(tokenizer, "stdlib:calibration", 4, 128, 512, "calibration", None).ids
    found = [
        window_costs(model, linears_of(model), ids.unsqueeze(0), seed, WeightsConfig(scheme="W4A8"))
        for seed, ids in enumerate(windows)
    ]
    with torch.no_grad():
        reference = model(input_ids=windows).logits.double().log_softmax(-1)
    pairs = []
    for names in sharing_bits(find_linears(model)).values():
        for bits in (3, 4, 6):
            cost = sum(costs[name][bits - 2] for costs in found for name in names) / windows.numel()
            pairs.append((cost, measured_kl(model, names, bits, windows, reference)))
    estimated, measured = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    ratio = estimated / measured
    assert ratio.min() > 0.5 and ratio.max() < 2, ratio
    ranks = torch.stack([values.argsort().argsort().double() for values in (estimated, measured)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95, "they rank the roundings otherwise"


def test_groups_share_what_hosts_fuse():
    """Megatron-Core's qkv and fc1 are one weight each."""
    groups = list(sharing_bits(find_linears(build("llama"))).values())[:4]
    leaves = {tuple(name.rpartition(".")[2] for name in names) for names in groups}
    assert leaves == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_nan_is_refused():
    broken = build("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(LowBitError, match="logits hold NaN or Inf"):
        window_costs(broken, linears_of(broken), token_ids(1, 8), 0, WeightsConfig(scheme="W4A8"))
