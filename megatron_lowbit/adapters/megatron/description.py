"""What no tensor of a patched model tells of the artifact in it, as plain values that a checkpoint keeps beside them.

description(artifact)               at apply_to_megatron: names, scheme, fingerprint
artifact_of(tensors, description)   the artifact again, of its tensors in Hugging Face's order
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from megatron_lowbit.artifact import Artifact
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import CommPlan, SitePlan
from megatron_lowbit.config import LowBitError
from megatron_lowbit.quant.affine import LowRank, QuantizedWeight, Scheme
from megatron_lowbit.quant.checkpoint import PLAN, WEIGHT, LowBitCheckpoint
from megatron_lowbit.quant.experts import QuantizedExperts
from megatron_lowbit.quant.online_rotation import OnlineRotation
from megatron_lowbit.quant.reassembly_plan import ReassemblyPlan
from megatron_lowbit.quant.weight_bits import Allocation


def description(artifact: Artifact) -> dict[str, Any] | None:
    """Return what no tensor of a GPTModel tells of the artifact in it, as a checkpoint keeps it; None for an artifact
    that quantizes no weights."""
    checkpoint = artifact.checkpoint
    if checkpoint is None or checkpoint.scheme.weight_bits == 16:
        return None
    rotation, allocation, experts = checkpoint.rotation, checkpoint.allocation, checkpoint.experts
    packed = {**checkpoint.linears, **({} if experts is None else experts.weights)}
    return {
        "scheme": checkpoint.scheme_name,
        "shard_groups": checkpoint.shard_groups,
        "attention_bits": checkpoint.attention_bits,
        "fingerprint": checkpoint.fingerprint,
        "linears": list(checkpoint.linears),
        "packed": {name: [weight.num_bits, weight.in_features] for name, weight in packed.items()},
        "experts": None if experts is None else experts.scheme,
        "tensors": list(checkpoint.tensors),
        "reassembly": {name: [plan.in_features, plan.width] for name, plan in checkpoint.reassembly.items()},
        "low_rank": {name: len(branch.lora_a) for name, branch in checkpoint.low_rank.items()},
        "rotation": None if rotation is None else rotation.describe(),
        "allocation": None if allocation is None else allocation.describe(),
        "plans": {
            size: {
                "description": plan.description,
                "fingerprint": plan.fingerprint,
                "sites": list(plan.sites),
                "gathers": {name: codec.tensors() for name, codec in plan.gathers.items()},
            }
            for size, plan in artifact.plans.items()
        },
    }


def artifact_of(state: dict[str, Tensor], about: Mapping[str, Any]) -> Artifact:
    """Return the artifact of a description and of all its tensors, whole.

    state: {name in lowbit*.safetensors, and `tp<N>.<site>/<leaf>` for the plans that the model has: tensor}. Raises
    LowBitError where one is lacking.
    """
    embedding = next((name for name in state if name.endswith("embed_tokens.weight")), None)
    if embedding is not None:
        state.setdefault("lm_head.weight", state[embedding])  # they are tied

    def take(name: str) -> Tensor:
        if name not in state:
            raise LowBitError(f"the checkpoint lacks {name} of its artifact; use the artifact that it was made from")
        return state[name]

    def leaves(name: str, known: tuple[str, ...]) -> dict[str, Tensor]:
        return {leaf: take(f"{name}.{leaf}") for leaf in known}

    def weights(names: Iterable[str]) -> dict[str, QuantizedWeight]:
        found = {}
        for name in names:
            bits, width = about["packed"][name]
            found[name] = QuantizedWeight(**leaves(name, WEIGHT), num_bits=bits, in_features=width)
        return found

    linears, experts = about["linears"], about["experts"]
    plans = {
        name: ReassemblyPlan(**leaves(name, PLAN), in_features=inputs, width=width)
        for name, (inputs, width) in about["reassembly"].items()
    }
    others = [name for name in about["packed"] if name not in set(linears)]
    branches = {name: LowRank(take(f"{name}.lora_a"), take(f"{name}.lora_b")) for name in about["low_rank"]}
    checkpoint = LowBitCheckpoint(
        weights(linears),
        {name: take(name) for name in about["tensors"]},
        Scheme.parse(about["scheme"]),
        about["scheme"],
        about["shard_groups"],
        about["fingerprint"],
        plans,
        branches,
        about["attention_bits"],
        rotation=None if about["rotation"] is None else OnlineRotation.read(about["rotation"]),
        allocation=None if about["allocation"] is None else Allocation(**about["allocation"]),
        experts=None if experts is None else QuantizedExperts(experts, weights(others)),
    )
    found = {size: _plan(state, size, plan) for size, plan in about["plans"].items()}
    return Artifact(checkpoint, {size: plan for size, plan in found.items() if plan is not None})


def _plan(state: Mapping[str, Tensor], size: int, about: Mapping[str, Any]) -> CommPlan | None:
    """Return the plan of `size` ranks; None where the model communicates in full precision, and holds none."""
    sites: dict[str, dict[str, Tensor]] = {site: {} for site in about["sites"]}
    for key, tensor in state.items():
        site, found, leaf = key.removeprefix(f"tp{size}.").partition("/")
        if found and key.startswith(f"tp{size}."):
            sites[site][leaf] = tensor
    if not any(sites.values()):
        return None
    plans = {site: SitePlan.of(tensors) for site, tensors in sites.items()}
    gathers = {name: Codec.of(tensors) for name, tensors in about["gathers"].items()}
    return CommPlan(plans, size, about["fingerprint"], about["description"], gathers)
