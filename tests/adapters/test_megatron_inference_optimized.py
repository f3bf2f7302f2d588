"""transformer_impl="inference_optimized", by stand-ins of its classes: they need Transformer Engine, so a GPU.

Under sequence parallelism its linears gather their input and reduce-scatter their output, so both halves of every
all-reduce travel, and both in low bits.
"""

from __future__ import annotations

import megatron_inference_optimized_cases as cases
import megatron_te_cases
import pytest
import torch
from closeness import assert_equal_but_for_flips
from commands import needs_megatron
from megatron_artifacts import gather_artifact
from megatron_te_cases import transformer_engine_installed
from tiny_models import build, make_artifact

from megatron_lowbit.config import LowBitError

pytestmark = needs_megatron

LAYOUTS = [(1, False), (2, True)]  # it refuses several ranks without sequence parallelism


@pytest.mark.parametrize("fused", (True, False), ids=("norm inside", "norm outside"))
@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_in_place(pool_of, size, sequence_parallel, fused):
    """Like Megatron's own classes with the same artifact; with a plan for the gather, too."""
    hf, sizes = build("llama"), (2,) if size == 2 else ()
    given = {"W4A16": make_artifact(hf, "W4A16"), "W8A8": gather_artifact(sizes, "W8A8")}
    options = ("llama", sequence_parallel, fused, given, "Inference")
    column = "LowBitLayerNormColumnParallelLinear" if fused else "LowBitColumnParallelLinear"
    for results in pool_of(size).run(megatron_te_cases.compared, *options):
        for name in ["unpatched", *given]:
            engine, local = results[name]
            # another order of float32 sums, which may flip a code of a norm's or a gather's output
            assert_equal_but_for_flips(engine, local, windows=1 / 4, flip=0.5)
        for name in given:
            assert results["kinds"][name] == {column: 4, "LowBitRowParallelLinear": 4}
            assert (results[name][0] - results["unpatched"][0]).abs().max() > 1e-3
        assert torch.equal(results["removed"], results["unpatched"][0]) and results["same_modules"]


@pytest.mark.parametrize(("size", "sequence_parallel"), LAYOUTS)
def test_by_the_spec(pool_of, size, sequence_parallel):
    options = ("W4A8", sequence_parallel, "Inference")
    for results in pool_of(size).run(megatron_te_cases.loaded_into_specs, *options):
        for how in ("load_state_dict", "load_weights"):
            assert_equal_but_for_flips(
                results["inside", how], results["outside", "load_state_dict"], windows=1 / 4, flip=0.5
            )
        assert results["inside", "kinds"] == {"LowBitLayerNormColumnParallelLinear": 4, "LowBitRowParallelLinear": 4}


def test_bytes_of_prefill_and_decode(two_ranks):
    """What leaves each of two ranks, of a prompt and of a token after it, in bfloat16 and in low bits.

    Each of the four linears of either kind sends half of the tokens to the other rank: 2 E bytes per token in bfloat16;
    in low bits 2 k for the k = E/16 widest features, and half a byte for each of the others. Megatron pads the tokens
    of a step, by rules of its own.
    """
    features = build("llama").config.hidden_size
    wide = features // 16
    artifact = gather_artifact((2,))
    for sent in two_ranks.run(cases.sent, artifact):
        for step in ("prefill", "decode"):
            full, low = sent["bfloat16"][step], sent["low bits"][step]
            half, rest = divmod(full["gathered"], 4 * 2 * features)
            assert half >= {"prefill": 8, "decode": 1}[step] and rest == 0
            assert full == dict.fromkeys(("scattered", "gathered"), 4 * half * 2 * features)
            assert low == dict.fromkeys(("scattered", "gathered"), 4 * half * (2 * wide + (features - wide + 1) // 2))
        assert sent["bfloat16"]["decode"] != sent["bfloat16"]["prefill"]


def test_its_specs_are_rewritten_whole():
    """Megatron's own spec of a GPT layer, and of a hybrid stack with its other kinds of layers."""
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_lowbit.adapters.megatron import lowbit_spec

    with transformer_engine_installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_layer_specs, "HAVE_TE", True)
        patch.setattr("megatron.core.models.backends.is_te_min_version", lambda version: True)
        layer = gpt_layer_specs.get_gpt_layer_with_inference_spec()
        assert cases.counted(layer) == (4, {})
        found = {"LowBitLayerNormColumnParallelLinear": 2, "LowBitRowParallelLinear": 2}
        assert cases.counted(lowbit_spec(layer)) == (0, found)
        hybrid = cases.hybrid_spec()
        before, after = cases.counted(hybrid), cases.counted(lowbit_spec(hybrid))
        assert before[0] >= 6 and after[0] == 0 and sum(after[1].values()) == before[0]


def test_a_spec_is_never_rewritten_in_part():
    from megatron_lowbit.adapters.megatron import lowbit_spec
    from megatron_lowbit.adapters.megatron.spec import llama_spec

    spec = cases.with_another(llama_spec(), "linear_fc2", cases.TheirRowParallelLinear)
    with pytest.raises(LowBitError, match=r"only in part.* mlp.linear_fc2 \(TheirRowParallelLinear\)"):
        lowbit_spec(spec, "W4A8")
    mixture = cases.with_another(llama_spec(experts=True), "linear_fc2", cases.TheirRowParallelLinear)
    with pytest.raises(LowBitError, match=r"know mlp.shared_experts.linear_fc2 \(TheirRowParallelLinear\); use"):
        lowbit_spec(mixture, "W4A8")
    with pytest.raises(LowBitError, match="names no ColumnParallelLinear"):
        lowbit_spec(cases.with_another(spec, None, cases.TheirRowParallelLinear), "W4A8")


@pytest.mark.parametrize("how", ["in place", "by the spec"])
def test_its_fused_kernel_is_refused(one_rank, how):
    """It reduces, norms and gathers in full precision. Nothing is replaced."""
    (line, same) = one_rank.run(cases.fused_refused, how, make_artifact(build("llama"), "W4A8"))[0]
    assert "inference_fuse_tp_communication" in line and "\n" not in line and same
