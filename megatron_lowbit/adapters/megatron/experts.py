"""The experts of a GPTModel: which a rank holds, and where their weights lie in a Hugging Face model.

    decoder.layers.<i>.mlp.                         model.layers.<i>.mlp.
    router.weight                                   gate.weight
    experts.local_experts.<j>.linear_fc1.weight     gate_up_proj[e]      rows, per rank [gate_r | up_r]
    experts.local_experts.<j>.linear_fc2.weight     down_proj[e]         columns
    shared_experts.gate_weight                      shared_expert_gate.weight

transformers keeps the experts of a block in one tensor per projection. Megatron's SequentialMLP has each in linears of
its own, TEGroupedMLP in experts.linear_fc1.weight<j> and experts.linear_fc2.weight<j>. A rank has the experts e of its
place in the expert-parallel group, and of each its share among the ranks of the expert-tensor-parallel group. Which
tokens an expert sees, and the sum over these ranks, are the token dispatcher's. The linears of a shared expert, which
sees every token, are those of an MLP (layout.py); its gate is whole on every rank.

The router of both takes the softmax over all experts and then the best k; or, which is the same as dividing those by
their sum, the softmax over the best k alone (moe_router_pre_softmax=False).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor
from torch import distributed as dist

from megatron_lowbit.adapters.megatron.layout import Layout, layout_of, numbered_layers
from megatron_lowbit.adapters.megatron_names import Role
from megatron_lowbit.config import LowBitError
from megatron_lowbit.io.fingerprint import bit_sum
from megatron_lowbit.runtime.distributed import all_gather_stack, group_rank, world_size

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")
SHARED_GATE = "mlp.shared_expert_gate.weight"
PROJECTIONS: dict[Role, str] = {"linear_fc1": "mlp.experts.gate_up_proj", "linear_fc2": "mlp.experts.down_proj"}


@dataclass(frozen=True)
class Experts:
    """The experts of one block that this rank holds.

    block: in the whole model, from 0. path: of the mixture, decoder.layers.0.mlp; layer: that MoELayer.
    """

    block: int
    path: str
    layer: Any

    @property
    def module(self) -> Any:
        """Return the module that computes the experts."""
        return self.layer.experts

    @property
    def numbers(self) -> list[int]:
        """Return which experts of the whole model these are."""
        return list(self.layer.local_expert_indices)

    @property
    def shared_gate(self) -> Tensor | None:
        """Return the weight [1, hidden] of the gate of the shared expert; None where there is none."""
        return getattr(self.layer.shared_experts, "gate_weight", None)

    def name(self, prefix: str, role: Role) -> str:
        """Return the name of the Hugging Face tensor that holds a projection of all experts."""
        return f"{prefix}.{self.block}.{PROJECTIONS[role]}"

    @property
    def known(self) -> bool:
        """Tell whether the weights are where they can be read."""
        grouped = type(self.module) is TEGroupedMLP and hasattr(self.module.linear_fc1, "weight0")
        return grouped or type(self.module) is SequentialMLP

    def weights(self, role: Role) -> list[tuple[str, Tensor]]:
        """Return (path, weight) of a projection of every expert here. Raises LowBitError where they are not known."""
        path, module = f"{self.path}.experts", self.module
        if not self.known:
            raise LowBitError(
                f"{path} is a {type(module).__name__}, whose weights are not known here; build the model with "
                "moe_grouped_gemm=False"
            )
        if type(module) is SequentialMLP:
            local = enumerate(module.local_experts)
            return [(f"{path}.local_experts.{j}.{role}.weight", getattr(expert, role).weight) for j, expert in local]
        leaves = [f"weight{j}" for j in range(len(self.numbers))]
        return [(f"{path}.{role}.{leaf}", getattr(getattr(module, role), leaf)) for leaf in leaves]


def find_experts(model: Any) -> list[Experts]:
    """Return the blocks of a pipeline stage that are mixtures of experts."""
    return [
        Experts(block, f"decoder.layers.{index}.mlp", layer.mlp)
        for index, block, layer in numbered_layers(model)
        if isinstance(getattr(layer, "mlp", None), BaseMoELayer)
    ]


def expert_layout(model: Any) -> tuple[Layout, int]:
    """Return (layout of one expert, this rank's place among the ranks that share it)."""
    group = model.pg_collection.expt_tp
    width, size = model.config.moe_ffn_hidden_size, world_size(group)
    return replace(layout_of(model), ffn_size=width, tp_size=size), group_rank(group)


def projection_shape(model: Any, layout: Layout, role: Role) -> tuple[int, int, int]:
    """Return the shape [experts, out, in] of the tensor of all experts in the Hugging Face model."""
    return model.config.num_moe_experts, sum(layout.part_rows(role)), layout.in_features(role)


def config_arguments(hf_config: Any) -> dict[str, Any]:
    """Return what TransformerConfig is told of the experts of a Hugging Face config; nothing where there are none.

    Every token goes to its experts, whatever their load: nothing is dropped, and no loss is added. Raises LowBitError
    for experts that Megatron would compute otherwise, and for ranks that cannot share them.
    """
    if hf_config.model_type not in MODEL_TYPES:
        return {}
    mixtral = hf_config.model_type == "mixtral"
    count, chosen = hf_config.num_local_experts if mixtral else hf_config.num_experts, hf_config.num_experts_per_tok
    normed = mixtral or hf_config.norm_topk_prob
    key = "intermediate_size" if mixtral else "moe_intermediate_size"
    width, blocks = getattr(hf_config, key), moe_blocks(hf_config)
    shared = getattr(hf_config, "shared_expert_intermediate_size", None)
    elsewhere = "use engine=huggingface or deepspeed"
    if getattr(hf_config, "attention_bias", False):
        raise LowBitError(f"attention_bias=true would give the experts of Megatron's GPTModel biases, too; {elsewhere}")
    if chosen == 1 and normed:
        raise LowBitError(
            f"num_experts_per_tok=1 makes the one expert's share 1, and Megatron's the router's; {elsewhere}"
        )
    if not any(blocks):
        raise LowBitError(f"no block of this {hf_config.model_type} has experts; use the model without them")
    tp = parallel_state.get_expert_tensor_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    whole = parallel_state.get_tensor_model_parallel_world_size()  # shares what every token sees
    for name, value, ranks in ((key, width, tp), ("shared_expert_intermediate_size", shared or 0, whole)):
        if value % ranks:
            sizes = [size for size in range(1, 65) if value % size == 0]
            raise LowBitError(f"tp={ranks} does not divide the model's {name}={value}; choose one of {sizes}")
    if count % ep:
        raise LowBitError(f"{ep} expert-parallel ranks do not divide the model's {count} experts; use fewer")
    return {
        "num_moe_experts": count,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": shared is not None,
        "moe_layer_freq": blocks,
        "moe_router_pre_softmax": not normed,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp,
    }


def moe_blocks(hf_config: Any) -> list[int]:
    """Return of every block 1 where it is a mixture of experts, 0 where it is an MLP."""
    step, dense = getattr(hf_config, "decoder_sparse_step", 1), getattr(hf_config, "mlp_only_layers", None) or ()
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf_config.num_hidden_layers)]


def has_experts(config: Any, block: int) -> bool:
    """Tell whether a block, numbered from 0, of a TransformerConfig's model is a mixture of experts."""
    blocks = config.moe_layer_freq
    if config.num_moe_experts is None:
        return False
    return block % blocks == 0 if isinstance(blocks, int) else bool(blocks[block])


def load_experts(
    model: Any,
    prefix: str,
    read: Callable[[str, tuple[int, ...]], Tensor],
    put: Callable[[str, Tensor], None],
    skip: Callable[[str], None],
    packed: Collection[str] = (),
) -> None:
    """Load routers, experts and the gates of shared ones: put(parameter, its value) of all that this rank holds.

    read(name, shape): returns a tensor of the Hugging Face model. packed: names of those that an artifact holds in
    codes; the parameters are handed to skip, and apply_to_megatron has to follow.
    """
    for experts in find_experts(model):
        layout, rank = expert_layout(model)
        count, hidden = model.config.num_moe_experts, layout.hidden_size
        put(f"{experts.path}.router.weight", read(f"{prefix}.{experts.block}.mlp.gate.weight", (count, hidden)))
        if experts.shared_gate is not None:
            gate = read(f"{prefix}.{experts.block}.{SHARED_GATE}", (1, hidden))
            put(f"{experts.path}.shared_experts.gate_weight", gate)
        for role in PROJECTIONS:
            name = experts.name(prefix, role)
            whole = None if name in packed else read(name, projection_shape(model, layout, role))
            for number, (path, _) in zip(experts.numbers, experts.weights(role), strict=True):
                if whole is None:
                    skip(path)
                else:
                    put(path, layout.share(whole[number], role, rank))


def export_experts(model: Any, prefix: str, routers_only: bool = False) -> dict[str, Tensor]:
    """Return routers, experts and the gates of shared ones under Hugging Face names, whole, on the CPU. A collective
    call of the ranks that share them."""
    state: dict[str, Tensor] = {}
    for experts in find_experts(model):
        layout, _ = expert_layout(model)
        tp, ep = (several(group) for group in (model.pg_collection.expt_tp, model.pg_collection.ep))
        state[f"{prefix}.{experts.block}.mlp.gate.weight"] = experts.layer.router.weight.detach().cpu()
        if experts.shared_gate is not None:
            state[f"{prefix}.{experts.block}.{SHARED_GATE}"] = experts.shared_gate.detach().cpu()
        for role in () if routers_only else PROJECTIONS:
            here = [
                layout.whole(all_gather_stack(weight.detach().contiguous(), tp), role)
                for _, weight in experts.weights(role)
            ]
            state[experts.name(prefix, role)] = all_gather_stack(torch.stack(here), ep).flatten(0, 1).cpu()
    return state


def expert_sums(model: Any, prefix: str, names: Collection[str]) -> dict[str, int]:
    """Return {name: checksum of its bits} of those of `names` that are experts' projections of this pipeline stage.

    A collective call over the ranks that share them.
    """
    sums = {
        experts.name(prefix, role): torch.stack([bit_sum(weight.detach()) for _, weight in experts.weights(role)])
        for experts in find_experts(model)
        for role in PROJECTIONS
        if experts.name(prefix, role) in names and experts.known
    }
    if not sums:
        return {}
    total = torch.stack([of_each.sum() for of_each in sums.values()])
    if world_size(model.pg_collection.tp_ep) > 1:
        dist.all_reduce(total, group=model.pg_collection.tp_ep)
    return dict(zip(sums, total.tolist(), strict=True))


def several(group: Any) -> Any:
    """Return the group; None for one of a single rank."""
    return group if world_size(group) > 1 else None
