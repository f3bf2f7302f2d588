"""One decode step of a transformer block of LLaMA-2 7B's shape (arXiv 2307.09288), in bf16 and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lowbit.launch.bench import gpu_linears
from megatron_lowbit.launch.bench.config import BenchmarkGpuConfig
from megatron_lowbit.launch.bench.gpu_linears import Linear

WIDTH, INNER, HEADS, CACHED = 4096, 11008, 32, 1024
BATCHES = (1, 16)


class Block:
    """A block without position embedding, which no scheme changes: x [batch, width] -> [batch, width].

    linear: makes a linear of (out, in); cached: tokens in the cache of every sequence, this step's the last.
    """

    def __init__(
        self, linear: Callable[[int, int], Linear], batch: int, width: int, inner: int, heads: int, cached: int,
        device: str, dtype: torch.dtype,
    ):  # fmt: skip
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(inner, width), linear(inner, width), linear(width, inner)
        self.heads, self.norm = heads, torch.ones(width, device=device, dtype=dtype)
        shape = batch, heads, cached, width // heads
        self.keys, self.values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))

    def __call__(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, self.norm.shape, self.norm)
        q, k, v = (of(h).unflatten(1, (self.heads, 1, -1)) for of in (self.q, self.k, self.v))
        self.keys[:, :, -1:], self.values[:, :, -1:] = k, v
        x = x + self.o(F.scaled_dot_product_attention(q, self.keys, self.values).flatten(1))
        h = F.rms_norm(x, self.norm.shape, self.norm)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rows(config: BenchmarkGpuConfig) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a step, for every batch and scheme."""
    for batch in BATCHES:
        x = torch.randn(batch, WIDTH, device="cuda", dtype=torch.bfloat16)
        makers: dict[str, Callable[[int, int], Linear]] = {"bf16": gpu_linears.bf16}
        makers |= {name: partial(gpu_linears.ours, *bits) for name, bits in gpu_linears.SCHEMES.items()}
        of_bf16: float | None = None
        for way, make in makers.items():
            block = partial(Block, make, batch, WIDTH, INNER, HEADS, CACHED, "cuda", torch.bfloat16)
            seconds = gpu_linears.graph_seconds([block(), block()], x)
            of_bf16 = of_bf16 or seconds
            yield {
                "name": "LLaMA-2 7B block",
                "tokens": batch,
                "way": way,
                "seconds": seconds,
                "speedup": of_bf16 / seconds,
            }
