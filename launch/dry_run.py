"""megatron-lowbit quantize --dry-run: what a run would take, from the model's config alone.

The model is built on the meta device: shards and shapes of every linear, bytes per rank, and the time per group of
blocks, estimated from the matrix-product rate that this machine reaches on one of the model's own shapes. The
estimate counts multiplications only; rounding and reading come on top.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from megatron_lowbit.adapters.blocks import skeleton
from megatron_lowbit.adapters.huggingface import check_divides, decoder_blocks, find_linears, model_config
from megatron_lowbit.config import LowBitError, QuantizeConfig, one_line
from megatron_lowbit.distributed import device, env_rank
from megatron_lowbit.kernels import packed_bytes
from megatron_lowbit.launch.engine import compute_dtype, model_name
from megatron_lowbit.launch.qllm import download, read_config
from megatron_lowbit.linear import activation_groups
from megatron_lowbit.quantizer import Scheme


def dry_run(config: QuantizeConfig) -> dict[str, Any]:
    """Print the plan and return it as result rows: one per kind of linear, then the totals."""
    model = skeleton(_hf_config(config), torch.bfloat16)
    text_config = model_config(model)
    check_divides(text_config, config.tp, "tp")
    if config.weights.scheme == "none":
        raise LowBitError("weights.scheme=none quantizes nothing; choose W4A4, W4A8, W6A6, W8A8 or W4A16")
    linears = find_linears(model)
    prefix, blocks = decoder_blocks(model)
    first = {
        name.removeprefix(f"{prefix}.0."): found for name, found in linears.items() if name.startswith(f"{prefix}.0.")
    }
    rows = [_linear_row(name, kind, linear, config) for name, (kind, linear) in first.items()]
    totals = _totals(rows, len(blocks), text_config, config, model)
    if env_rank() == 0:
        _print(rows, totals, config)
    return {"rows": [*rows, totals]}


def _hf_config(config: QuantizeConfig) -> Any:
    """From `architecture` where it is given, so that nothing has to be downloaded."""
    if config.architecture is not None:
        from transformers import AutoConfig

        fields = dict(config.architecture)
        try:
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except Exception as error:  # whatever the config class raises
            raise LowBitError(f"architecture: {one_line(error)}; give the fields of the model's config.json") from None
    if config.model is None:
        raise LowBitError("model is not set; name a folder or hub id, or give the fields of its config as architecture")
    return read_config(Path(download(model_name(config.model))))


def _linear_row(name: str, kind: str, linear: nn.Linear, config: QuantizeConfig) -> dict[str, Any]:
    """Shard and shape of one linear on each rank, and its packed bytes there."""
    outputs, inputs = linear.out_features, linear.in_features
    groups = activation_groups(outputs if kind == "column" else inputs, config.weights.shard_groups)
    if groups % config.tp:
        raise LowBitError(
            f"{name}: {groups} shard groups, which tp={config.tp} does not divide; "
            f"set weights.shard_groups to a multiple of {config.tp}"
        )
    shape = [outputs // config.tp, inputs] if kind == "column" else [outputs, inputs // config.tp]
    bits = Scheme.parse(config.weights.scheme).weight_bits
    scales = 1 if config.weights.group_size is None else shape[1] // config.weights.group_size
    return {
        "name": name,
        "parallel": kind,
        "shape": [outputs, inputs],
        "shard_groups": groups,
        "shape_per_rank": shape,
        "bytes_per_rank": shape[0] * (packed_bytes(shape[1], bits) + 8 * scales),
    }


def _totals(
    rows: list[dict[str, Any]], depth: int, text_config: Any, config: QuantizeConfig, model: Any
) -> dict[str, Any]:
    size = config.correction.blocks_per_group
    calibration = config.calibration
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    length = calibration.sequence_length or min(context, 2048)
    tokens = calibration.samples * length
    per_rank = sum(row["shape_per_rank"][0] * row["shape_per_rank"][1] for row in rows)  # weights of a block
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    attention = 2 * 2 * length * heads * head_dim / config.tp  # q k^T and p v, per token and block
    forward = 2 * per_rank + attention
    # Per token and block: about six partial forwards to observe, one per candidate to score, three for every trained
    # pass.
    candidates = len(config.reassembly.expansions) + 1 if config.reassembly.mode == "adaptive" else 0
    passes = 8 + candidates
    trained = 3 * config.correction.epochs if config.correction.mode != "none" else 0
    multiplications = forward * (passes + trained) * tokens / config.dp * size
    rate = measure_rate(length, rows[0]["shape_per_rank"])
    stored = compute_dtype(config).itemsize
    rest = sum(p.numel() for p in model.parameters()) - sum(r["shape"][0] * r["shape"][1] for r in rows) * depth
    return {
        "name": "total",
        "groups": -(-depth // size),
        "blocks_per_group": size,
        "packed_bytes_per_rank": sum(row["bytes_per_rank"] for row in rows) * depth,
        "other_bytes": rest * 2,
        # float32 weights, their rounded copies, and the candidates of the widest input group while they are scored
        "group_weight_bytes_per_rank": 4 * (2 * per_rank * size + candidates * _widest_group(rows)),
        "stream_bytes_per_rank": tokens // config.dp * hidden * stored,
        "flops_per_group": multiplications,
        "measured_flops_per_second": rate,
        "estimated_seconds_per_group": multiplications / rate,
    }


def _widest_group(rows: list[dict[str, Any]]) -> int:
    """Weights per rank of an owner's column-parallel linears, or of a row-parallel linear, whichever is more."""
    sums: dict[str, int] = {}
    for row in rows:
        key = row["name"] if row["parallel"] == "row" else row["name"].rpartition(".")[0]
        sums[key] = sums.get(key, 0) + row["shape_per_rank"][0] * row["shape_per_rank"][1]
    return max(sums.values())


def measure_rate(tokens: int, shape: list[int]) -> float:
    """Floating-point operations per second of x W^T on this machine, on one of the model's shapes; under a second."""
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    tokens, outputs, inputs = min(tokens, 512), min(shape[0], 4096), min(shape[1], 4096)
    x, w = (torch.ones(n, inputs, device=device(), dtype=dtype) for n in (tokens, outputs))
    best, deadline = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        nn.functional.linear(x, w).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * outputs * inputs / best


def _print(rows: list[dict[str, Any]], totals: dict[str, Any], config: QuantizeConfig) -> None:
    table = Table(title=f"{config.model or 'model'}, {config.weights.scheme}, tp={config.tp}, dp={config.dp}")
    for column in ("linear of a block", "parallel", "shape", "shards", "shape per rank", "packed bytes per rank"):
        table.add_column(column, justify="left" if column == "linear of a block" else "right")
    for row in rows:
        shape, mine = (" x ".join(map(str, row[key])) for key in ("shape", "shape_per_rank"))
        table.add_row(row["name"], row["parallel"], shape, str(row["shard_groups"]), mine, f"{row['bytes_per_rank']:,}")
    Console(width=None if Console().is_terminal else 110).print(table)
    gib = 2**30
    print(f"{totals['groups']} groups of {totals['blocks_per_group']} blocks")
    packed, rest = totals["packed_bytes_per_rank"] / gib, totals["other_bytes"] / gib
    print(f"packed linears per rank: {packed:.2f} GiB; all else: {rest:.2f} GiB")
    print(
        f"on the device while a group is quantized: {totals['group_weight_bytes_per_rank'] / gib:.2f} GiB of weights; "
        f"each of four activation files: {totals['stream_bytes_per_rank'] / gib:.2f} GiB"
    )
    rate = f"{totals['measured_flops_per_second'] / 1e9:,.0f} GFLOP/s measured here"
    print(
        f"estimated time per group: {totals['estimated_seconds_per_group']:,.0f} s "
        f"({totals['flops_per_group']:.3g} operations at the {rate})"
    )
