"""megatron-lowbit benchmark kernels: seconds of the ops on one thread, against eager torch, torch.compile and a copy.

    pack            bf16 [tokens, features] -> a message        encode  to the integers of exact_sum
    unpack          messages of N ranks -> bf16 of their sum    decode  from them
    requantize      messages of N ranks -> the message of their sum, between the hops of two_shot

Formats: `paper` (static, 1/64 in bf16, 4 bits) and `default` (per-token, tiers of 2 to 8 bits in about the shares that
calibration gives them, in no order). What is compared takes turns on the same tensors. As in a collective, `unpack`
writes to memory that is there and all other results are new tensors; `copy_share` compares with a copy into memory that
is there, `clone_share` with one that is new. Shares are of bytes read and written per second.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.comm.codec import Codec, WireFormat
from megatron_lowbit.config import LowBitError
from megatron_lowbit.kernels import cpu, exact, hybrid
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.arguments import fail
from megatron_lowbit.launch.bench.arguments import parse_kernels
from megatron_lowbit.launch.bench.config import BenchmarkKernelsConfig
from megatron_lowbit.launch.tables import Justify, print_table
from megatron_lowbit.runtime.metrics import MetricLogger, progress

CONFIG = BenchmarkKernelsConfig
SHARES = {  # of the features, by bits
    "paper": {16: 1 / 64, 4: 63 / 64},
    "default": {16: 0.01, 8: 0.002, 6: 0.016, 5: 0.24, 3: 0.21, 2: 0.03, 4: 0.492},
}
Case = tuple[str, str, int, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit benchmark kernels ARGV`; returns the exit code."""
    try:
        config = parse_kernels(argv)
        return runner.run_rank("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return fail(str(error))


def run(config: BenchmarkKernelsConfig, logger: MetricLogger) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    os.environ["MEGATRON_LOWBIT_KERNELS"] = "cpu"  # an error where they cannot be built
    start = time.perf_counter()
    try:
        cpu._library()
    except RuntimeError as error:
        raise LowBitError(str(error)) from error
    logger.log(build_seconds=time.perf_counter() - start)
    x = torch.randn(config.tokens, config.features).bfloat16()
    there = torch.empty_like(x)
    rows = []
    count = len(SHARES) * (1 + 2 * len(config.ranks)) + 4
    for format, op, ranks, ours, reference, arguments in progress(cases(config, x), count, "timing"):
        torch._dynamo.reset()
        ways: dict[str, Callable[[], Any]] = {
            "kernel": partial(ours, *arguments),
            "copy": partial(there.copy_, x),
            "clone": x.clone,
            "eager": partial(reference, *arguments),
        }
        if config.compile:
            compiled = torch.compile(reference, dynamic=False)
            ways["compile"] = partial(compiled, *arguments)
        result = ours(*arguments)
        result = result[0] if isinstance(result, tuple) else x if op == "unpack" else result
        moved = arguments[0].nbytes + result.nbytes
        seconds = measure(ways, config.repeats)
        row = {"format": format, "op": op, "ranks": ranks, "bytes": moved, "seconds": seconds}
        median = {name: statistics.median(all) for name, all in seconds.items()}
        for name in ("copy", "clone"):
            row[f"{name}_share"] = moved / median["kernel"] / (2 * x.nbytes / median[name])
        for name in ("eager", "compile"):
            row[f"{name}_speedup"] = median[name] / median["kernel"] if name in median else None
        rows.append(row | {"median_seconds": median})
        logger.log(format=format, op=op, ranks=ranks, kernel_seconds=median["kernel"])
    print_rows(config, rows)
    return {"rows": rows}


def measure(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of every repetition, after one that warms up; eager and compiled torch only three times."""
    for call in ways.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats):
        for name, call in ways.items():
            if number >= 3 and name in ("eager", "compile"):
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cases(config: BenchmarkKernelsConfig, x: Tensor) -> Iterator[Case]:
    """Yield (format, op, ranks, kernel, reference, their arguments)."""
    features, most = config.features, max(config.ranks)
    for format in SHARES:
        first, second = codec(format, features, most, 1.0), codec("paper", features, 1, float(most))
        formats = [WireFormat(c) for c in (first, second)]
        scale, zero_point, *rest = formats[0].of_all()
        own = x, *formats[0].of_sender(0)
        yield format, "pack", 1, kernels.hybrid_pack, hybrid.pack_flat, own
        messages = torch.stack([kernels.hybrid_pack(*own)[0]] * most)
        for ranks in config.ranks:
            some = messages[:ranks], scale[:ranks], zero_point[:ranks], *rest
            arguments: tuple[Any, ...] = *some, torch.empty_like(x)
            ours, reference = kernels.hybrid_unpack_reduce_into, hybrid.unpack_reduce_into_flat
            yield format, "unpack", ranks, ours, reference, arguments
        for ranks in config.ranks:
            some = messages[:ranks], scale[:ranks], zero_point[:ranks], *rest
            arguments = *some, *formats[1].of_sender(0)
            op = kernels.hybrid_unpack_reduce_requantize
            yield format, "requantize", ranks, op, hybrid.requantize_flat, arguments
    center, step = torch.zeros(features), torch.ones(features)
    for bits in (8, 16):
        largest = (2 ** (bits - 1) - 1) // most
        arguments = x, center, 4 * step / largest, largest, bits
        yield f"int{bits}", "encode", 1, kernels.exact_encode, exact.encode_reference, arguments
        codes = kernels.exact_encode(*arguments)[0]
        arguments = codes, center, step, bits, torch.bfloat16
        yield f"int{bits}", "decode", most, kernels.exact_decode, exact.decode_reference, arguments


def codec(format: str, features: int, ranks: int, spread: float) -> Codec:
    """Return a codec for values of a standard deviation of `spread`."""
    counts = {bits: int(share * features) // 8 * 8 for bits, share in SHARES[format].items()}
    counts[4] += features - sum(counts.values())
    bits = torch.cat([torch.full((count,), width, dtype=torch.uint8) for width, count in counts.items()])
    per_token = format == "default"
    unlike = 0.8 + 0.4 * torch.rand(ranks, features)
    scale = spread * unlike * (1.0 if per_token else 6 / 15)
    zero_point = 0.1 * torch.rand(ranks, features) + (0.0 if per_token else 7.5)
    return Codec(scale, zero_point, bits[torch.randperm(features)], per_token)


def print_rows(config: BenchmarkKernelsConfig, rows: list[dict[str, Any]]) -> None:
    median = rows[0]["median_seconds"]
    speed = 4e-9 * config.tokens * config.features / median["copy"]
    title = f"bf16 [{config.tokens}, {config.features}], one thread; copy {speed:.1f} GB/s read and written"
    columns: dict[str, Justify] = {
        "format": "left",
        "op": "left",
        "ranks": "right",
        "ms": "right",
        "of\ncopy": "right",
        "of\nclone": "right",
        "eager": "right",
        "torch.\ncompile": "right",
    }
    cells = []
    for row in rows:
        speedups = (row["eager_speedup"], row["compile_speedup"])
        faster = ("-" if speedup is None else f"{speedup:.1f}x" for speedup in speedups)
        shares = (f"{100 * row[f'{name}_share']:.0f} %" for name in ("copy", "clone"))
        milliseconds = f"{1e3 * row['median_seconds']['kernel']:.2f}"
        cells.append((row["format"], row["op"], str(row["ranks"]), milliseconds, *shares, *faster))
    print_table(columns, cells, title)
