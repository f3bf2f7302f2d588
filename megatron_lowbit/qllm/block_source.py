"""A Hugging Face causal LM, block by block: only what is asked for is in memory.

The model is built without weights (parameters on the meta device, buffers real). Blocks are copied from it one by one
and filled from the safetensors files; their linears become ShardedLinears that hold this rank's shards. How the model
calls them is found out by trace_blocks.py.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup, Kind
from megatron_lowbit.adapters.huggingface.experts import expert_bit_sum, replaced_tensors, require_experts
from megatron_lowbit.adapters.huggingface.head import HeadPlace, check_runs, find_head
from megatron_lowbit.adapters.huggingface.outliers import Scales, outlier_scales, scale_linear, scale_norm
from megatron_lowbit.adapters.huggingface.skeleton import skeleton, stored_buffers
from megatron_lowbit.config import LowBitError, QuantizeConfig
from megatron_lowbit.io.fingerprint import bit_sum
from megatron_lowbit.io.hf_names import ModelWeights, untie
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.qllm.choose_rotation import Rotator
from megatron_lowbit.qllm.rotation import Rotation
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.qllm.trace_blocks import TRACED_TOKENS, BlockCall, BlockTracer
from megatron_lowbit.quant.affine import QuantizedWeight
from megatron_lowbit.quant.head import measure_kl
from megatron_lowbit.quant.tp_sizes import default_shard_groups, groups_for, widths_of
from megatron_lowbit.runtime.distributed import group_rank, world_size


class BlockSource:
    """Read the blocks of the model in `folder`: this rank's shards of them, on `device` in `dtype`.

    groups: of every block, which of its linears read the same input (known after `trace`). bit_sums: {linear: int64
    checksum of this rank's bits}, of the blocks read so far. experts: {tensor: parameter} of the experts that
    weights.experts quantizes; expert_sums: {tensor: checksum of its bits}, of the blocks read so far.
    head: the output projection, where weights.lm_head_bits asks for it. rotator: what rotates the blocks as they are
    read, where weights.rotation asks for it, after `rotate`.
    Raises LowBitError for weights that are missing, damaged, quantized already, or of another shape than the
    config says, and for an output projection that find_head refuses.
    """

    def __init__(
        self,
        folder: Path,
        hf_config: Any,
        config: QuantizeConfig,
        dtype: torch.dtype,
        device: torch.device,
        tp_group: dist.ProcessGroup | None,
    ):
        self.config = config
        self.stored_dtype = hf_config.dtype  # from_config overwrites it
        self.dtype, self.device, self.tp_group = dtype, device, tp_group
        self.model = skeleton(hf_config, dtype)
        self.weights = ModelWeights(folder, self.model)
        if self.weights.unties():
            untie(hf_config)
            self.model = skeleton(hf_config, dtype)
            self.weights = ModelWeights(folder, self.model)
        # Found before anything is loaded: loading gives tied weights a parameter each.
        self.head: HeadPlace | None = find_head(self.model) if config.weights.lm_head_bits else None
        self.text_config = huggingface.model_config(self.model)
        attention.enable(self.text_config)
        self.prefix, self.blocks = huggingface.decoder_blocks(self.model)
        named = [*self.model.named_parameters(), *stored_buffers(self.model)]  # a tied weight once
        self.rest_shapes = {name: p.shape for name, p in named if not name.startswith(self.prefix + ".")}
        kinds = huggingface.find_linears(self.model)
        self.kinds: list[dict[str, tuple[Kind, nn.Linear]]] = []
        for index in range(len(self.blocks)):
            path = self.fqn(index, "")
            self.kinds.append({n.removeprefix(path): kind for n, kind in kinds.items() if n.startswith(path)})
        ranks, family = world_size(tp_group), hf_config.model_type
        self.tracer = BlockTracer(self.model, self.prefix, self.blocks, self.kinds, device, ranks, family)
        require_experts(self.model, config.weights)
        self.experts = replaced_tensors(self.model) if config.weights.experts != "none" else {}
        self.widths = widths_of(linear for _, linear in kinds.values())
        self.shard_groups = config.weights.shard_groups or default_shard_groups(self.text_config, self.widths)
        self.groups: list[list[InputGroup]] = []
        self.bit_sums: dict[str, Tensor] = {}
        self.expert_sums: dict[str, int] = {}
        self.rotator: Rotator | None = None
        self._rotation: Rotation | None = None  # of what is outside the blocks
        self._exact = False

    def check_widths(self) -> None:
        """Raise LowBitError for a group size or a rank that some linear is too narrow for, before hours are spent."""
        group_size, correction = self.config.weights.group_size, self.config.correction
        for index, kinds in enumerate(self.kinds):
            for name, (kind, linear) in kinds.items():
                fqn, inputs = self.fqn(index, name), linear.in_features
                shards = 1 if kind == "column" else activation_groups(inputs, self.shard_groups)
                if group_size is not None and inputs // shards % group_size:
                    where = f" of each of the {shards} shard groups" if shards > 1 else ""
                    raise LowBitError(
                        f"weights.group_size={group_size} does not divide the {inputs // shards} inputs{where} of {fqn}"
                    )
                narrow = min(inputs, linear.out_features)
                if correction.mode != "none" and correction.rank != "auto" and correction.rank > narrow:
                    raise LowBitError(f"correction.rank={correction.rank} is above the {narrow} channels of {fqn}")

    def block_name(self, index: int) -> str:
        """Return the fqn of block `index`."""
        return f"{self.prefix}.{index}"

    def fqn(self, index: int, name: str) -> str:
        """Return the fqn of `name` within block `index`."""
        return f"{self.block_name(index)}.{name}"

    def trace(self, ids: Tensor) -> None:
        """Find out how the model calls its blocks, and which of their linears read the same input (`groups`).

        ids: int64 [windows, length], of which a few tokens serve. Raises LowBitError for a model whose blocks cannot be
        run one by one.
        """
        self.load_rest()
        self.groups = self.tracer.trace(ids)

    def rotate(self, ids: Tensor, attention_bits: int) -> None:
        """Rotate what the model allows, where weights.rotation asks for it, from here on; `trace` has to come first.

        ids: int64 [windows, length], of which a few tokens serve. Raises LowBitError where nothing can be rotated.
        """
        if self.config.weights.rotation != "none":
            few = ids[:1, :TRACED_TOKENS]
            self.rotator = Rotator(self, few, self.config.seed, self.shard_groups, attention_bits)
            if self._rotation is not None and self._rotation.rest is not None and self.head is not None:
                self.head = replace(self.head, embedding=None)  # no longer tied

    def rotate_rest(self, rotation: Rotation | None, exact: bool = False) -> None:
        """Read what is outside the blocks rotated from here on; None: as it is stored. exact: to compute with in
        float32, whatever it is stored in."""
        self.free_rest()
        self._rotation, self._exact = rotation, exact

    def embed(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return (hidden states [windows, length, hidden] before the first block, how every block is called for them).

        ids: int64 [windows, length]. `trace` has to come first.
        """
        self.load_rest()
        return self.tracer.embed(ids)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [windows, length, vocab] of ids int64 [windows, length] whose last hidden states are
        `hidden`. `trace` has to come first."""
        self.load_rest()
        head = self.model.get_output_embeddings()
        for leaf, parameter in head.named_parameters():
            if parameter.is_meta:
                name = next(name for name, module in self.model.named_modules() if module is head)
                setattr(head, leaf, self._outside(f"{name}.{leaf}", parameter.shape))
        return self.tracer.logits(ids, hidden)

    def load_rest(self) -> None:
        """Load what is neither a block nor the language-model head (embeddings, final norm)."""
        if self._is_loaded():
            return
        base = self.model.base_model
        prefix = next((f"{n}." for n, m in self.model.named_modules() if m is base and n), "")
        for name, parameter in base.named_parameters():
            fqn = prefix + name
            if parameter.is_meta and not fqn.startswith(self.prefix + "."):
                owner, _, leaf = name.rpartition(".")
                setattr(base.get_submodule(owner), leaf, self._outside(fqn, parameter.shape))
        for name, module in base.named_modules():
            if not (prefix + name).startswith(self.prefix + "."):
                for leaf, buffer in module.named_buffers(recurse=False):
                    setattr(module, leaf, buffer.to(self.device))
        for name, buffer in stored_buffers(base):
            if not (prefix + name).startswith(self.prefix + "."):
                buffer.copy_(self.weights.read(prefix + name, buffer.shape))

    def free_rest(self) -> None:
        """Drop what load_rest and logits loaded."""
        for module in self.model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not parameter.is_meta:
                    setattr(module, leaf, nn.Parameter(parameter.data.to("meta"), requires_grad=False))

    def _is_loaded(self) -> bool:
        return not self.model.get_input_embeddings().weight.is_meta

    def block(self, index: int) -> nn.Module:
        """Return block `index` in full precision, rotated where it is to be, its linears as ShardedLinears with this
        rank's shards."""
        block = self.load(index)
        if self.rotator is not None:
            self.rotator.rotate(index, block)
        return block

    def load(self, index: int) -> nn.Module:
        """Return block `index` as `block` does, but never rotated."""
        block = copy.deepcopy(self.blocks[index])
        scales = self._outliers(index)
        for name, (kind, linear) in self.kinds[index].items():
            block.set_submodule(name, self._linear(index, name, kind, linear, scales))
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                tensor = self._read(self.fqn(index, name), parameter.shape)
                if self.fqn(index, name) in self.experts:
                    self.expert_sums[self.fqn(index, name)] = expert_bit_sum(tensor)
                setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in stored_buffers(block):
            buffer.copy_(self.weights.read(self.fqn(index, name), buffer.shape))
        for name, (outputs, _) in scales.items():
            if name not in self.kinds[index] and outputs is not None:
                scale_norm(block.get_submodule(name), outputs)
        return block.to(self.device)

    def rest(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Return every tensor outside the blocks but those of `without`, in the dtype it is stored in, tied ones once;
        rotated ones are not tied."""
        shapes = dict(self.rest_shapes)
        if self._rotation is not None and self._rotation.rest is not None:
            shapes[self._rotation.rest.head] = self.model.get_output_embeddings().weight.shape
        return {name: self._rest_tensor(name, shape) for name, shape in shapes.items() if name not in without}

    def _outside(self, name: str, shape: torch.Size) -> nn.Parameter:
        """Return a parameter outside the blocks, to compute with."""
        tensor = self._rest_tensor(name, shape, torch.float32 if self._exact else None)
        tensor = tensor.to(self.device, torch.float32 if self._exact else self.dtype, copy=True)
        return nn.Parameter(tensor, requires_grad=False)

    def _rest_tensor(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor outside the blocks, rotated where it is to be. dtype: None: the one it is stored in."""
        tensor, rotation = self.weights.read(name, shape), self._rotation
        tensor = tensor.to(dtype or tensor.dtype)
        if rotation is None or rotation.rest is None:
            return tensor
        gain = self.weights.read(rotation.rest.norm, shape[-1:]) if name == rotation.rest.head else None
        return rotation.rest_tensor(name, tensor, gain)

    def measure_head(
        self, bits: int, ids: Tensor, mask: Tensor, hidden: Tensor
    ) -> tuple[QuantizedWeight, list[tuple[float, int]], int]:
        """Round the output projection; returns (its weight in `bits` bits, measure_kl of each window, the bit_sum).

        ids, mask: [windows, length]; hidden: [windows, length, hidden], what the last block puts out for them in full
        precision. `trace` has to come first. Raises LowBitError for a model that check_runs refuses.
        """
        place = self.head
        assert place is not None, "the config asks for it"
        self.load_rest()
        # A rotated projection is rounded once: not to the dtype it is stored in.
        dtype = None if self._rotation is None else torch.float32
        tensors = {
            leaf: self._rest_tensor(f"{place.name}.{leaf}", parameter.shape, dtype).to(self.device)
            for leaf, parameter in place.linear.named_parameters()
        }
        for leaf, tensor in tensors.items():
            setattr(place.linear, leaf, nn.Parameter(tensor.to(self.dtype), requires_grad=False))
        states = iter(hidden.split(1))

        def run(tokens: Tensor) -> Tensor:
            return self.tracer.logits(tokens, next(states).to(self.device, self.dtype))

        texts = zip(ids.split(1), mask.split(1), strict=True) if len(ids) else ()
        weight = tensors["weight"]
        stored = self.weights.read(f"{place.name}.weight", weight.shape)
        quantized = QuantizedWeight.from_float(weight, bits, name=f"{place.name}.weight")
        if len(ids):
            two = ids[:1, :2], hidden[:1, :2].to(self.device, self.dtype)
            check_runs(self.model, place, quantized, lambda: self.tracer.logits(*two))
        parts = measure_kl(place.linear, weight, quantized, tensors.get("bias"), texts, run)
        self.free_rest()
        return quantized, parts, int(bit_sum(stored))

    def check_rest(self) -> None:
        """Raise LowBitError for NaN or Inf outside the blocks, before hours are spent."""
        for name, shape in self.rest_shapes.items():
            if not torch.isfinite(self.weights.read(name, shape)).all():
                raise LowBitError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized")

    def block_tensors(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Return {name in the model: tensor on the CPU} of what stays unquantized in a block (norms, whole biases)."""
        stored = self.stored_dtype or self.dtype
        tensors = {
            self.fqn(index, name): parameter.detach().to("cpu", stored)
            for name, parameter in block.named_parameters()
            if not any(name.startswith(linear + ".") for linear in self.kinds[index])
            and self.fqn(index, name) not in self.experts
        }
        for name, buffer in stored_buffers(block):
            dtype = stored if buffer.is_floating_point() else buffer.dtype
            tensors[self.fqn(index, name)] = buffer.detach().to("cpu", dtype)
        scales = self._outliers(index)
        for name, (_, linear) in self.kinds[index].items():
            if linear.bias is not None:
                fqn = self.fqn(index, name + ".bias")
                bias = self._read(fqn, linear.bias.shape)
                outputs = scales.get(name, (None, None))[0]
                bias = bias if outputs is None else bias * outputs.to(bias)
                bias = bias if self.rotator is None else self.rotator.rotation.bias(index, name, bias)
                tensors[fqn] = bias.to("cpu", stored)
        return tensors

    def _outliers(self, index: int) -> Scales:
        factor = self.config.inject_outliers
        if factor is None:
            return {}
        kinds = self.kinds[index]
        return outlier_scales(
            self.groups[index],
            lambda name: (kinds[name][1].out_features, kinds[name][1].in_features),
            self.text_config,
            factor,
            self.config.inject_at,
            self.config.seed,
            index,
        )

    def _linear(self, index: int, name: str, kind: Kind, linear: nn.Linear, scales: Scales) -> ShardedLinear:
        fqn = self.fqn(index, name)
        dim, width = (0, linear.out_features) if kind == "column" else (1, linear.in_features)
        ranks, rank = world_size(self.tp_group), group_rank(self.tp_group)
        shards = activation_groups(width, self.shard_groups)
        if shards % ranks:
            raise LowBitError(
                f"{fqn}: its {width} channels make {shards} shard groups, which tp={ranks} does not divide; "
                f"set weights.shard_groups={groups_for(ranks, self.widths)}, or another tp"
            )
        start, stop = rank * width // ranks, (rank + 1) * width // ranks
        weight = self._read(fqn + ".weight", linear.weight.shape, dim, start, stop, linear=True)
        finite = torch.isfinite(weight).all().to(torch.int32)
        if self.tp_group is not None:  # all ranks have to leave together
            dist.all_reduce(finite, dist.ReduceOp.MIN, self.tp_group)
        if not finite:
            raise LowBitError(f"{fqn} holds NaN or Inf; repair the checkpoint before it is quantized")
        outputs, inputs = scales.get(name, (None, None))
        if kind == "column":
            scale_linear(weight, None if outputs is None else outputs[start:stop], inputs)
        else:
            scale_linear(weight, outputs, None if inputs is None else inputs[start:stop])
        self.bit_sums[fqn] = bit_sum(weight)
        bias = None
        if linear.bias is not None:
            bias = self._read(fqn + ".bias", linear.bias.shape)
            bias = bias if outputs is None else bias * outputs.to(bias)
            bias = bias[start:stop] if kind == "column" else bias
        pieces = [piece.contiguous() for piece in weight.chunk(shards // ranks, dim)]
        return ShardedLinear(fqn, kind, pieces, bias, self.tp_group)

    def _read(
        self,
        name: str,
        shape: torch.Size,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        linear: bool = False,
    ) -> Tensor:
        tensor = self.weights.read(name, shape, dim, start, stop)
        # Linears are quantized from float32; the rest has to agree with the activations' dtype.
        return tensor.to(self.device, torch.float32 if linear else self.dtype, copy=True)
