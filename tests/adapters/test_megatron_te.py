"""apply_to_megatron on a GPTModel of Transformer Engine's classes, by stand-ins: the package needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import megatron_te_cases
import pytest
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron, run_here
from tiny_models import build, make_artifact

from megatron_lowbit.artifact import Artifact

pytestmark = needs_megatron

LAYOUTS = [(1, False), (2, False), (2, True)]
QLLM = [
    *("model=embedded", "weights.scheme=W4A8", "weights.shard_groups=4", "calibration.data=stdlib:calibration"),
    *("calibration.samples=2", "calibration.sequence_length=64", "comm.tp_sizes=[2]", "correction.mode=none"),
    *("weights.attention=false", "reassembly.mode=fixed", "reassembly.expansion=0.05"),
]


def trained(artifact: Artifact) -> Artifact:
    """As if the norms had been trained: other gains."""
    checkpoint = artifact.checkpoint
    assert checkpoint is not None
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=generator)) if "layernorm" in name else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(artifact, checkpoint=replace(checkpoint, tensors=tensors))


def assert_alike(ranks: list[dict[str, Any]], names: list[str], exact: bool) -> None:
    for results in ranks:
        for name in ["unpatched", *names]:
            engine, local = results[name]
            if exact:
                assert torch.equal(engine, local), name
            else:  # the norm inside multiplies in another order, which may flip a code
                assert_equal_but_for_flips(engine, local, windows=1 / 4, flip=0.5)
            if name != "unpatched":
                assert (engine - results["unpatched"][0]).abs().max() > 1e-3
        assert torch.equal(results["removed"], results["unpatched"][0]) and results["same_modules"]


@pytest.mark.parametrize("fused", (True, False), ids=("norm inside", "norm outside"))
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
@pytest.mark.parametrize("architecture", ("llama with biases", "qwen2"))
def test_like_megatrons_own_classes(pool_of, architecture, size, sequence_parallel, fused):
    """qwen2 has biases on linear_qkv alone, so both of te_return_bias's values and both kinds of bias are met."""
    model, sizes = build(architecture), (2,) if size == 2 else ()
    given = {"W4A16": make_artifact(model, "W4A16"), "W8A8": make_artifact(model, "W8A8", sizes)}
    given["trained norms"] = trained(given["W8A8"])
    given |= {"plan": make_artifact(model, "none", sizes)} if sizes else {}
    ranks = pool_of(size).run(megatron_te_cases.compared, architecture, sequence_parallel, fused, given)
    assert_alike(ranks, list(given), exact=not fused)
    column = "LowBitLayerNormColumnParallelLinear" if fused else "LowBitColumnParallelLinear"
    norms = {} if fused else {"LowBitNorm": 4}
    for results in ranks:
        assert results["kinds"]["W4A16"] == {column: 4, "LowBitRowParallelLinear": 4}
        assert results["kinds"]["trained norms"] == {column: 4, "LowBitRowParallelLinear": 4, **norms}
        if sizes:
            assert results["kinds"]["plan"] == {"LowBitRowParallelLinear": 4}, "columns of Transformer Engine stay"
        assert (results["trained norms"][0] - results["W8A8"][0]).abs().max() > 1e-2


@pytest.fixture(scope="module")
def reassembled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reassembled")
    assert run_here("quantize", *QLLM, f"output_dir={folder}") == 0
    checkpoint = Artifact.load(folder).checkpoint
    assert checkpoint is not None
    assert {name.rpartition(".")[2] for name in checkpoint.reassembly} >= {
        "input_layernorm",
        "post_attention_layernorm",
    }
    return folder


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_a_reassembly_moves_into_the_linear(pool_of, reassembled, size, sequence_parallel):
    """There is no norm outside to carry it out; the plan is the norm's, the input the linear's."""
    ranks = pool_of(size).run(
        megatron_te_cases.compared, "embedded", sequence_parallel, True, {"reassembled": reassembled}
    )
    assert_alike(ranks, ["reassembled"], exact=False)
    for results in ranks:
        assert results["kinds"]["reassembled"] == {
            "LowBitLayerNormColumnParallelLinear": 12,
            "LowBitRowParallelLinear": 12,
        }


# A model that is built from a rewritten spec of Transformer Engine's


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_a_spec_packs_what_is_loaded(pool_of, size, sequence_parallel):
    """By either way of loading; the norms stay as they are, and their names are those of Transformer Engine, so that
    either kind of model reads the other's checkpoints."""
    for results in pool_of(size).run(megatron_te_cases.loaded_into_specs, "W4A8", sequence_parallel):
        outside = results["outside", "load_state_dict"]
        for how in ("load_state_dict", "load_weights"):
            assert_equal_but_for_flips(results["inside", how], outside, windows=1 / 4, flip=0.5)
            assert (results["inside", how] - results["plain"]).abs().max() > 1e-2
        assert results["inside", "kinds"] == {
            "LowBitLayerNormColumnParallelLinear": 4,
            "LowBitRowParallelLinear": 4,
        }
        full, packed = results["inside", "keys"]
        assert (full, packed) == results["outside", "keys"] and full != packed


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_a_spec_trains_straight_through(pool_of, size, sequence_parallel):
    """The same gradients as with the norms outside, those of the norms among them. W4A16, so that no activation lies
    between two codes: float32 sums of at most 344 products in another order, through two layers."""
    for results in pool_of(size).run(megatron_te_cases.first_gradients, "W4A16", sequence_parallel):
        inside, outside = results["inside"], results["outside"]
        assert inside.keys() == outside.keys() and len(inside) == 3 + 2 * 6
        assert sum("layer_norm_weight" in name for name in inside) == 4
        for name, expected in outside.items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(inside[name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)
