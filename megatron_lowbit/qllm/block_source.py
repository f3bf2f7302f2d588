"""A Hugging Face causal LM, block by block: only what is asked for is in memory.

The model is built without weights (parameters on the meta device, buffers real). Blocks are copied from it one by one
and filled from the safetensors files; their linears become ShardedLinears that hold this rank's shards.

How the model calls its blocks is seen on copies that hold zeros: what a block is given besides the hidden states, what
it returns, and which of its linears read the same tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface import attention
from megatron_lowbit.adapters.huggingface.apply import InputGroup, Kind
from megatron_lowbit.adapters.huggingface.outliers import Scales, outlier_scales, scale_linear, scale_norm
from megatron_lowbit.adapters.huggingface.skeleton import skeleton, stored_buffers
from megatron_lowbit.config import LowBitError, QuantizeConfig, one_line
from megatron_lowbit.io.fingerprint import bit_sum
from megatron_lowbit.io.hf_names import ModelWeights, untie
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.runtime.distributed import group_rank, world_size

TRACED = 8  # tokens of each of the windows that show how a model calls its blocks
# What a model's code raises where its blocks cannot be run one by one.
RUNTIME_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError),
    *(TypeError, ValueError),
)


@dataclass
class Call:
    """What a block is given besides the hidden states, its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after the block."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class BlockSource:
    """The blocks of the model in `folder`, this rank's shards of them, on `device` in `dtype`.

    Raises LowBitError for weights that are missing, damaged, quantized already, or of another shape than the
    config says.
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
        self.family = hf_config.model_type
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
        self.groups: list[list[InputGroup]] = []
        self.bit_sums: dict[str, Tensor] = {}

    def check_widths(self) -> None:
        """Raise LowBitError for a group size or a rank that some linear is too narrow for, before hours are spent."""
        group_size, correction = self.config.weights.group_size, self.config.correction
        for index, kinds in enumerate(self.kinds):
            for name, (kind, linear) in kinds.items():
                fqn, inputs = self.fqn(index, name), linear.in_features
                shards = 1 if kind == "column" else activation_groups(inputs, self.config.weights.shard_groups)
                if group_size is not None and inputs // shards % group_size:
                    where = f" of each of the {shards} shard groups" if shards > 1 else ""
                    raise LowBitError(
                        f"weights.group_size={group_size} does not divide the {inputs // shards} inputs{where} of {fqn}"
                    )
                narrow = min(inputs, linear.out_features)
                if correction.mode != "none" and correction.rank > narrow:
                    raise LowBitError(f"correction.rank={correction.rank} is above the {narrow} channels of {fqn}")

    def fqn(self, index: int, name: str) -> str:
        return f"{self.prefix}.{index}.{name}"

    def embed(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """(hidden states [windows, length, hidden] before the first block, how every block is called for them).

        ids: [windows, length]. `trace` has to come first.
        """
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(index: int, hidden: Tensor, call: Call) -> Any:
            first.append(hidden)
            calls.append(call)
            rest = self.returned[index]
            return hidden if rest is None else (hidden, *rest)

        self._run(ids, record)
        return first[0], calls

    def trace(self, ids: Tensor) -> None:
        """See, on zero weights, what every block returns, and which of its linears read the same input.

        ids: [windows, length], of which a few tokens serve. Raises LowBitError for a model whose blocks cannot be run
        one by one with the arguments of another text, and for linears that do not read every token once.
        """
        self.returned: list[tuple[Any, ...] | None] = []  # besides the hidden states; None: these alone, no tuple
        self.groups = []
        outputs: list[Tensor] = []  # the hidden states after each block
        others: list[Tensor] = []  # what the blocks return besides
        ids = ids[:1, :TRACED].repeat(2, 1)

        def look(index: int, hidden: Tensor, call: Call) -> Any:
            if index != len(outputs):
                raise self._refused("its blocks do not run one after the other")
            if hidden.shape[:-1] != ids.shape:
                raise self._refused(f"its hidden states are {hidden.ndim}-dimensional, not windows x tokens x channels")
            if outputs and hidden is not outputs[-1]:
                raise self._refused("it changes the hidden states between its blocks")
            given = tree_leaves((call.args, call.kwargs))
            if any(value is other for value in given for other in [*others, *outputs] if isinstance(value, Tensor)):
                raise self._refused("its blocks hand on more than hidden states")
            block = self._zeros(index)
            linears = {name: (kind, block.get_submodule(name)) for name, (kind, _) in self.kinds[index].items()}
            with torch.no_grad(), huggingface.input_groups(block, linears, ids.numel()) as groups:
                output = block(hidden, *call.args, **call.kwargs)
            self.groups.append(groups)
            self._check_groups(index)
            self.returned.append(output[1:] if isinstance(output, tuple) else None)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            others.extend(t for t in tree_leaves(self.returned[-1]) if isinstance(t, Tensor))
            return output

        self._run(ids, look)
        if len(outputs) != len(self.blocks):
            raise self._refused(f"{len(outputs)} of its {len(self.blocks)} blocks run")
        words = self.text_config.vocab_size
        for mine, other in zip(self.embed(ids)[1], self.embed((ids + 1) % words)[1], strict=True):
            if not _same(mine, other):
                raise self._refused("its blocks are given the tokens themselves, besides the hidden states")

    def _run(self, ids: Tensor, instead: Callable[[int, Tensor, Call], Any]) -> None:
        """Run the model on ids [windows, length] with instead(index, hidden, call) for every block."""

        def forward(index: int) -> Callable[..., Any]:
            def of_block(*args: Any, **kwargs: Any) -> Any:
                if args:
                    return instead(index, args[0], Call(args[1:], kwargs))
                name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
                return instead(index, kwargs.pop(name), Call((), kwargs))

            return of_block

        for index, block in enumerate(self.blocks):
            block.forward = forward(index)
        try:
            self.load_rest()
            with torch.no_grad():
                self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        except LowBitError:
            raise
        except RUNTIME_ERRORS as error:
            raise self._refused(f"its blocks cannot be run one by one ({one_line(error)})") from None
        finally:
            for block in self.blocks:
                del block.forward

    def _refused(self, why: str) -> LowBitError:
        return LowBitError(f"weights.method=qllm does not know {self.family}: {why}; set weights.method=rtn")

    def _zeros(self, index: int) -> nn.Module:
        """A copy of block `index` that holds zeros."""
        block = copy.deepcopy(self.blocks[index])
        vars(block).pop("forward", None)
        for module in block.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
                    module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
        return block.to(self.device)

    def _check_groups(self, index: int) -> None:
        kinds, groups, ranks = self.kinds[index], self.groups[index], world_size(self.tp_group)
        read = [name for group in groups for name in group.linears]
        for name in kinds:
            if read.count(name) != 1:
                raise self._refused(f"{self.fqn(index, name)} does not run once for every token")
        for group in groups:
            first, last = kinds[group.linears[0]][1], group.linears[-1]
            if len({kinds[name][0] for name in group.linears}) > 1:
                raise self._refused(f"{group.linears[0]} and {last}, which reads the same, are of two kinds")
            if ranks > 1 and group.kind == "column" and first.out_features != kinds[group.row][1].in_features:
                raise LowBitError(
                    f"{group.linears[0]} is a fused projection, which tp={ranks} would split wrongly; set tp=1"
                )

    def load_rest(self) -> None:
        """Materialize what is neither a block nor the language-model head (embeddings, final norm)."""
        if self._is_loaded():
            return
        base = self.model.base_model
        prefix = next((f"{n}." for n, m in self.model.named_modules() if m is base and n), "")
        for name, parameter in base.named_parameters():
            fqn = prefix + name
            if parameter.is_meta and not fqn.startswith(self.prefix + "."):
                owner, _, leaf = name.rpartition(".")
                tensor = self._read(fqn, parameter.shape)
                setattr(base.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, module in base.named_modules():
            if not (prefix + name).startswith(self.prefix + "."):
                for leaf, buffer in module.named_buffers(recurse=False):
                    setattr(module, leaf, buffer.to(self.device))
        for name, buffer in stored_buffers(base):
            if not (prefix + name).startswith(self.prefix + "."):
                buffer.copy_(self.weights.read(prefix + name, buffer.shape))

    def free_rest(self) -> None:
        """Drop what load_rest loaded."""
        for module in self.model.base_model.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta:
                    module._parameters[leaf] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    def _is_loaded(self) -> bool:
        return not self.model.get_input_embeddings().weight.is_meta

    def block(self, index: int) -> nn.Module:
        """Block `index` in full precision, its tensor-parallel linears as ShardedLinears with this rank's shards."""
        block = copy.deepcopy(self.blocks[index])
        scales = self._outliers(index)
        for name, (kind, linear) in self.kinds[index].items():
            block.set_submodule(name, self._linear(index, name, kind, linear, scales))
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                tensor = self._read(self.fqn(index, name), parameter.shape)
                setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in stored_buffers(block):
            buffer.copy_(self.weights.read(self.fqn(index, name), buffer.shape))
        for name, (outputs, _) in scales.items():
            if name not in self.kinds[index] and outputs is not None:
                scale_norm(block.get_submodule(name), outputs)
        return block.to(self.device)

    def rest(self) -> dict[str, Tensor]:
        """Every tensor outside the blocks, as it is stored, tied ones once."""
        return {name: self.weights.read(name, shape) for name, shape in self.rest_shapes.items()}

    def check_rest(self) -> None:
        """Raise LowBitError for NaN or Inf outside the blocks, before hours are spent."""
        for name, shape in self.rest_shapes.items():
            if not torch.isfinite(self.weights.read(name, shape)).all():
                raise LowBitError(f"{name} holds NaN or Inf; repair the checkpoint before it is quantized")

    def block_tensors(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """The block's tensors that are not quantized (norms, and biases whole), under their names in the model."""
        stored = self.stored_dtype or self.dtype
        tensors = {
            self.fqn(index, name): parameter.detach().to("cpu", stored)
            for name, parameter in block.named_parameters()
            if not any(name.startswith(linear + ".") for linear in self.kinds[index])
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
                tensors[fqn] = (bias if outputs is None else bias * outputs.to(bias)).to("cpu", stored)
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
        shards = activation_groups(width, self.config.weights.shard_groups)
        if shards % ranks:
            raise LowBitError(
                f"{fqn}: its {width} channels make {shards} shard groups, which tp={ranks} does not divide; "
                f"set weights.shard_groups to a multiple of {ranks}, or another tp"
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


def _same(one: Call, other: Call) -> bool:
    """Tell whether two calls give the same tensors."""
    mine, others = ([t for t in tree_leaves((c.args, c.kwargs)) if isinstance(t, Tensor)] for c in (one, other))
    return len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
