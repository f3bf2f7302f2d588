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
from megatron_lowbit.artifact import Artifact
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
    """Return, for every quantized layer, the upstream gradient, x.grad, and this rank's dequantized weight."""
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


# Training at a scheme: a model that is built from a low-bit spec, in Megatron's DistributedDataParallel


def in_training(scheme: str | None, sequence_parallel: bool, norms_inside: bool = False) -> tuple[Any, Any]:
    """(DistributedDataParallel, Megatron's Adam) of a GPTModel of a spec, into which a checkpoint has been loaded after
    both were made, as Megatron's scripts do. norms_inside: of a spec of Transformer Engine's."""
    import copy

    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron_te_cases import by_inner_names, low_bit_spec

    from megatron_lowbit.adapters.megatron import cpu_shims
    from megatron_lowbit.adapters.megatron import model as megatron_model
    from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

    hf = tiny_models.build("llama")
    config = megatron_model.transformer_config(hf.config, sequence_parallel=sequence_parallel)
    spec = block_spec(config)
    if scheme is not None:
        spec = low_bit_spec(config, scheme) if norms_inside else lowbit_spec(spec, scheme)
    model = megatron_model.build(hf.config, sequence_parallel=sequence_parallel, spec=spec).train()
    state = copy.deepcopy(gpt_model(hf, sequence_parallel).state_dict())
    state = by_inner_names(state) if norms_inside else state
    options = OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.0, clip_grad=0.0)
    with cpu_shims.cuda_is_cpu():
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(options, [wrapped])
    model.load_state_dict(state)
    return wrapped, optimizer


def optimized(optimizer: Any) -> set[int]:
    """Identities of the parameters that an optimizer of Megatron's updates."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    return {id(p) for part in inner for group in part.optimizer.param_groups for p in group["params"]}


def step(wrapped: Any, optimizer: Any) -> float:
    """One step of Megatron's own training: gradients into main_grad, reduced, and Adam's update."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_lowbit.adapters.megatron import cpu_shims

    with cpu_shims.cuda_is_cpu():
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(wrapped)
        loss.backward()
        finalize_model_grads([wrapped])
        assert optimizer.step()[0], "Megatron skipped the step"
    return loss.item()


def straight_through_gradients(rank: int, size: int, scheme: str, sequence_parallel: bool) -> dict[str, Any]:
    """Return of every linear of a spec: input, upstream gradient, output, x.grad, weight.grad, and its weight."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron.layout import find_linears

        wrapped, _ = in_training(scheme, sequence_parallel)
        results: dict[str, Any] = {}
        for path, layer in find_linears(wrapped.module).values():
            tokens = 8 // size if sequence_parallel and not layer.is_row else 8
            seed = 10 + (rank if layer.is_row or sequence_parallel else 0)
            x = normal(tokens, BATCH, layer.weight.shape[1], seed=seed).requires_grad_()
            layer.weight.main_grad.zero_()
            y, _ = layer(x)
            upstream = normal(*y.shape, seed=20 + (rank if sequence_parallel or not layer.is_row else 0))
            y.backward(upstream)
            results[path] = {
                "row": layer.is_row,
                "x": x.detach(),
                "upstream": upstream,
                "y": y.detach(),
                "grad": x.grad,
                "weight": layer.weight.detach().clone(),
                "weight_grad": layer.weight.main_grad.clone(),
            }
        return results


def trained_at_a_scheme(
    rank: int, size: int, scheme: str | None, sequence_parallel: bool, norms_inside: bool, steps: int, folder: Any
) -> dict[str, Any]:
    """Losses of a training that is saved after half of its steps, of one that goes on from there, and what moved."""
    from megatron_checkpoint_cases import writers

    with parallel(size), writers():
        from megatron.core import dist_checkpointing

        wrapped, optimizer = in_training(scheme, sequence_parallel, norms_inside)
        model = wrapped.module
        results: dict[str, Any] = {"orphans": len(optimized(optimizer) - {id(p) for p in model.parameters()})}
        results["parameters"] = len(optimized(optimizer))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = [step(wrapped, optimizer) for _ in range(steps // 2)]

        def state(wrapped: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
            sharded = wrapped.module.sharded_state_dict()
            return {"model": sharded, "optimizer": optimizer.sharded_state_dict(sharded, is_loading=loading)}

        dist_checkpointing.save(state(wrapped, optimizer, False), str(folder))
        losses += [step(wrapped, optimizer) for _ in range(steps // 2)]
        results["losses"] = losses
        results["moved"] = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
        again, other = in_training(scheme, sequence_parallel, norms_inside)
        loaded = dist_checkpointing.load(state(again, other, True), str(folder))
        again.module.load_state_dict(loaded["model"])
        other.load_state_dict(loaded["optimizer"])
        results["resumed"] = [step(again, other) for _ in range(steps // 2)]
        return results


def packed_or_trained(rank: int, size: int) -> dict[str, Any]:
    """What the load of a checkpoint leaves in a model of a W4A8 spec, and its logits, by what is about to happen."""
    import sys
    from types import SimpleNamespace

    from megatron_cases import logits

    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.layout import find_linears
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build("llama")
        spec = lowbit_spec(block_spec(megatron_model.transformer_config(hf.config)), "W4A8")
        state = gpt_model(hf).state_dict()

        def loaded(training: bool, frozen: bool = False, args: Any = None) -> Any:
            model = megatron_model.build(hf.config, spec=spec).train(training).requires_grad_(not frozen)
            name = "megatron.training.global_vars"
            if args is not None:
                sys.modules[name] = SimpleNamespace(_GLOBAL_ARGS=args)  # type: ignore[assignment]
            try:
                model.load_state_dict(state)
            finally:
                sys.modules.pop(name, None)
            kept = [layer.weight is not None for _, layer in find_linears(model).values()]
            assert len(set(kept)) == 1
            return kept[0], logits(model)

        wrapped, _ = in_training("W4A8", False)
        wrapped.eval()
        wrapped.module.load_state_dict(state)  # Megatron validates in eval mode
        held = all(layer.weight is not None for _, layer in find_linears(wrapped.module).values())
        return {
            "training": loaded(True),
            "eval": loaded(False),
            "frozen": loaded(True, frozen=True),
            "script that trains": loaded(True, args=SimpleNamespace(train_iters=10, train_samples=None)),
            "script that generates": loaded(True, args=SimpleNamespace(train_iters=None, train_samples=None)),
            "held by DistributedDataParallel": (held, logits(wrapped.module)),
        }


def said_at_first(rank: int, size: int) -> dict[str, list[str]]:
    """What is logged while models of specs are loaded, run and run again."""
    import logging

    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron import training as megatron_training
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        megatron_training.logger.addHandler(handler)
        found: dict[str, list[str]] = {}

        def heard(name: str) -> None:
            found[name] = list(lines)
            lines.clear()

        try:
            hf = tiny_models.build("llama")
            config = megatron_model.transformer_config(hf.config)
            state = gpt_model(hf).state_dict()
            loss_of(gpt_model(hf))
            lines.clear()
            for scheme, name in (("W4A8", "packed"), (None, "no scheme")):
                model = megatron_model.build(hf.config, spec=lowbit_spec(block_spec(config), scheme))
                model.load_state_dict(state)
                heard(name)
                loss_of(model)
                heard(f"{name}, run")
            model = megatron_model.build(hf.config, spec=lowbit_spec(block_spec(config), "W4A16")).train()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter)
            loss_of(model)
            loss_of(model)
            heard("from scratch")
            in_training("W4A8", False)
            heard("wrapped")
        finally:
            megatron_training.logger.removeHandler(handler)
        return found


def packed_weights_for_a_trained_model(rank: int, size: int, artifact: Artifact, plans: Artifact) -> dict[str, Any]:
    """What apply_to_megatron says to a model that DistributedDataParallel holds, and that it is as it was; plans."""
    from megatron_model_cases import said

    with parallel(size):
        wrapped, optimizer = in_training("W4A8", False)
        names = [name for name, _ in wrapped.named_modules()]
        results: dict[str, Any] = {"training": said(lowbit.apply_to_megatron, wrapped, artifact)}
        assert names == [name for name, _ in wrapped.named_modules()], "something was replaced"
        wrapped.eval()
        results["eval"] = said(lowbit.apply_to_megatron, wrapped, artifact)
        results["back to training"] = said(wrapped.train)
        lowbit.remove(wrapped)
        wrapped.train()
        own = loss_of(wrapped).item()
        lowbit.apply_to_megatron(wrapped, plans)
        results["orphans"] = len(optimized(optimizer) - {id(p) for p in wrapped.parameters()})
        results["losses"] = [step(wrapped, optimizer) for _ in range(STEPS_OF_PLANS)]
        results["own"] = own
        return results


STEPS_OF_PLANS = 6


def optimizers_before_a_load(rank: int, size: int) -> dict[str, Any]:
    """What an optimizer of torch's says to a step, that was made before a checkpoint came to a model of a W4A8 spec."""
    from megatron_model_cases import said

    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build("llama")
        spec = lowbit_spec(block_spec(megatron_model.transformer_config(hf.config)), "W4A8")
        state = gpt_model(hf).state_dict()
        results: dict[str, Any] = {}
        for name in ("load_state_dict", "load_weights", "load in training"):
            model = megatron_model.build(hf.config, spec=spec).train(name == "load in training")
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            if name == "load_weights":
                megatron_model.load_weights(model, hf.state_dict(), hf.config)
            else:
                model.load_state_dict(state)
            model.train()
            backward(model)
            before = {key: p.detach().clone() for key, p in model.named_parameters()}
            message = said(optimizer.step)
            moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
            torch.optim.SGD(model.parameters(), 0.1).step()
            again = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
            results[name] = message, moved, again
        return results
