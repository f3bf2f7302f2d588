"""What workers of a RankPool run for test_megatron_experts.py: `case(rank, size, *args)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_models
import torch
from megatron_cases import gpt_model, logits, module_ids
from megatron_filler_cases import built, script
from megatron_groups import parallel
from megatron_model_cases import said
from torch import Tensor

import megatron_lowbit as lowbit
from megatron_lowbit.artifact import Artifact


def expert_parallel(rank: int, size: int, architecture: str, artifact: Artifact) -> dict[str, Any]:
    """Every rank has half of the experts, whole, and a copy of all else. Each copy sees all windows."""
    with parallel(1, ep=size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        model = gpt_model(hf)
        back = megatron_model.to_huggingface(model, hf.config)
        state = hf.state_dict()
        results = {
            "unpatched": logits(model),
            "experts": model.decoder.layers[0].mlp.num_local_experts,
            "back": all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items()),
        }
        lowbit.apply_to_megatron(model, artifact)
        results["applied"] = logits(model)
        experts = model.decoder.layers[0].mlp.experts
        results["nothing to do"] = experts(torch.empty(0, 64), torch.zeros(results["experts"]).long(), torch.empty(0))
        lowbit.remove(model)
        return results | {"removed": logits(model)}


def alone(rank: int, size: int, architecture: str, artifact: Artifact) -> dict[str, Any]:
    """Logits of a model that has never had full-precision experts, and of one that had; what was logged."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import apply
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        empty = megatron_model.build(hf.config)
        for parameter in empty.parameters():
            parameter.data.fill_(float("nan"))  # whatever is not loaded shows
        with mock.patch.object(apply.logger, "warning") as warning:
            megatron_model.load_checkpoint(empty, artifact, hf.config)
        told = [call.args[0] for call in warning.call_args_list]
        applied = logits(lowbit.apply_to_megatron(gpt_model(hf), artifact))
        return {"told": told, "alone": logits(empty), "applied": applied}


def by_spec(rank: int, size: int, name: str, model: Path, other: Path, artifact: Path) -> dict[str, Any]:
    """Logits of a GPTModel that the ready spec `name` has filled, as in a script that is not changed; and what is said
    of one with five experts."""
    with parallel(size), script(artifact):
        return {"logits": logits(built(model, name)), "refused": said(built, other, name)}


def refused(
    rank: int, size: int, architecture: str, fitting: Artifact, artifacts: dict[str, Artifact]
) -> dict[str, str]:
    """{what is wrong: what is said of it}; asserts that each leaves the model as it was."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        model = gpt_model(hf)
        expected, ids = logits(model), module_ids(model)

        def unchanged(call: Callable[..., Any], *args: Any) -> str:
            message = said(call, *args)
            assert module_ids(model) == ids and torch.equal(logits(model), expected), message
            return message

        found = {name: unchanged(lowbit.apply_to_megatron, model, given) for name, given in artifacts.items()}
        lowbit.apply_to_megatron(model, fitting)
        found["export"] = said(megatron_model.to_huggingface, model, hf.config)
        lowbit.remove(model)
        experts = model.decoder.layers[1].mlp.experts
        with mock.patch.object(model.config, "moe_apply_probs_on_input", True):
            found["config"] = said(lowbit.apply_to_megatron, model, fitting)
        held = experts.local_experts[0].linear_fc2.weight
        held.main_grad = torch.zeros(1)  # as DistributedDataParallel does
        found["trained"] = said(lowbit.apply_to_megatron, model.train(), fitting)
        model.eval()
        experts.__class__ = type("GroupedMLP", (torch.nn.Module,), {"forward": type(experts).forward})
        found["grouped"] = unchanged(lowbit.apply_to_megatron, model, fitting)
        return found


def rounded_on_load(rank: int, size: int, architecture: str) -> Tensor:
    """Logits of a GPTModel of a low-bit spec, without an artifact, that full-precision weights have come to."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model
        from megatron_lowbit.adapters.megatron.spec import block_spec, lowbit_spec

        hf = tiny_models.build(architecture)
        spec = lowbit_spec(block_spec(megatron_model.transformer_config(hf.config)), "W4A8")
        return logits(gpt_model(hf, spec=spec))


def refused_shared(rank: int, size: int, artifact: Artifact) -> dict[str, str]:
    """{what is wrong with a shared expert: what is said}; asserts that the model stays as it is."""
    with parallel(size):
        from megatron.core.tensor_parallel.layers import RowParallelLinear

        from megatron_lowbit.adapters.megatron.layers import LowBitRowParallelLinear

        model = gpt_model(tiny_models.build("qwen2_moe"))
        shared, ids = model.decoder.layers[1].mlp.shared_experts, module_ids(model)
        found = {}
        with mock.patch.object(model.config, "moe_shared_expert_overlap", True):
            found["overlap"] = said(lowbit.apply_to_megatron, model, artifact)
        kind = type(shared)
        shared.linear_fc1.__class__ = type("TheirColumnParallelLinear", (torch.nn.Module,), {})
        found["linear"] = said(lowbit.apply_to_megatron, model, artifact)
        shared.linear_fc1.__class__ = type(model.decoder.layers[0].mlp.shared_experts.linear_fc1)
        shared.__class__ = type("FusedSharedExpertMLP", (kind,), {})
        found["fused"] = said(lowbit.apply_to_megatron, model, artifact)
        assert module_ids(model) == ids
        options = {"config": model.config, "init_method": torch.nn.init.zeros_, "bias": False}
        linear = LowBitRowParallelLinear(8, 4, input_is_parallel=True, skip_bias_add=True, is_expert=False, **options)
        assert isinstance(linear, RowParallelLinear)
        linear.finish_init(None)
        linear.explicit_expert_comm = True  # as a SharedExpertMLP with this overlap does
        found["overlap by the spec"] = said(linear.finish_init, None)
        return found


class GroupedLinear(torch.nn.Module):
    """Holds the weights of all experts as Transformer Engine's GroupedLinear does, which is not installed."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight.clone()))


def grouped(rank: int, size: int, architecture: str, artifact: Artifact) -> dict[str, Any]:
    """TEGroupedMLP with stand-ins for its linears: loaded, written back, and replaced by an artifact."""
    with parallel(size):
        from megatron.core.transformer.moe.experts import TEGroupedMLP

        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        model = gpt_model(hf)
        expected = logits(lowbit.apply_to_megatron(model, artifact))
        lowbit.remove(model)
        for layer in model.decoder.layers:
            experts = layer.mlp.experts
            module = TEGroupedMLP.__new__(TEGroupedMLP)
            torch.nn.Module.__init__(module)
            for role in ("linear_fc1", "linear_fc2"):
                weights = [getattr(expert, role).weight for expert in experts.local_experts]
                module.add_module(role, GroupedLinear([torch.full_like(weight, float("nan")) for weight in weights]))
            layer.mlp.experts = module
        megatron_model.load_weights(model, hf.state_dict(), hf.config)
        back = megatron_model.to_huggingface(model, hf.config)
        state = hf.state_dict()
        same = torch.equal(logits(lowbit.apply_to_megatron(model, artifact)), expected)
        return {
            "same": same,
            "back": back and all(torch.equal(t, state[name]) for name, t in back.state_dict().items()),
        }


def gradients(rank: int, size: int, architecture: str, artifact: Artifact) -> dict[str, list[Tensor]]:
    """[output, gradients of the tokens and of their shares] of the codes, and of Megatron's own experts with the
    weights that the codes stand for; one expert has no token."""
    with parallel(size):
        from megatron_lowbit.adapters.megatron import model as megatron_model

        hf = tiny_models.build(architecture)
        model = gpt_model(hf)
        assert artifact.checkpoint is not None and artifact.checkpoint.experts is not None
        values = {name: weight.dequantize() for name, weight in artifact.checkpoint.experts.weights.items()}
        state = hf.state_dict()
        megatron_model.load_weights(model, state | {n: v.view_as(state[n]) for n, v in values.items()}, hf.config)
        effective = model.decoder.layers[0].mlp.experts
        other = lowbit.apply_to_megatron(gpt_model(hf), artifact).decoder.layers[0].mlp.experts

        def run(module: Any) -> list[Tensor]:
            draw = torch.Generator().manual_seed(4)
            x, given = (torch.randn(12, 64, generator=draw) for _ in range(2))
            x, share = x.requires_grad_(), torch.rand(12, generator=draw).requires_grad_()
            y, _ = module(x, torch.tensor([5, 0, 4, 3]), share)
            y.backward(given)
            return [y.detach(), x.grad, share.grad]

        return {"codes": run(other), "weights": run(effective)}
