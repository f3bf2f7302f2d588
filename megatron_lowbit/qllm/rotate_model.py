"""Rotate a whole Hugging Face model in memory (rotation.py), for rounding without calibration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.apply import InputGroup, Kind
from megatron_lowbit.qllm.choose_rotation import Rotator
from megatron_lowbit.qllm.rotation import Rotation
from megatron_lowbit.qllm.trace_blocks import TRACED_TOKENS, BlockCall, BlockTracer
from megatron_lowbit.quant.online_rotation import OnlineRotation


class LoadedModel:
    """A model whose blocks and embeddings are in memory, as a Rotator takes it."""

    def __init__(self, model: Any):
        self.model, self.text_config = model, huggingface.model_config(model)
        prefix, self.blocks = huggingface.decoder_blocks(model)
        self.prefix = f"{prefix}."
        found = huggingface.find_linears(model).items()
        self.kinds: list[dict[str, tuple[Kind, nn.Linear]]] = []
        for index in range(len(self.blocks)):
            path = self.fqn(index, "")
            self.kinds.append({name.removeprefix(path): how for name, how in found if name.startswith(path)})
        embedding, family = model.get_input_embeddings().weight, model.config.model_type
        wants = ("weights.rotation", "set weights.rotation=none")
        self.tracer = BlockTracer(model, prefix, self.blocks, self.kinds, embedding.device, 1, family, wants)
        self.ids = torch.arange(TRACED_TOKENS)[None] % len(embedding)
        self.groups: list[list[InputGroup]] = self.tracer.trace(self.ids)
        self._originals: dict[str, nn.Parameter] = {}

    def fqn(self, index: int, name: str) -> str:
        """Return the fqn of `name` within block `index`."""
        return f"{self.prefix}{index}.{name}"

    def load(self, index: int) -> nn.Module:
        """Return a copy of block `index`."""
        return copy.deepcopy(self.blocks[index])

    def embed(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return (hidden states before the first block, how every block is called) of ids int64 [windows, length]."""
        return self.tracer.embed(ids)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of ids [windows, length] whose last hidden states are `hidden`."""
        return self.tracer.logits(ids, hidden)

    @torch.no_grad()
    def rotate_rest(self, rotation: Rotation | None, exact: bool = False) -> None:
        """Rotate what is outside the blocks; None: as it was. exact: in float32 at least."""
        for name, parameter in self._originals.items():
            self._put(name, parameter)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self._originals = {name: p for name, p in named.items() if not name.startswith(self.prefix)}
        norm = None if rotation is None or rotation.rest is None else named[rotation.rest.norm].data
        for name, original in self._originals.items():
            tensor = original.data
            if exact and tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if rotation is not None and rotation.rest is not None:
                tensor = rotation.rest_tensor(name, tensor, norm if name == rotation.rest.head else None)
            if tensor is not original.data:
                self._put(name, nn.Parameter(tensor, original.requires_grad))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, parameter)


def rotate_model(model: Any, seed: int, shard_groups: int, attention_bits: int) -> OnlineRotation:
    """Rotate a model in place; it then computes what it did, but for rounding. Returns what was rotated.

    attention_bits: of Q and K. The model is on one device, unsharded and unpatched. Weights of its linears are in
    float32 at least afterwards, so that they are rounded once: a model in bfloat16 has to be made float32 to run.
    Raises LowBitError for a model of which nothing can be rotated.
    """
    host = LoadedModel(model)
    for kinds in host.kinds:
        for _, linear in kinds.values():
            linear.weight.data = linear.weight.data.to(torch.promote_types(linear.weight.dtype, torch.float32))
    rotator = Rotator(host, host.ids, seed, shard_groups, attention_bits)
    for index, block in enumerate(host.blocks):
        rotator.rotate(index, block)
    return rotator.online()
