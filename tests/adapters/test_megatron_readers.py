"""A norm of a GPTModel puts out reassembled channels only where our linear alone reads them. tests/test_norm_readers.py
has the same of Hugging Face models."""

from __future__ import annotations

import megatron_readers_cases as cases
import pytest
import torch
from commands import needs_megatron
from reassembled_models import dense_twin, reassembled
from slow_cases import slow
from tiny_models import build, make_artifact

from megatron_lowbit.adapters.huggingface import apply as huggingface

pytestmark = needs_megatron

# What of layer 1's MLP stays in full precision.
LEFT = {
    "nothing": (),
    "class of its own": (),
    "forward of its own": (),
    "experts": ("gate_proj", "up_proj", "down_proj"),
}
NORMS = {f"decoder.layers.{layer}.{norm}" for layer in (0, 1) for norm in ("input_layernorm", "pre_mlp_layernorm")}


@pytest.mark.parametrize("merge", (True, False))
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", LEFT)
def test_whoever_else_reads_it_gets_the_plain_norm(pool_of, kind, size, sequence_parallel, merge):
    """Against the full-precision model with the effective weights; without merging, the widths would not even fit. A
    role is stored alike in all layers, so where one linear reassembles its own input, all of them do."""
    hf = build("llama")
    artifact = reassembled(hf, make_artifact(hf, "W4A16"), merge)
    left = [f"model.layers.1.mlp.{name}" for name in LEFT[kind]]
    ours = [name for name in huggingface.find_linears(hf) if name not in left]
    effective = dense_twin(hf, artifact, ours).state_dict()
    for results in pool_of(size).run(cases.applied, kind, sequence_parallel, artifact, effective):
        expected = results["expected"]
        # float32 rounding of matrix products over at most 172 inputs, through two layers
        torch.testing.assert_close(
            results["applied"], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item(), msg=kind
        )
        assert (results["applied"] - results["plain"]).abs().max() > 1e-2
        assert torch.equal(results["removed"], results["plain"])
        if "of its own" in kind:
            assert results["reassembling"] == {name for name in NORMS if "input" in name}
        else:
            assert results["reassembling"] == NORMS - ({"decoder.layers.1.pre_mlp_layernorm"} if left else set())
        which = f"{left[0]}, and {len(left) - 1} more" if left else ""
        said = [f"the artifact has quantized weights that find no linear to replace: {which}"] if left else []
        assert results["said"] == said


@pytest.mark.parametrize("kind", cases.UNKNOWN)
def test_a_model_is_never_quantized_in_part(two_ranks, kind):
    """Nothing is replaced, and the linears that would be left are named: of a block, and beside them."""
    for line, same in two_ranks.run(cases.refused, kind, make_artifact(build("llama"), "W4A8", (2,))):
        assert cases.UNKNOWN[kind] in line and "only in part" in line and "\n" not in line
        assert same


@pytest.mark.parametrize(
    ("kind", "merge"),
    [
        ("class of its own", False),
        ("experts", True),
        *(
            slow(*case)
            for case in [("nothing", True), ("nothing", False), ("class of its own", True), ("experts", False)]
        ),
    ],
)
def test_whoever_reassembles_is_saved(two_ranks, tmp_path, kind, merge):
    """In the norm or in the linear, and also where the inputs grow wider."""
    hf = build("llama")
    artifact = reassembled(hf, make_artifact(hf, "W4A16"), merge)
    assert two_ranks.run(cases.saved, kind, artifact, tmp_path / "checkpoint") == [(True, True)] * 2
