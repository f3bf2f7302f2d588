"""Seconds of a linear on a GPU, in every way that can be had here: ours, cuBLAS in bf16, gemlite and torchao."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lowbit import kernels
from megatron_lowbit.config import one_line
from megatron_lowbit.launch.bench.config import BenchmarkGpuConfig

Linear = Callable[[Tensor], Tensor]
SHAPES = {  # {layer: (out, in)}; below 8192 launches and L2 are most of what is measured
    "LLaMA-2 70B up": (28672, 8192),
    "LLaMA-2 70B down": (8192, 28672),
    "LLaMA-2 70B attention": (8192, 8192),
    "LLaMA-2 7B up": (11008, 4096),
    "LLaMA-2 7B attention": (4096, 4096),
}
SCHEMES = {"W4A16": (4, 16), "W4A8": (4, 8), "W8A8": (8, 8), "W4A4": (4, 4), "W6A6": (6, 6)}
MOST_COPIES = 8  # of a weight


def rows(config: BenchmarkGpuConfig) -> Iterator[dict[str, Any]]:
    """Yield seconds by layer, tokens and way; None, and why, for a peer that fails."""
    for name, (out, features) in SHAPES.items():
        for tokens in config.tokens:
            x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
            of_bf16: float | None = None
            for way, make in ways().items():
                row: dict[str, Any] = {"name": name, "out": out, "in": features, "tokens": tokens, "way": way}
                try:
                    seconds = graph_seconds(copies(partial(make, out, features), out * features // 2), x)
                except Exception as error:  # a peer's own, of whatever kind
                    if way in SCHEMES or way == "bf16":
                        raise
                    yield {**row, "seconds": None, "speedup": None, "error": one_line(error)}
                    continue
                of_bf16 = of_bf16 or seconds
                work = 2e-12 * tokens * out * features / seconds
                yield {**row, "seconds": seconds, "speedup": of_bf16 / seconds, "tera_operations_per_s": work}


def ways() -> dict[str, Callable[[int, int], Linear]]:
    """Return {name: what makes a linear of (out, in)}, bf16 first."""
    found: dict[str, Callable[[int, int], Linear]] = {"bf16": bf16}
    found |= {name: partial(ours, *bits) for name, bits in SCHEMES.items()}
    if find_spec("gemlite"):
        found |= {"gemlite W4A16 g128": gemlite_w4a16, "gemlite W8A8": gemlite_w8a8}
    if find_spec("torchao"):
        found |= {"torchao W4A16 g128": partial(torchao, "int4"), "torchao W8A8": partial(torchao, "int8")}
    return found


def bf16(out: int, features: int, device: str = "cuda") -> Linear:
    weight = torch.randn(out, features, device=device, dtype=torch.bfloat16) / features**0.5
    return lambda x: F.linear(x, weight)


def ours(weight_bits: int, act_bits: int, out: int, features: int, device: str = "cuda") -> Linear:
    """Return quant_linear of a random weight of standard deviation about features^-0.5."""
    row_bytes = kernels.packed_bytes(features, weight_bits)
    packed = torch.randint(256, (out, row_bytes), dtype=torch.uint8, device=device)
    levels = 2**weight_bits - 1
    scale = torch.full((out, 1), 12**0.5 / levels / features**0.5, device=device)
    zero_point = torch.full((out, 1), float(levels // 2), device=device)
    return lambda x: kernels.quant_linear(x, packed, scale, zero_point, weight_bits, act_bits, 1, x.dtype)


def gemlite_w4a16(out: int, features: int) -> Linear:
    from gemlite.helper import A16Wn

    codes = torch.randint(16, (out, features), dtype=torch.uint8, device="cuda")
    scale, zero = (torch.full((out, features // 128), v, dtype=torch.bfloat16, device="cuda") for v in (0.01, 7.0))
    return A16Wn(device="cuda", dtype=torch.bfloat16).from_weights(codes, scale, zero, W_nbits=4, group_size=128)


def gemlite_w8a8(out: int, features: int) -> Linear:
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device="cuda", dtype=torch.bfloat16).from_linear(plain(out, features))


def torchao(kind: str, out: int, features: int) -> Linear:
    from torchao import quantization

    module = nn.Sequential(plain(out, features))
    config = (
        quantization.Int4WeightOnlyConfig(group_size=128)
        if kind == "int4"
        else quantization.Int8DynamicActivationInt8WeightConfig()
    )
    quantization.quantize_(module, config)
    return module


def plain(out: int, features: int) -> nn.Linear:
    return nn.Linear(features, out, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)


def copies(make: Callable[[], Linear], weight_bytes: int) -> list[Linear]:
    """Return linears whose weights together are twice the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(min(MOST_COPIES, 1 + 2 * cache // weight_bytes))]


@torch.inference_mode()
def graph_seconds(linears: list[Linear], x: Tensor, repeats: int = 9) -> float:
    """Return the median seconds of one linear, of replays of a CUDA graph that calls each in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for linear in linears:
                linear(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for linear in linears:
            linear(x)
    seconds = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(linears))
    return statistics.median(seconds[2:])
