"""Gradients through low-bit layers and collectives: what workers of a RankPool run for test_megatron_training.py."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from megatron_cases import gpt_model, inputs, token_ids
from megatron_groups import parallel
from torch import Tensor
from torch import distributed as dist

import megatron_lowbit as lowbit
from megatron_lowbit.adapters import patching
from megatron_lowbit.artifacts import Artifact
from megatron_lowbit.kernels import dequantize, unpack_bits

BATCH = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def row_gradients(rank: int, size: int, artifact: Artifact, sequence_parallel: bool) -> dict[str, Any]:
    """(x.grad, weight.grad) of every row-parallel layer: Megatron's, and the one that takes its place."""
    with parallel(size):
        model = gpt_model(tiny_models.build("llama with biases"), sequence_parallel)
        lowbit.apply_to_megatron(model, artifact)
        results: dict[str, Any] = {}
        for path, host in patching.original_modules(model).items():
            twin: Any = model.get_submodule(path)
            pair = []
            for layer in (host, twin):
                x = normal(8, BATCH, host.weight.shape[1], seed=10 + rank).requires_grad_()
                y, bias = layer(x)
                assert bias is host.bias and y.shape[0] == (8 // size if sequence_parallel else 8)
                host.weight.grad = None
                # Without sequence parallelism all ranks hold the same output, and get the same gradient.
                y.backward(normal(*y.shape, seed=20 + (rank if sequence_parallel else 0)))
                pair.append((y.detach(), x.grad, host.weight.grad))
            results[path] = pair
        return results


def quantized_gradients(rank: int, size: int, artifact: Artifact, sequence_parallel: bool) -> dict[str, Any]:
    """Of every quantized layer: the upstream gradient, x.grad, and this rank's dequantized weight."""
    with parallel(size):
        model = gpt_model(tiny_models.build("llama"), sequence_parallel)
        lowbit.apply_to_megatron(model, artifact)
        results: dict[str, Any] = {}
        for path in patching.original_modules(model):
            layer: Any = model.get_submodule(path)
            linear = layer.low_bit.shards[0] if layer.is_row else layer.low_bit
            tokens = 8 // size if sequence_parallel and not layer.is_row else 8
            seed = 10 + (rank if layer.is_row or sequence_parallel else 0)
            x = normal(tokens, BATCH, linear.in_features, seed=seed).requires_grad_()
            y, _ = layer(x)
            upstream = normal(*y.shape, seed=20 + (rank if sequence_parallel or not layer.is_row else 0))
            y.backward(upstream)
            codes = unpack_bits(linear.packed_weight, linear.weight_bits, linear.in_features)
            results[path] = {
                "row": layer.is_row,
                "upstream": upstream,
                "grad": x.grad,
                "weight": dequantize(codes, linear.scale, linear.zero_point),
                "parameters": [name for name, _ in layer.named_parameters()],
            }
        return results


def loss_of(model: Any) -> Tensor:
    """Next-token loss of one fixed batch, by Megatron's own vocabulary-parallel cross entropy."""
    ids = token_ids()
    return model(*inputs(ids), labels=ids.roll(-1, 1)).mean()


def backward(model: Any) -> Tensor:
    """One step's loss and gradients; those of parameters that each rank used on its own tokens are summed, as
    Megatron's finalize_model_grads does."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model)
    loss.backward()
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and model.config.sequence_parallel:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
    return loss.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    """By the names of Megatron's own layers."""
    loss = backward(model)
    assert loss.isfinite()
    return {
        name.replace(".low_bit.shards.0", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def first_step(rank: int, size: int, artifact: Artifact, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    """Gradients of a patched model, and of an unpatched one without sequence parallelism."""
    with parallel(size):
        hf = tiny_models.build("llama")
        patched, plain = gpt_model(hf, sequence_parallel).train(), gpt_model(hf).train()
        lowbit.apply_to_megatron(patched, artifact)
        return {"patched": gradients(patched), "plain": gradients(plain)}


def trained(rank: int, size: int, artifact: Artifact, sequence_parallel: bool, steps: int) -> dict[str, Any]:
    """Losses of AdamW on one batch, which parameters moved, and whether every packed weight is what it was."""
    with parallel(size):
        model = gpt_model(tiny_models.build("llama"), sequence_parallel).train()
        lowbit.apply_to_megatron(model, artifact)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            losses.append(backward(model).item())
            optimizer.step()
        losses.append(loss_of(model).item())
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, model.state_dict()[name])}
        lowbit.remove(model)
        return {"losses": losses, "moved": moved, "all": set(before), "removed": loss_of(model).item()}
