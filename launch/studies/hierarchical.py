"""What one low-rank map over a whole group of blocks would add to the correction: a row of --ablation, and no more.

    h_out + U V h_in        h_in, h_out: hidden states before and after a group (correction.blocks_per_group blocks)

U and V are trained together with the factors of the linears. They are no option of `quantize`, because they cannot be
folded into a weight: no linear at the end of a group reads what came in at its beginning. Every engine would have to
keep h_in over the whole group (and send it along where a pipeline stage ends inside) for two more products per token.
So the folder of this row is no artifact to deploy: the maps lie beside it, in FILE, and only this row applies them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit.comm.plan import CalibrationStats
from megatron_lowbit.config import QuantizeConfig
from megatron_lowbit.launch.qllm import quantize_qllm
from megatron_lowbit.qllm.block_group import Block, BlockGroup
from megatron_lowbit.qllm.pipeline import BlockwiseQuantizer
from megatron_lowbit.qllm.trace_blocks import BlockCall
from megatron_lowbit.runtime.metrics import MetricLogger

RANK = 16
FILE = "maps.safetensors"  # {"<first block>-<last block>.v": V [RANK, hidden], ".u": U [hidden, RANK]}


class MappedGroup(BlockGroup):
    """Run several blocks and add U V h_in. V begins uniform with variance 1 / (3 hidden), U with zeros."""

    def __init__(self, blocks: Sequence[Block], hidden_size: int, device: torch.device, seed: int):
        super().__init__(blocks)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + blocks[0].index) % 2**63)
        bound = hidden_size**-0.5
        v = torch.rand(RANK, hidden_size, generator=generator).mul_(2 * bound).sub_(bound)
        self.v, self.u = nn.Parameter(v.to(device)), nn.Parameter(torch.zeros(hidden_size, RANK, device=device))

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.v, self.u]

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + mapped(hidden, self.v, self.u)


class HierarchicalQuantizer(BlockwiseQuantizer):
    """Run method qllm with a map beside every group, and keep the maps in FILE."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.maps: dict[str, Tensor] = {}

    def load_group(self, indices: Sequence[int], calls: Mapping[int, Sequence[BlockCall]]) -> BlockGroup:
        blocks = super().load_group(indices, calls).blocks
        group = MappedGroup(blocks, self.source.text_config.hidden_size, self.source.device, self.config.seed)
        name = f"{indices[0]}-{indices[-1]}"
        self.maps |= {f"{name}.v": group.v.data, f"{name}.u": group.u.data}
        return group

    def run(self, save_beside: Callable[[Path], Any]) -> CalibrationStats:
        stats = super().run(save_beside)
        save_file({name: tensor.cpu() for name, tensor in self.maps.items()}, self.folder / FILE)
        return stats


def quantize_hierarchical(settings: QuantizeConfig, logger: MetricLogger) -> None:
    """Quantize into output_dir, with FILE beside it: from the start, since no state of a killed run holds the maps."""
    shutil.rmtree(Path(settings.output_dir) / "resume", ignore_errors=True)
    quantize_qllm(settings, logger, plans=False, quantizer=HierarchicalQuantizer)


@contextmanager
def maps_of(folder: Path, blocks: nn.ModuleList) -> Iterator[None]:
    """Have a model's decoder blocks add the maps of `folder` to what they put out, inside the context."""
    tensors = load_file(folder / FILE)
    handles = []
    for name in {name.rpartition(".")[0] for name in tensors}:
        first, last = map(int, name.split("-"))
        handles += add_map(blocks[first], blocks[last], tensors[f"{name}.v"], tensors[f"{name}.u"])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_map(first: nn.Module, last: nn.Module, v: Tensor, u: Tensor) -> list[Any]:
    """Add U V h_in to the output of the last block, for what the first was given; returns the hooks' handles."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        added = mapped(seen.pop(), v, u)
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    return [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]


def mapped(hidden: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Return U V h [..., hidden] of h [..., hidden]."""
    return F.linear(F.linear(hidden, v.to(hidden)), u.to(hidden))
