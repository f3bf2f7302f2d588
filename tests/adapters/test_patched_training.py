"""Training a patched model: what is packed stays as it is, the rest is trained, and nothing is lost without a word."""

from __future__ import annotations

import pytest
import torch
from reassembled_models import dense_twin, reassembled
from tiny_models import build, logits, make_artifact, token_ids
from torch import Tensor, nn

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.config import LowBitError
from megatron_lowbit.layers.linear import QuantLinear
from megatron_lowbit.layers.reassembled_norm import ReassembledNorm


def loss_of(model: nn.Module) -> Tensor:
    ids = token_ids(length=12)
    return model(input_ids=ids, labels=ids).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reassembly", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "llama with biases"])
def test_gradients_are_those_of_the_effective_weights(architecture, reassembly):
    model = build(architecture)
    artifact = make_artifact(model, "W4A16")
    artifact = reassembled(model, artifact) if reassembly else artifact
    reference = gradients(dense_twin(model, artifact, list(huggingface.find_linears(model))))
    found = gradients(lowbit.apply_to_huggingface(model, artifact))
    packed = {f"{name}.weight" for name in huggingface.find_linears(lowbit.remove(model))}
    norms = {f"model.layers.{b}.{n}_layernorm.weight" for b in (0, 1) for n in ("input", "post_attention")}
    frozen = packed | (norms if reassembly else set())
    assert set(found) == set(reference) - frozen
    assert any(name.endswith("bias") for name in found) == ("biases" in architecture)
    for name, grad in found.items():
        # float32 sums of a few hundred products, in another order
        torch.testing.assert_close(grad, reference[name], rtol=1e-3, atol=1e-5 * reference[name].abs().max().item())
        assert grad.abs().max() > 0


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8", "W4A4"])
def test_what_is_left_is_trained_and_packed_weights_are_not(scheme):
    model = build("llama with biases")
    artifact = make_artifact(model, scheme, (2,))
    artifact = reassembled(model, artifact)
    lowbit.apply_to_huggingface(model, artifact, 2).train()
    held = {id(p) for group in torch.optim.AdamW(model.parameters()).param_groups for p in group["params"]}
    modules = [m for m in model.modules() if isinstance(m, QuantLinear | ReassembledNorm)]
    assert len(modules) == 2 * (5 + 2 * 2 + 2), "columns, two shards of each row, norms"
    inside = {n: t.clone() for i, m in enumerate(modules) for n, t in ((f"{i}.{n}", t) for n, t in m.named_buffers())}
    losses = train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), 8)
    assert losses[-1] < losses[0] - 1
    assert not held & {id(buffer) for m in modules for buffer in m.buffers()}
    for number, module in enumerate(modules):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, inside[f"{number}.{name}"]), name


@pytest.mark.parametrize("virtual_tp", [1, 2, 4])
def test_weights_of_low_bit_communication_are_trained(virtual_tp):
    """Sent as they are, the gradients are the unpatched model's; and remove leaves the trained weights."""
    model = build("llama with biases")
    expected = gradients(model)
    artifact = make_artifact(model, tp_sizes=(2, 4))
    found = gradients(lowbit.apply_to_huggingface(model, artifact, virtual_tp, "native"))
    assert len(found) == len(expected), "every parameter has a gradient, shared between virtual ranks"
    by_id = {id(p): p.grad for p in model.parameters()}
    lowbit.remove(model)
    for name, parameter in model.named_parameters():
        atol = 1e-4 * expected[name].abs().max().item()
        torch.testing.assert_close(by_id[id(parameter)], expected[name], rtol=1e-3, atol=atol)
    lowbit.apply_to_huggingface(model, artifact, virtual_tp).train()
    losses = train(model, torch.optim.AdamW(model.parameters(), 1e-2), 8)
    assert losses[-1] < losses[0] - 1
    lowbit.remove(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert (weight - build("llama with biases").model.layers[0].mlp.down_proj.weight).abs().max() > 0.01
    assert abs(loss_of(model).item() - losses[-1]) < 1


def test_an_optimizer_made_before_the_patch_is_refused():
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    artifact = make_artifact(model, "W4A8")
    lowbit.apply_to_huggingface(model, artifact)
    loss_of(model).backward()
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(LowBitError, match=r"^the optimizer trains the weight of model\.layers\.0\..*after apply_to_\*"):
        optimizer.step()
    assert torch.equal(model.model.embed_tokens.weight, before), "nothing was trained halfway"
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.model.embed_tokens.weight, before)
    lowbit.remove(model)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()  # all weights are in the model again
    torch.optim.SGD(build("llama").parameters(), 0.1).step()


def test_training_goes_on_from_a_state_that_was_saved(tmp_path):
    """Three steps, save, three more; a new process loads the state into a newly patched model."""
    artifact = make_artifact(build("llama"), "W4A8", (2,))

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = lowbit.apply_to_huggingface(build("llama"), artifact, 2).train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    model, optimizer = start()
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    model.save_pretrained(tmp_path / "folder")
    expected = train(model, optimizer, 3)
    model, optimizer = start()
    state = torch.load(tmp_path / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    saved = logits(model)
    assert train(model, optimizer, 3) == expected
    # The folder holds what was trained by then.
    fresh = build("llama")
    stored = lowbit.Artifact.load(tmp_path / "folder")
    fresh.load_state_dict(stored.checkpoint.tensors, strict=False)
    assert torch.equal(logits(lowbit.apply_to_huggingface(fresh, stored, 2)), saved)
    assert patching.original_modules(fresh)
