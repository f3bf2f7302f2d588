"""Outlier channels that change nothing: a test bed for quantization on models that have none of their own.

    norm      gain_i * s          columns i of the linears that read it / s
    up_down   rows i of up * s    columns i of down / s          SiLU(gate) * up is linear in up
    v_o       rows i of v * s     columns i of o / s             so is attention in v; with GQA, every query head's
    columns

The model's function stays (bit for bit in float32 where s is a power of two, but for gains 1 + w); the activations
in between get outliers. Chosen are 1 % of the channels, at least one, by the seed and the block's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.apply import InputGroup
from megatron_lowbit.config import LowBitError
from megatron_lowbit.layers.reassembled_norm import rms_gain

SHARE = 0.01
Scales = dict[str, tuple[Tensor | None, Tensor | None]]  # {fqn in the block: what multiplies (outputs, inputs)}


def outlier_scales(
    groups: Sequence[InputGroup],
    shape: Callable[[str], tuple[int, int]],
    config: Any,
    factor: float,
    at: Sequence[str],
    seed: int,
    block: int,
) -> Scales:
    """Return the factors of every linear and norm of one block.

    groups: the block's; shape(fqn): (out, in) of a linear; config: the text model's. A norm has its factors under
    outputs. Raises LowBitError where a block has no such place.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + block) % 2**63)
    scales: Scales = {}

    def multiply(name: str, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        before = scales.get(name, (None, None))
        merged = [
            new if old is None else old if new is None else old * new
            for old, new in zip(before, (outputs, inputs), strict=True)
        ]
        scales[name] = (merged[0], merged[1])

    def chosen(features: int) -> Tensor:
        factors = torch.ones(features)
        factors[torch.randperm(features, generator=generator)[: max(1, round(SHARE * features))]] = factor
        return factors

    for group in groups:
        if "norm" in at and group.norm is not None:
            gain = chosen(shape(group.linears[0])[1])
            multiply(group.norm, outputs=gain)
            for name in group.linears:
                multiply(name, inputs=1 / gain)
    for key, first in (("up_down", "up_proj"), ("v_o", "v_proj")):
        if key not in at:
            continue
        found = [(name, group) for group in groups for name in group.linears if name.rpartition(".")[2] == first]
        if not found:
            raise LowBitError(f"inject_at={key}: the model's blocks have no {first}; leave {key} out")
        for name, group in found:
            rows = chosen(shape(name)[0])
            columns = rows
            if key == "v_o":
                heads = config.num_attention_heads // config.num_key_value_heads
                columns = rows.view(config.num_key_value_heads, 1, -1).expand(-1, heads, -1).reshape(-1)
            multiply(name, outputs=rows)
            multiply(group.row, inputs=1 / columns)
    return scales


def scale_norm(norm: nn.Module, factors: Tensor) -> None:
    """Multiply the gain of an RMSNorm in place; raises LowBitError for another norm."""
    rms = rms_gain(norm)
    if rms is None:
        raise LowBitError(f"inject_outliers: {type(norm).__name__} is no RMSNorm; use another inject_at")
    weight: Any = norm.weight
    gain = rms[0]
    offset = (gain - weight.data.float()).round()  # 1 where the norm multiplies by 1 + weight
    weight.data.copy_(gain * factors.to(gain.device) - offset)


@torch.no_grad()
def inject_outliers(model: Any, factor: float, at: Sequence[str], seed: int) -> None:
    """Scale the linears and norms of a loaded, unsharded Hugging Face model in place, so that it has outliers."""
    prefix, blocks = huggingface.decoder_blocks(model)
    linears = huggingface.find_linears(model)
    for index, block in enumerate(blocks):
        path = f"{prefix}.{index}."
        own = {name.removeprefix(path): found for name, found in linears.items() if name.startswith(path)}
        with huggingface.input_groups(block, own) as groups:
            device = next(model.parameters()).device
            model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
        config = huggingface.model_config(model)
        shapes = {name: (linear.out_features, linear.in_features) for name, (_, linear) in own.items()}
        for name, (outputs, inputs) in outlier_scales(
            groups, shapes.__getitem__, config, factor, at, seed, index
        ).items():
            if name not in own:
                scale_norm(block.get_submodule(name), outputs if outputs is not None else torch.ones(1))
                continue
            linear = own[name][1]
            scale_linear(linear.weight.data, outputs, inputs)
            if outputs is not None and linear.bias is not None:
                linear.bias.data.mul_(outputs.to(linear.bias))


def scale_linear(weight: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Multiply weight [out, in] by outputs [out] and inputs [in], in place."""
    if outputs is not None:
        weight.mul_(outputs.to(weight)[:, None])
    if inputs is not None:
        weight.mul_(inputs.to(weight))
