"""Gradients of low-bit layers and collectives on real ranks, Megatron's own or straight through the roundings; and
training at a scheme, in Megatron's DistributedDataParallel with its own optimizer."""

from __future__ import annotations

import megatron_training_cases as cases
import oracles
import pytest
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from megatron_cases import token_ids
from slow_cases import slow
from tiny_models import build, make_artifact, make_stats

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.config import CommConfig

pytestmark = needs_megatron

LAYOUTS = [False, True]
STEPS = 20


def wide_artifact() -> Artifact:
    """8-bit ranges of the very batch, three times as wide: what saturates has another gradient, rounding has not."""
    model, ids = build("llama"), token_ids()
    stats = make_stats(model, (2,), [(ids, torch.ones_like(ids, dtype=torch.bool))])
    wide = {
        name: FeatureRange(2 * r.min_vals - r.max_vals, 2 * r.max_vals - r.min_vals)
        for name, r in stats.ranges[2].items()
    }
    return Artifact(
        None, {2: build_plan(CalibrationStats({2: wide}, stats.fingerprint), 2, CommConfig(preset="paper", bits=8))}
    )


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
def test_a_plan_leaves_the_gradients_as_they_are(two_ranks, sequence_parallel):
    """The forward pass is rounded; backward is Megatron's mapping, so every bit of x.grad and weight.grad is its."""
    artifact = make_artifact(build("llama with biases"), tp_sizes=(2,))
    for results in two_ranks.run(cases.row_gradients, artifact, sequence_parallel):
        assert len(results) == 4
        for path, ((y, x_grad, weight_grad), (low_bit_y, low_bit_x_grad, low_bit_weight_grad)) in results.items():
            assert not torch.equal(y, low_bit_y), f"{path}: nothing was rounded"
            assert torch.equal(x_grad, low_bit_x_grad) and torch.equal(weight_grad, low_bit_weight_grad), path


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
@pytest.mark.parametrize("scheme", ("W4A16", "W4A8"))
def test_quantized_layers_pass_gradients_straight_through(two_ranks, scheme, sequence_parallel):
    """x.grad is the upstream gradient times the dequantized weight, in float64 here. Columns: summed over the ranks,
    which hold other rows; rows: the rank's own, of the upstream gradient of all tokens."""
    ranks = two_ranks.run(cases.quantized_gradients, make_artifact(build("llama"), scheme, (2,)), sequence_parallel)
    for path, first in ranks[0].items():
        of_rank = [results[path] for results in ranks]
        upstream = [r["upstream"].double() for r in of_rank]
        if first["row"] and sequence_parallel:
            upstream = [torch.cat(upstream)] * 2  # each rank got the gradient of its own tokens
        exact = [u @ r["weight"].double() for u, r in zip(upstream, of_rank, strict=True)]
        terms = [u.abs() @ r["weight"].double().abs() for u, r in zip(upstream, of_rank, strict=True)]
        if not first["row"]:
            exact, terms = [sum(exact)] * 2, [sum(terms)] * 2
            if sequence_parallel:
                exact, terms = (list(whole[0].chunk(2)) for whole in (exact, terms))
        # float32: a sum of at most 344 products, its two factors exact, and one sum over the ranks
        rounding = (first["weight"].shape[0] + 2) * oracles.EPS32
        for results, expected, magnitude in zip(of_rank, exact, terms, strict=True):
            assert ((results["grad"].double() - expected).abs() <= rounding * magnitude).all(), path
            assert results["parameters"] == [], "a packed weight is no parameter"


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
def test_first_gradients_are_those_without_rounding(two_ranks, sequence_parallel):
    """A step of three times a window's range, about 3 standard deviations, is 9/255 of one, and a rounding is off by
    1/sqrt(12) of it: 1 % of the values. Two ranks at four sites: 3 % at the logits, if they add up as independent
    errors do, and as much again on the way back. A cosine of 0.99 allows 14 %; a gradient that lacks a rank, a layer or
    its share of the tokens has less."""
    artifact = wide_artifact()
    for results in two_ranks.run(cases.first_step, artifact, sequence_parallel):
        patched, plain = results["patched"], results["plain"]
        assert patched.keys() == plain.keys() and len(plain) == 3 + 2 * 6
        for name, gradient in plain.items():
            assert not torch.equal(patched[name], gradient), name
            cosine = torch.cosine_similarity(patched[name].flatten(), gradient.flatten(), dim=0).item()
            assert cosine > 0.99, (name, cosine)
            assert 0.9 < (patched[name].norm() / gradient.norm()).item() < 1.1, name


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
def test_training_through_the_low_bit_collective(two_ranks, sequence_parallel):
    """Every parameter learns, those of the replaced layers among them, and they stay when the patch goes."""
    artifact = make_artifact(build("llama"), tp_sizes=(2,))
    ranks = two_ranks.run(cases.trained, artifact, sequence_parallel, STEPS)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    for results in ranks:
        assert results["losses"][-1] < 0.5 * results["losses"][0], results["losses"]
        assert results["moved"] == results["all"]
        assert results["removed"] < 0.7 * results["losses"][0], "without rounding it has learnt too"


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
def test_training_around_packed_weights(two_ranks, sequence_parallel):
    """Embedding, output layer and norms learn through them; codes, scales and zero points stay."""
    artifact = make_artifact(build("llama"), "W4A8", (2,))
    ranks = two_ranks.run(cases.trained, artifact, sequence_parallel, STEPS)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    for results in ranks:
        assert results["losses"][-1] < 0.5 * results["losses"][0], results["losses"]
        norms = {
            f"decoder.layers.{n}.{name}.weight" for n in range(2) for name in ("input_layernorm", "pre_mlp_layernorm")
        }
        others = {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"}
        assert results["moved"] == norms | others
        assert any("packed_weight" in name for name in results["all"])


# A model that is built from a low-bit spec


def rounded_rows(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Equation 2 of QLLM in float64: one range per row."""
    low, high = weight.double().amin(1, keepdim=True), weight.double().amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = -torch.round(low / scale)
    return ((torch.round(weight.double() / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("sequence_parallel", LAYOUTS, ids=("all-reduce", "sequence parallel"))
def test_a_trained_weight_is_rounded_forward_and_passed_straight_through(two_ranks, sequence_parallel):
    """W4A16, so that the input is its own oracle: y = x Q(W)^T, x.grad = dy Q(W), and main_grad = dy^T x, which is the
    gradient of the full-precision weight that DistributedDataParallel holds. Q(W) in float64, over both ranks' columns
    of a row-parallel weight."""
    ranks = two_ranks.run(cases.straight_through_gradients, "W4A16", sequence_parallel)
    assert len(ranks[0]) == 8
    for path, first in ranks[0].items():
        of_rank = [results[path] for results in ranks]
        weights = [r["weight"] for r in of_rank]
        if first["row"]:
            whole = rounded_rows(torch.cat(weights, 1), 4)
            rounded = list(whole.chunk(2, 1))
        else:
            rounded = [rounded_rows(weight, 4) for weight in weights]
        x, upstream = ([r[name].double() for r in of_rank] for name in ("x", "upstream"))
        if sequence_parallel:  # every rank computes with the tokens of both
            x = x if first["row"] else [torch.cat(x)] * 2
            upstream = [torch.cat(upstream)] * 2 if first["row"] else upstream
        products = [a @ w.T for a, w in zip(x, rounded, strict=True)]
        grads = [u @ w for u, w in zip(upstream, rounded, strict=True)]
        if first["row"]:
            products = [sum(products)] * 2
            products = list(products[0].chunk(2)) if sequence_parallel else products
        else:
            grads = list(sum(grads).chunk(2)) if sequence_parallel else [sum(grads)] * 2
        for results, y, grad, a, u in zip(of_rank, products, grads, x, upstream, strict=True):
            weight_grad = u.flatten(0, 1).T @ a.flatten(0, 1)
            for name, expected in (("y", y), ("grad", grad), ("weight_grad", weight_grad)):
                # float32: sums of at most 344 products of values below 10, and a scale that is rounded once
                torch.testing.assert_close(results[name].double(), expected, rtol=1e-4, atol=2e-4, msg=f"{path} {name}")


@pytest.mark.parametrize(
    ("sequence_parallel", "norms_inside"), [slow(False, False), slow(False, True), slow(True, False), (True, True)]
)
def test_training_at_a_scheme_is_saved_and_goes_on(two_ranks, tmp_path, sequence_parallel, norms_inside):
    """Megatron's own wrapper, optimizer and distributed checkpoint. All parameters that the optimizer holds are the
    model's and learn; the loss falls; and a training that is loaded from the middle makes the same steps."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranks = two_ranks.run(cases.trained_at_a_scheme, "W4A8", sequence_parallel, norms_inside, STEPS, folder)
    for results in ranks:
        assert results["orphans"] == 0 and results["parameters"] == 3 + 2 * 6
        assert all(results["moved"].values()), results["moved"]
        assert results["losses"][-1] < 0.5 * results["losses"][0], results["losses"]
        assert results["resumed"] == results["losses"][STEPS // 2 :]


def test_what_a_load_packs_and_what_it_leaves_to_be_trained(one_rank):
    """By the signs that megatron_training lists. Both ways compute with the same codes: float32 sums of at most 172
    terms in another order, and then the flips of an activation that lies between two codes."""
    (found,) = one_rank.run(cases.packed_or_trained)
    assert {name: kept for name, (kept, _) in found.items()} == {
        "training": True,
        "eval": False,
        "frozen": False,
        "script that trains": True,
        "script that generates": False,
        "held by DistributedDataParallel": True,
    }
    expected = found["eval"][1]
    for _, logits in found.values():
        assert_equal_but_for_flips(logits, expected, windows=1 / 4, flip=0.5)


def test_it_is_said_what_was_rounded(two_ranks):
    """In one line, by rank 0, once: when a checkpoint has come, or from scratch by the first step."""
    first, second = two_ranks.run(cases.said_at_first)
    assert all(lines == [] for lines in second.values())
    assert first["packed, run"] == first["no scheme"] == first["no scheme, run"] == []
    (packed,), (scratch,), (wrapped,) = first["packed"], first["from scratch"], first["wrapped"]
    assert "8 W4A8 rounded to nearest and packed; their weights are not trained" in packed
    assert "8 W4A16 rounded in every forward pass" in scratch and "call eval()" in scratch
    assert "8 W4A8 rounded in every forward pass" in wrapped and "call eval()" not in wrapped


def test_packed_weights_are_refused_where_an_optimizer_holds_the_weights(two_ranks):
    """In training; measured in eval mode they are allowed, but not trained. Plans alone leave the weights in place."""
    artifact, plans = make_artifact(build("llama"), "W4A8", (2,)), make_artifact(build("llama"), tp_sizes=(2,))
    for results in two_ranks.run(cases.packed_weights_for_a_trained_model, artifact, plans):
        assert results["training"].startswith("decoder.layers.0.self_attention.linear_")
        assert results["eval"] == "accepted"
        for name in ("training", "back to training"):
            assert "is being trained: DistributedDataParallel and the optimizer hold its weight" in results[name]
            assert len(results[name].splitlines()) == 1
        assert results["orphans"] == 0
        assert results["losses"][-1] < results["losses"][0]
        assert 0 < abs(results["losses"][0] - results["own"]) < 0.3, "plans round the sums of a rounded model"


def test_an_optimizer_made_before_weights_were_packed_is_refused(two_ranks):
    """It holds what is no longer in the model. One that is made afterwards trains the rest, and one made before a load
    in training mode all."""
    for results in two_ranks.run(cases.optimizers_before_a_load):
        for name in ("load_state_dict", "load_weights"):
            message, moved, again = results[name]
            assert message.startswith("the optimizer trains the weight of decoder.layers.0.self_attention.linear_")
            assert "packed when a checkpoint was loaded; make the optimizer after the load" in message
            assert len(message.splitlines()) == 1 and not moved and "output_layer.weight" in again
        message, moved, _ = results["load in training"]
        assert message == "accepted" and "decoder.layers.0.mlp.linear_fc1.weight" in moved
