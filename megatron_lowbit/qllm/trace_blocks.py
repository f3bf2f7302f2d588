"""How a decoder calls its blocks, seen on copies of them that hold zeros.

What a block is given besides the hidden states, what it returns, and which of its linears read the same tensor: known
from one forward of a few tokens, before any block is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megatron_lowbit.adapters.huggingface import apply as huggingface
from megatron_lowbit.adapters.huggingface.apply import InputGroup, Kind
from megatron_lowbit.config import LowBitError, one_line

TRACED_TOKENS = 8  # of each of the windows that show how a model calls its blocks
# What a model's code raises where its blocks cannot be run one by one.
RUNTIME_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError),
    *(TypeError, ValueError),
)


@dataclass
class BlockCall:
    """Hold what a block is given besides the hidden states, its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states [windows, length, hidden] after the block, of those before it."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, however deep."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class BlockTracer:
    """Run a model with something else in the place of its blocks.

    model: built without its blocks' weights; the rest has to be loaded whenever `trace` or `embed` runs. prefix: fqn of
    the list of blocks. kinds: of every block, {name within it: (kind, linear)}. tp: tensor-parallel ranks that are to
    share the linears. family: what errors call the model. wants: the setting that needs the tracer, and what to set in
    its place.
    """

    def __init__(
        self,
        model: Any,
        prefix: str,
        blocks: nn.ModuleList,
        kinds: Sequence[Mapping[str, tuple[Kind, nn.Linear]]],
        device: torch.device,
        tp: int,
        family: str,
        wants: tuple[str, str] = ("weights.method=qllm", "set weights.method=rtn"),
    ):
        self.model, self.prefix, self.blocks, self.kinds = model, prefix, blocks, kinds
        self.device, self.tp, self.family, self.wants = device, tp, family, wants
        self.returned: list[tuple[Any, ...] | None] = []  # besides the hidden states; None: these alone, no tuple

    def embed(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return (hidden states [windows, length, hidden] before the first block, how every block is called for them).

        ids: int64 [windows, length]. `trace` has to come first.
        """
        calls: list[BlockCall] = []
        first: list[Tensor] = []

        def record(index: int, hidden: Tensor, call: BlockCall) -> Any:
            first.append(hidden)
            calls.append(call)
            rest = self.returned[index]
            return hidden if rest is None else (hidden, *rest)

        self._run(ids, record)
        return first[0], calls

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [windows, length, vocab] of a model whose last block puts out `hidden`.

        ids: int64 [windows, length], the tokens. `trace` has to come first, and the output projection to be loaded.
        """

        def put_out(index: int, before: Tensor, call: BlockCall) -> Any:
            rest = self.returned[index]
            return hidden if rest is None else (hidden, *rest)

        return self._run(ids, put_out, self.model).logits

    def trace(self, ids: Tensor) -> list[list[InputGroup]]:
        """Return, for every block, which of its linears read the same input.

        ids: int64 [windows, length], of which a few tokens serve. Raises LowBitError for a model whose blocks cannot be
        run one by one with the arguments of another text, and for linears that do not read every token once.
        """
        self.returned = []
        groups: list[list[InputGroup]] = []
        outputs: list[Tensor] = []  # the hidden states after each block
        others: list[Tensor] = []  # what the blocks return besides
        ids = ids[:1, :TRACED_TOKENS].repeat(2, 1)

        def run_zeros(index: int, hidden: Tensor, call: BlockCall) -> Any:
            if index != len(outputs):
                raise self._refused("its blocks do not run one after the other")
            if hidden.shape[:-1] != ids.shape:
                raise self._refused(f"its hidden states are {hidden.ndim}-dimensional, not windows x tokens x channels")
            if outputs and hidden is not outputs[-1]:
                raise self._refused("it changes the hidden states between its blocks")
            if any(tensor is other for tensor in call.tensors() for other in [*others, *outputs]):
                raise self._refused("its blocks hand on more than hidden states")
            block = self._zeros(index)
            linears = {name: (kind, block.get_submodule(name)) for name, (kind, _) in self.kinds[index].items()}
            with torch.no_grad(), huggingface.input_groups(block, linears, ids.numel()) as found:
                output = block(hidden, *call.args, **call.kwargs)
            groups.append(found)
            self._check_groups(index, found)
            self.returned.append(output[1:] if isinstance(output, tuple) else None)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            others.extend(t for t in tree_leaves(self.returned[-1]) if isinstance(t, Tensor))
            return output

        self._run(ids, run_zeros)
        if len(outputs) != len(self.blocks):
            raise self._refused(f"{len(outputs)} of its {len(self.blocks)} blocks run")
        self._check_calls(ids)
        return groups

    def _run(self, ids: Tensor, replacement: Callable[[int, Tensor, BlockCall], Any], model: Any = None) -> Any:
        """Run the model on ids [windows, length] with replacement(index, hidden, call) for every block. model: without
        its output projection where it is None."""
        model = self.model.base_model if model is None else model

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if args:
                    return replacement(index, args[0], BlockCall(args[1:], kwargs))
                name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
                return replacement(index, kwargs.pop(name), BlockCall((), kwargs))

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index)
        try:
            with torch.no_grad():
                return model(input_ids=ids.to(self.device), use_cache=False)
        except LowBitError:
            raise
        except RUNTIME_ERRORS as error:
            raise self._refused(f"its blocks cannot be run one by one ({one_line(error)})") from None
        finally:
            for block in self.blocks:
                del block.forward

    def _zeros(self, index: int) -> nn.Module:
        """Return a copy of block `index` that holds zeros."""
        block = copy.deepcopy(self.blocks[index])
        vars(block).pop("forward", None)
        for module in block.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
                setattr(module, leaf, nn.Parameter(zeros, requires_grad=False))
        return block.to(self.device)

    def _check_groups(self, index: int, groups: Sequence[InputGroup]) -> None:
        kinds = self.kinds[index]
        read = [name for group in groups for name in group.linears]
        for name in kinds:
            if read.count(name) != 1:
                raise self._refused(f"{self.prefix}.{index}.{name} does not run once for every token")
        for group in groups:
            first, last = kinds[group.linears[0]][1], group.linears[-1]
            if len({kinds[name][0] for name in group.linears}) > 1:
                raise self._refused(f"{group.linears[0]} and {last}, which reads the same, are of two kinds")
            if self.tp > 1 and group.kind == "column" and first.out_features != kinds[group.row][1].in_features:
                raise LowBitError(
                    f"{group.linears[0]} is a fused projection, which tp={self.tp} would split wrongly; set tp=1"
                )

    def _check_calls(self, ids: Tensor) -> None:
        """Raise LowBitError where other tokens change what the blocks are given besides the hidden states."""
        other_ids = (ids + 1) % huggingface.model_config(self.model).vocab_size
        for one, other in zip(self.embed(ids)[1], self.embed(other_ids)[1], strict=True):
            pairs = one.tensors(), other.tensors()
            if len(pairs[0]) != len(pairs[1]) or not all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)):
                raise self._refused("its blocks are given the tokens themselves, besides the hidden states")

    def _refused(self, why: str) -> LowBitError:
        return LowBitError(f"{self.wants[0]} does not know {self.family}: {why}; {self.wants[1]}")
