"""Who reads the output of a norm: seen while the model, or a block, runs once.

A norm may put out reassembled channels only where everything that reads them expects them. A linear that stays in full
precision, a router, a gate's parameter or a residual connection reads the plain channels; the linears that are
quantized then reassemble their own input. Names do not tell who reads what, so every operation of the run is watched:
one that takes a norm's output, by object identity, outside the linears in question is another reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Reads:
    """The reads of a run. inputs: (fqn of a linear, its input) in the order they ran; outputs: (fqn of a norm, its
    output); others: ids of the outputs that something else read, too."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    others: set[int] = field(default_factory=set)

    def norm_of(self, tensor: Tensor) -> str | None:
        """Return the norm whose output a tensor is."""
        return next((name for name, output in self.outputs if output is tensor), None)

    def linears_of(self, norm: str) -> tuple[str, ...]:
        """Return the linears that read a norm's output, in the order they ran."""
        outputs = [output for name, output in self.outputs if name == norm]
        return tuple(dict.fromkeys(name for name, x in self.inputs if any(x is output for output in outputs)))

    def has_others(self, norm: str) -> bool:
        """Tell whether something besides the linears reads a norm's output."""
        return any(id(output) in self.others for name, output in self.outputs if name == norm)


class _ReadTracker(TorchDispatchMode):
    """A mode that notes the operations that take a norm's output while no linear in question runs."""

    def __init__(self, reads: Reads):
        super().__init__()
        self.reads, self.inside = reads, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and self.reads.norm_of(value) is not None:
                    self.reads.others.add(id(value))
        return func(*args, **(kwargs or {}))


def is_norm(module: nn.Module) -> bool:
    """Tell a norm by its gain: a module without children that has a weight of one dimension."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(module.children())


@contextmanager
def track_reads(root: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[Reads]:
    """Record who reads which norm while `root` runs once within the context, on any device, without gradients;
    afterwards the Reads are complete.

    linears: {fqn: module} whose reads are told apart from all others.
    """
    reads = Reads()
    mode = _ReadTracker(reads)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mode.inside += 1
            reads.inputs.append((name, args[0] if args else next(iter(kwargs.values()))))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.inside -= 1

    def put_out(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                reads.outputs.append((name, output))

        return hook

    handles = [m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in linears.items()]
    handles += [m.register_forward_hook(leave) for m in linears.values()]
    handles += [m.register_forward_hook(put_out(name)) for name, m in root.named_modules() if is_norm(m)]
    try:
        with mode:
            yield reads
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reads_of_model(model: Any, linears: Mapping[str, nn.Module], device: torch.device) -> Reads:
    """Run a causal LM on two tokens, as for inference, and return who reads its norms. A collective call where the
    model is sharded."""
    modes: Sequence[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with track_reads(model, linears) as reads:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for module, training in modes:
            module.training = training
    return reads
