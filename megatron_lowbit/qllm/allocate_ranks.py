"""Give each linear of a group the rank of its correction, out of one budget of parameters (correction.rank=auto).

    E = R W - Q(R W)                    what rounding does to a weight [out, in]
    G = sum over all tokens of x x^T    of the input x that it reads, reassembled and quantized
    sum over all tokens of |E x|^2      = sum of the squared singular values of E G^(1/2)

A correction of rank r can take away the r largest of these (Eckart and Young) and has r (in + out) parameters. The next
rank goes to the linear where it takes away most of the group's loss per parameter, until the budget, that of rank
`rank_budget` on every linear, is spent. An error of a linear's output counts as much as it grows on its way to the
group's output: by the mean square of J^T v over the linear's outputs, J the derivative of the group's output by the
linear's and v random signs (Hutchinson's estimate of |J|^2).

Both forms of the singular values have the width of the hidden states, and need no input of all shards on one rank:

    column-parallel    G^(1/2) (sum over shards of E_s^T E_s) G^(1/2)                  [in, in]
    row-parallel       sum over all tokens of e e^T,  e = sum over shards of E_s x_s   [out, out]

Sums over shards and windows are taken in their order, so the ranks do not depend on the number of processes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from megatron_lowbit.comm.observers import as_windows
from megatron_lowbit.config import CorrectionConfig, LowBitError
from megatron_lowbit.qllm.block_group import BlockGroup
from megatron_lowbit.qllm.calibration_share import CalibrationShare
from megatron_lowbit.qllm.hidden_stream import HiddenStream
from megatron_lowbit.qllm.shard_groups import ordered_sum
from megatron_lowbit.qllm.sharded_linear import ShardedLinear
from megatron_lowbit.runtime.distributed import all_gather_stack, on_rank_zero


def choose_ranks(
    group: BlockGroup, share: CalibrationShare, inputs: HiddenStream, section: CorrectionConfig
) -> dict[str, int]:
    """Return {linear's fqn: its rank, maybe 0} of a rounded group. inputs: the quantized stream before it.

    A collective call over all ranks.
    """
    linears = group.linears()
    if section.rank != "auto":
        return {linear.name: section.rank for linear in linears}
    sizes = {linear.name: linear.features for linear in linears}
    spectra = error_spectra(group, share, inputs)
    shared = on_rank_zero(partial(allocate_ranks, spectra, sizes, section.rank_budget))
    return {linear.name: shared[linear.name] for linear in linears}


def allocate_ranks(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], rank_budget: int
) -> dict[str, int]:
    """Return {linear: rank} within the parameters that rank `rank_budget` on every linear would have.

    spectra: {linear: what each next rank takes away, descending}; a linear without one gets rank 0. sizes: {linear:
    (inputs, outputs)}, whose sum is the parameters of one rank. Equal gains go to the linear that comes first.
    """
    left = rank_budget * sum(map(sum, sizes.values()))
    ranks = dict.fromkeys(sizes, 0)
    order = {name: number for number, name in enumerate(sizes)}
    gains = {name: spectra[name][: min(sizes[name])].tolist() for name in sizes if name in spectra}
    heap = [(-values[0] / sum(sizes[name]), order[name], name) for name, values in gains.items()]
    heapq.heapify(heap)
    while heap:
        gain, _, name = heapq.heappop(heap)
        cost = sum(sizes[name])
        if gain >= 0 or cost > left:  # nothing more to take away here, or no room for one more
            continue
        ranks[name] += 1
        left -= cost
        if ranks[name] < len(gains[name]):
            heapq.heappush(heap, (-gains[name][ranks[name]] / cost, order[name], name))
    return ranks


@torch.no_grad()
def error_spectra(group: BlockGroup, share: CalibrationShare, inputs: HiddenStream) -> dict[str, Tensor]:
    """Return {linear's fqn: what each next rank takes away from the squared error of the group's output}.

    float64 [hidden], descending; of the linears that are rounded, over all windows of all ranks. A collective call over
    all ranks.
    """
    linears = group.linears()
    moments = []
    for block in group.blocks:
        for input_group in block.input_groups:
            modules = [block.module.get_submodule(name) for name in input_group.linears]
            if readers := [module for module in modules if isinstance(module, ShardedLinear)]:
                moments.append(InputMoments(readers))
    sensitivity = Sensitivity(linears)
    for window in range(len(share.ids)):
        share.raise_if_preempted()
        with torch.enable_grad():
            output = group.forward(inputs.read(window, window + 1, share.device))
        mask = share.mask[window : window + 1].to(share.device)
        for moment in moments:
            moment.add_window(mask, share.dp_group)
        sensitivity.add_window(output, mask, share.number(window), share.dp_group)
    spectra = {name: spectrum for moment in moments for name, spectrum in moment.spectra().items()}
    factors = dict(zip((linear.name for linear in linears), sensitivity.per_output(), strict=True))
    return {name: spectrum * factors[name] for name, spectrum in spectra.items()}


class InputMoments:
    """Sum over tokens what tells the spectra of the linears that read one input: x x^T (column), or e e^T (row)."""

    def __init__(self, linears: Sequence[ShardedLinear]):
        self.linears, self.first = linears, linears[0]
        self.total: Tensor | None = None  # float64 [hidden, hidden]
        self.handle = self.first.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0].detach()

    def add_window(self, mask: Tensor, dp_group: dist.ProcessGroup | None) -> None:
        """Add what the first linear was given last, on this rank and then the next: in the order of the windows."""
        parts = self.first.prepared_inputs(as_windows(self.x, mask)[mask])
        if self.first.kind == "row":
            errors = self.first.rounding_errors()
            parts = [F.linear(x_s, e_s.to(x_s.dtype)) for x_s, e_s in zip(parts, errors, strict=True)]
            parts = [ordered_sum(parts, self.first.tp_group)]
        vectors = parts[0].double()
        for moment in all_gather_stack(vectors.T @ vectors, dp_group):
            self.total = moment.clone() if self.total is None else self.total.add_(moment)

    def spectra(self) -> dict[str, Tensor]:
        """Return {linear's fqn: squared singular values of E G^(1/2)}. A collective call over tp_group.

        Raises LowBitError where the input has NaN or Inf.
        """
        self.handle.remove()
        assert self.total is not None, "a window has been added"
        if not torch.isfinite(self.total).all():  # on all ranks, which have the same sum
            raise LowBitError(f"{self.first.name} is given NaN or Inf; check the model's weights and dtype")
        if self.first.kind == "row":
            return {self.first.name: _descending(self.total)}
        values, vectors = torch.linalg.eigh(self.total)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        found = {}
        for linear in self.linears:
            errors = [shard.double() for shard in linear.rounding_errors()]
            gram = ordered_sum([error.T @ error for error in errors], linear.tp_group)
            found[linear.name] = _descending(root @ gram @ root)
        return found


class Sensitivity:
    """Estimate by how much a squared error of each linear's output grows on its way to the group's output."""

    def __init__(self, linears: Sequence[ShardedLinear]):
        self.linears = linears
        self.outputs: dict[str, Tensor] = {}  # of the last forward
        self.handles = [linear.register_forward_hook(self._record) for linear in linears]
        self.squares = torch.zeros(len(linears), dtype=torch.float64)  # sum of (J^T v)^2 over tokens and outputs
        self.tokens = 0

    def _record(self, linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it is to be differentiated by
            output = output.detach().requires_grad_()
        self.outputs[linear.name] = output
        return output

    def add_window(self, output: Tensor, mask: Tensor, number: int, dp_group: dist.ProcessGroup | None) -> None:
        """Add the derivatives of a window's output, this rank's and then the next ones'. number: the window's."""
        generator = torch.Generator().manual_seed(number)
        signs = torch.randint(0, 2, output.shape, generator=generator).mul(2).sub(1).to(output) * mask[..., None]
        called = [linear for linear in self.linears if linear.name in self.outputs]
        grads = torch.autograd.grad(
            output, [self.outputs[linear.name] for linear in called], signs, allow_unused=True, materialize_grads=True
        )
        of = {linear.name: self._square(linear, grad) for linear, grad in zip(called, grads, strict=True)}
        row = torch.tensor(
            [*(of.get(linear.name, 0.0) for linear in self.linears), mask.sum().item()], dtype=torch.float64
        )
        for *squares, tokens in all_gather_stack(row.to(output.device), dp_group).tolist():
            self.squares += torch.tensor(squares, dtype=torch.float64)
            self.tokens += int(tokens)
        self.outputs.clear()

    def _square(self, linear: ShardedLinear, grad: Tensor) -> float:
        """Return the sum of squares over all shards of a column-parallel linear's outputs, in their order."""
        parts = grad.chunk(len(linear.hp_weights), -1) if linear.kind == "column" else [grad]
        sums = [part.square().sum(dtype=torch.float64) for part in parts]
        return ordered_sum(sums, linear.tp_group if linear.kind == "column" else None).item()

    def per_output(self) -> list[float]:
        """Return each linear's mean of (J^T v)^2 over tokens and outputs."""
        for handle in self.handles:
            handle.remove()
        outputs = [linear.features[1] for linear in self.linears]
        return [square / (self.tokens * out) for square, out in zip(self.squares.tolist(), outputs, strict=True)]


def _descending(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of a positive semidefinite matrix, on the CPU."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0).cpu()
