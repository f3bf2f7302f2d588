"""A norm puts out reassembled channels only where everything that reads them expects them."""

from __future__ import annotations

import warnings

import pytest
import tiny_models
import torch
from reassembled_models import dense_twin, reassembled
from tiny_models import FusedLinear, build, logits, make_artifact
from torch import Tensor, nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import readers
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.config import LowBitError
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm


class Routed(nn.Module):
    """An MLP behind a gate that is a parameter, not a linear."""

    def __init__(self, mlp: nn.Module, width: int):
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * torch.sigmoid(x @ self.gate)[..., None]


class Scored(nn.Module):
    """An MLP beside a linear that never writes the residual stream, like a router."""

    def __init__(self, mlp: nn.Module, width: int):
        super().__init__()
        self.mlp, self.router = mlp, nn.Sequential(nn.Linear(width, 2))
        torch.manual_seed(5)
        nn.init.normal_(self.router[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * self.router(x).softmax(-1)[..., :1]


def with_other_reader(kind: str) -> nn.Module:
    """llama, of which something in block 1 reads a norm beside the linears that are quantized."""
    model = build("llama")
    block = model.model.layers[1]
    if kind == "linear of another type":
        block.mlp.gate_proj.__class__ = FusedLinear
    elif kind == "attention's linear of another type":
        block.self_attn.k_proj.__class__ = FusedLinear
    else:
        block.mlp = {"gate parameter": Routed, "router": Scored}[kind](block.mlp, 64)
    return model.eval()


KINDS = ["linear of another type", "attention's linear of another type", "gate parameter", "router"]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_stays_in_full_precision_reads_the_plain_norm(kind, merge):
    """Against a full-precision model with the effective weights; without merging, the widths would not even fit."""
    whole = build("llama") if "type" in kind else with_other_reader(kind)
    artifact = reassembled(whole, make_artifact(whole, "W4A16"), merge)
    model = with_other_reader(kind)
    ours = list(huggingface.find_linears(model))
    expected = logits(dense_twin(model, artifact, ours))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowbit.apply_to_huggingface(model, artifact)
    # float32 rounding of matrix products over at most 172 inputs, through two blocks.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    plain = "input_layernorm" if "attention" in kind else "post_attention_layernorm"
    found = {name for name, module in model.named_modules() if isinstance(module, ReassembledNorm)}
    every = {
        f"model.layers.{block}.{norm}" for block in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert found == every - {f"model.layers.1.{plain}"}, "the other norms carry their reassembly out as ever"
    lowbit.remove(model)
    assert torch.equal(logits(model), logits(with_other_reader(kind)))


def test_a_norm_that_nobody_quantized_reads_stays():
    """Both MLP inputs of block 1 stay, so that its norm has no reader that expects reassembled channels."""
    model = build("llama")
    artifact = reassembled(model, make_artifact(model, "W4A16"))
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlp.get_submodule(name).__class__ = FusedLinear
    expected = logits(dense_twin(model, artifact, list(huggingface.find_linears(model))))
    with pytest.warns(UserWarning, match=r"no linear to replace: model\.layers\.1\.mlp\.gate_proj, and 2 more"):
        lowbit.apply_to_huggingface(model, artifact)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_model_of_an_artifact_alone_cannot_keep_linears():
    """Zeros stand for its weights until they are replaced."""
    model = build("llama")
    artifact = make_artifact(model, "W4A16")
    model.model.layers[0].mlp.gate_proj.__class__ = FusedLinear
    model._lowbit_fingerprint = artifact.checkpoint.fingerprint
    with pytest.raises(LowBitError, match=r"^model\.layers\.0\.mlp\.gate_proj: .*set model$"):
        lowbit.apply_to_huggingface(model, artifact)


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_what_a_run_shows(architecture):
    """Two norms of a block are read by quantized linears alone; to look changes neither model nor random numbers."""
    model = build(architecture).train()
    linears = {name: linear for name, (_, linear) in huggingface.find_linears(model).items()}
    state = torch.random.get_rng_state()
    reads = readers.reads_of_model(model, linears, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for block in range(2):
        path = f"model.layers.{block}"
        second = "pre_feedforward_layernorm" if architecture == "gemma2" else "post_attention_layernorm"
        for norm, owner in (("input_layernorm", "self_attn"), (second, "mlp")):
            found = reads.linears_of(f"{path}.{norm}")
            assert not reads.has_others(f"{path}.{norm}")
            columns = [name for name, (kind, _) in huggingface.find_linears(model).items() if kind == "column"]
            assert list(found) == [name for name in columns if name.startswith(f"{path}.{owner}.")]
    assert reads.has_others("model.norm"), "lm_head reads the last norm"


@pytest.mark.parametrize("kind", ["gate parameter", "router"])
def test_quantization_leaves_such_a_norm_alone_too(kind):
    """The groups that quantize works on: block 1's MLP linears reassemble their own input."""
    model = with_other_reader(kind)
    for index, block in enumerate(model.model.layers):
        path = f"model.layers.{index}."
        linears = {n.removeprefix(path): v for n, v in huggingface.find_linears(model).items() if n.startswith(path)}
        with torch.no_grad(), huggingface.input_groups(block, linears) as groups:
            model(input_ids=tiny_models.token_ids())
        norms = {group.owner.partition(".")[0]: group.norm for group in groups if group.kind == "column"}
        mlp_norm = "post_attention_layernorm" if index == 0 else None
        assert norms == {"self_attn": "input_layernorm", "mlp": mlp_norm}
