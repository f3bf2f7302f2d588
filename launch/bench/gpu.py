"""megatron-lowbit benchmark gpu: everything that waits for a GPU, in one command of a few minutes on one of them.

    bits      every Triton kernel against its reference, bit for bit; weight-only products within their tolerance, and
              the same bits in every batch                                                            (gpu_checks.py)
    graphs    a linear captured in a CUDA graph and replayed on other tokens
    nccl      the collectives of torch.distributed that ours are made of, in a group of one
    decode    one step of a block of LLaMA-2 7B, with a cache of 1024 tokens, under CUDA graphs        (gpu_block.py)
    linear    seconds of a linear under CUDA graphs, beside cuBLAS in bf16 and, where they are installed, gemlite and
              torchao                                                                                 (gpu_linears.py)

Weights rotate, so that none is in the L2 cache when its turn comes. What does not fit into `seconds` is left out, and
the last line says how much.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.config import LowBitError
from megatron_lowbit.launch import runner
from megatron_lowbit.launch.arguments import fail
from megatron_lowbit.launch.bench import gpu_block, gpu_checks, gpu_linears
from megatron_lowbit.launch.bench.arguments import parse_gpu
from megatron_lowbit.launch.bench.config import BenchmarkGpuConfig
from megatron_lowbit.launch.tables import Justify, number, print_table
from megatron_lowbit.runtime.metrics import MetricLogger, progress
from megatron_lowbit.runtime.say import say

CONFIG = BenchmarkGpuConfig
SECTIONS = {  # {name: rows of it}, in the order they run
    "bits": lambda config: gpu_checks.bits("cuda"),
    "graphs": lambda config: gpu_checks.graphs(),
    "nccl": lambda config: gpu_checks.nccl(),
    "decode": lambda config: gpu_block.rows(config),
    "linear": lambda config: gpu_linears.rows(config),
}


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit benchmark gpu ARGV`; returns the exit code."""
    try:
        config = parse_gpu(argv)
        if not torch.cuda.is_available():
            raise LowBitError("benchmark gpu needs a GPU that PyTorch sees; torch.cuda.is_available() is false here")
        code = runner.run_rank("benchmark", sys.modules[__name__], config)
    except LowBitError as error:
        return fail(str(error))
    if code == 0 and (wrong := json.loads((Path(config.output_dir) / "benchmark.json").read_text())["wrong"]):
        fail(f"{len(wrong)} checks failed: {', '.join(wrong)}")
        return 1
    return code


def run(config: BenchmarkGpuConfig, logger: MetricLogger) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    os.environ["MEGATRON_LOWBIT_KERNELS"] = "triton"  # an error where they cannot run
    end = time.perf_counter() + config.seconds
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []
    for section, of in progress(SECTIONS.items(), len(SECTIONS), "checking and timing"):
        for row in of(config):
            rows.append({"section": section, **row})
            logger.log(**{key: value for key, value in rows[-1].items() if not isinstance(value, list)})
            if time.perf_counter() > end:
                unfinished.append(section)
                break
    print_rows(rows, torch.cuda.get_device_name())
    if unfinished:
        say(f"not all of {', '.join(unfinished)} in {config.seconds:g} seconds")
    wrong = [f"{row['section']} {row['name']}" for row in rows if row.get("right") is False]
    return {"rows": rows, "device": torch.cuda.get_device_name(), "unfinished": unfinished, "wrong": wrong}


def print_rows(rows: list[dict[str, Any]], device: str) -> None:
    """Print the checks, then the times."""
    checks = [row for row in rows if "right" in row]
    if checks:
        told = [(row["section"], row["name"], "right" if row["right"] else "WRONG") for row in checks]
        print_table({"check": "left", "of": "left", "": "left"}, told, device)
    timed = [row for row in rows if "way" in row]
    if timed:
        columns: dict[str, Justify] = {
            "layer": "left",
            "tokens": "right",
            "way": "left",
            "us": "right",
            "of bf16": "right",
        }
        print_table(columns, [_cells(row) for row in timed], f"{device}, CUDA graphs, weights not in L2")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["seconds"] is None:
        return row["name"], str(row["tokens"]), row["way"], "fails", "-"
    return row["name"], str(row["tokens"]), row["way"], number(1e6 * row["seconds"], ".1f"), f"{row['speedup']:.2f}x"
