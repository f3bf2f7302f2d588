"""megatron-lowbit quantize --dry-run: what a run would take, from the model's config alone.

The model is built on the meta device: shards and shapes of every linear, bytes per rank, and operations, bytes and
seconds of every stage (cost_model.py), at the rates that this machine reaches on the model's own shapes or at those
that are given for another one (rates.*).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_lowbit.adapters.huggingface.apply import check_divides, decoder_blocks, find_linears, model_config
from megatron_lowbit.adapters.huggingface.head import find_head
from megatron_lowbit.adapters.huggingface.skeleton import skeleton
from megatron_lowbit.config import LowBitError, QuantizeConfig, one_line
from megatron_lowbit.kernels import packed_bytes
from megatron_lowbit.launch.choices import with_choices
from megatron_lowbit.launch.dry_run.cost_model import Rates, Shape, Work, calibrate_stage, find_rates, stages
from megatron_lowbit.launch.inputs import model_name
from megatron_lowbit.launch.loading import compute_dtype, read_config
from megatron_lowbit.launch.model_folder import download
from megatron_lowbit.launch.tables import number, print_table
from megatron_lowbit.layers.linear import activation_groups
from megatron_lowbit.quant.affine import Scheme
from megatron_lowbit.quant.tp_sizes import groups_for, widths_of
from megatron_lowbit.runtime.launcher_env import env_rank
from megatron_lowbit.runtime.say import say


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
    widths = widths_of(linear for _, linear in linears.values())
    config = with_choices(config, text_config, widths)
    rows = [_linear_row(name, kind, linear, config, widths) for name, (kind, linear) in first.items()]
    totals = _totals(rows, len(blocks), text_config, config, model)
    if env_rank() == 0:
        _print(rows, totals, config)
    return {"rows": [*rows, totals]}


def _hf_config(config: QuantizeConfig) -> Any:
    """Build the config from `architecture` where it is given, so that nothing has to be downloaded."""
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


def _linear_row(name: str, kind: str, linear: nn.Linear, config: QuantizeConfig, widths: set[int]) -> dict[str, Any]:
    """Return the shard and shape of one linear on each rank, and its packed bytes there. widths: of all linears."""
    outputs, inputs = linear.out_features, linear.in_features
    groups = activation_groups(outputs if kind == "column" else inputs, config.weights.shard_groups or 1)
    if groups % config.tp:
        raise LowBitError(
            f"{name}: {groups} shard groups, which tp={config.tp} does not divide; "
            f"set weights.shard_groups={groups_for(config.tp, widths)}"
        )
    shape = [outputs // config.tp, inputs] if kind == "column" else [outputs, inputs // config.tp]
    bits = config.weights.budget or Scheme.parse(config.weights.scheme).weight_bits
    scales = 1 if config.weights.group_size is None else shape[1] // config.weights.group_size
    return {
        "name": name,
        "parallel": kind,
        "shape": [outputs, inputs],
        "shard_groups": groups,
        "shape_per_rank": shape,
        "bytes_per_rank": shape[0] * (math.ceil(shape[1] * bits / 8) + 8 * scales),
    }


def _totals(
    rows: list[dict[str, Any]], depth: int, text_config: Any, config: QuantizeConfig, model: Any
) -> dict[str, Any]:
    size = config.correction.blocks_per_group
    calibration = config.calibration
    context = getattr(text_config, "max_position_embeddings", None) or 2048
    length = calibration.sequence_length or min(context, 2048)
    tokens = calibration.samples * length
    per_rank = sum(_weights(row) for row in rows)  # of a block
    candidates = len(config.reassembly.expansions) + 1 if config.reassembly.mode == "adaptive" else 0
    rest = sum(p.numel() for p in model.parameters()) - sum(r["shape"][0] * r["shape"][1] for r in rows) * depth
    shape = _shape(rows, depth, text_config, config, length)
    outputs, inputs = max((row["shape_per_rank"] for row in rows), key=lambda shape: shape[0] * shape[1])
    rates = find_rates(config.rates, length, (outputs, inputs), shape.hidden)
    sizes = tuple(size for size in config.comm.tp_sizes or () if _divides(text_config, size))
    works = stages(shape, tokens, calibration.samples, config, sizes)
    alone = calibrate_stage(shape, tokens, calibration.samples, config, sizes)
    seconds = sum(sum(rates.seconds(work).values()) for work in works.values())
    groups = -(-depth // size)
    return {
        "name": "total",
        "groups": groups,
        "blocks_per_group": size,
        "packed_bytes_per_rank": sum(row["bytes_per_rank"] for row in rows) * depth,
        "other_bytes": rest * 2 - _saved_by_head(model, config.weights.lm_head_bits),
        # float32 weights, their rounded copies, and the candidates of the widest input group while they are scored
        "group_weight_bytes_per_rank": 4 * (2 * per_rank * size + candidates * _widest_group(rows)),
        "stream_bytes_per_rank": tokens // config.dp * shape.hidden * shape.value,
        "flops_per_group": sum(work.flops for work in works.values()) / groups,
        "rates": asdict(rates),
        "stages": {name: _stage(work, rates) for name, work in works.items()},
        "calibrate": _stage(alone, rates),
        "estimated_seconds": seconds,
        "estimated_seconds_per_group": seconds / groups,
    }


def _stage(work: Work, rates: Rates) -> dict[str, Any]:
    return {**asdict(work), "seconds": rates.seconds(work)}


def _saved_by_head(model: nn.Module, bits: int) -> int:
    """Return the bytes by which an output projection in `bits` bits is smaller than in bf16; 0 bits: as it is."""
    if not bits:
        return 0
    linear = find_head(model).linear
    return linear.out_features * (2 * linear.in_features - packed_bytes(linear.in_features, bits) - 8)


def _weights(row: dict[str, Any]) -> int:
    return row["shape_per_rank"][0] * row["shape_per_rank"][1]


def _divides(text_config: Any, size: int) -> bool:
    try:
        check_divides(text_config, size, "comm.tp_sizes")
    except LowBitError:
        return False
    return True


def _shape(rows: list[dict[str, Any]], depth: int, text_config: Any, config: QuantizeConfig, length: int) -> Shape:
    """Return what the cost model wants to know; the owner of linears that comes first is the attention."""
    owners = list(dict.fromkeys(row["name"].rpartition(".")[0] for row in rows))

    def of(parallel: str, owner: str) -> list[dict[str, Any]]:
        return [r for r in rows if r["parallel"] == parallel and r["name"].startswith(owner + ".")]

    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    inner, outer = of("row", owners[0]), of("row", owners[-1])
    section = config.correction
    return Shape(
        depth=depth,
        hidden=hidden,
        row_widths=(inner[0]["shape_per_rank"][1], outer[0]["shape_per_rank"][1]),
        qkv=sum(map(_weights, of("column", owners[0]))),
        o=sum(map(_weights, inner)),
        gate_up=sum(map(_weights, of("column", owners[-1]))),
        down=sum(map(_weights, outer)),
        attention=2 * 2 * length * heads * head_dim / config.tp,
        columns=len([row for row in rows if row["parallel"] == "column"]),
        trained=(section.rank_budget if section.rank == "auto" else section.rank)
        * sum(sum(row["shape_per_rank"]) for row in rows),
        packed_bytes=sum(row["bytes_per_rank"] for row in rows),
        stored=2,  # bfloat16 or float16
        value=compute_dtype(config).itemsize,
    )


def _widest_group(rows: list[dict[str, Any]]) -> int:
    """Return the weights per rank of an owner's column-parallel linears, or of a row-parallel linear, whichever is
    more."""
    sums: dict[str, int] = {}
    for row in rows:
        key = row["name"] if row["parallel"] == "row" else row["name"].rpartition(".")[0]
        sums[key] = sums.get(key, 0) + row["shape_per_rank"][0] * row["shape_per_rank"][1]
    return max(sums.values())


def _print(rows: list[dict[str, Any]], totals: dict[str, Any], config: QuantizeConfig) -> None:
    columns = ("linear of a block", "parallel", "shape", "shards", "shape\nper rank", "packed bytes\nper rank")
    cells = []
    for row in rows:
        shape, mine = (" x ".join(map(str, row[key])) for key in ("shape", "shape_per_rank"))
        cells.append(
            (row["name"], row["parallel"], shape, str(row["shard_groups"]), mine, f"{row['bytes_per_rank']:,}")
        )
    print_table(columns, cells, f"{config.model or 'model'}, {config.weights.scheme}, tp={config.tp}, dp={config.dp}")
    gib = 2**30
    say(f"{totals['groups']} groups of {totals['blocks_per_group']} blocks")
    packed, rest = totals["packed_bytes_per_rank"] / gib, totals["other_bytes"] / gib
    say(f"packed linears per rank: {packed:.2f} GiB; all else: {rest:.2f} GiB")
    say(
        f"on the device while a group is quantized: {totals['group_weight_bytes_per_rank'] / gib:.2f} GiB of weights; "
        f"each of four activation files: {totals['stream_bytes_per_rank'] / gib:.2f} GiB"
    )
    _print_stages(totals, config)


RESOURCES = {
    "flops": "matrix products",
    "rounded": "rounding",
    "observed": "statistics of partial sums",
    "network": "network",
    "disk": "disk",
}
UNITS = {"flops": "FLOP/s", "rounded": "values/s", "observed": "values/s", "network": "B/s", "disk": "B/s"}


def _print_stages(totals: dict[str, Any], config: QuantizeConfig) -> None:
    """Print the work and seconds of every stage, the rates and where they come from, and what most of the time goes
    into."""
    work, spent = [], []
    for name, stage in {**totals["stages"], "calibrate, alone": totals["calibrate"]}.items():
        seconds = stage["seconds"]
        received, disk = (f"{stage[key] / 2**30:,.2f}" for key in ("network", "disk"))
        work.append((name, f"{stage['flops']:.2e}", received, disk))
        spent.append(
            (name, *(number(seconds.get(resource), ",.1f") for resource in RESOURCES), f"{sum(seconds.values()):,.1f}")
        )
    one = f"one of {config.tp * config.dp} ranks"
    print_table(("stage", "FLOP", "received (GiB)", "disk (GiB)"), work, f"{one}: work of every stage")
    headers = [what.replace(" ", "\n") for what in RESOURCES.values()]
    print_table(("stage", *headers, "seconds"), spent, f"{one}: seconds by what they are spent on")
    rates = totals["rates"]
    known = [
        f"{what} {rates[key]:.3g} {UNITS[key]} ({'given' if key in rates['given'] else 'measured here'})"
        for key, what in RESOURCES.items()
        if rates[key] is not None
    ]
    say(f"rates per rank: {', '.join(known)}")
    if rates["network"] is None and config.tp * config.dp > 1:
        say("the network's seconds are left out: give rates.network in bytes per second")
    by_resource = {key: sum(stage["seconds"].get(key, 0.0) for stage in totals["stages"].values()) for key in RESOURCES}
    most, total = max(by_resource, key=lambda key: by_resource[key]), totals["estimated_seconds"]
    say(
        f"estimated time: {total:,.0f} s, {totals['estimated_seconds_per_group']:,.1f} s per group; "
        f"{by_resource[most] / total:.0%} of it is {RESOURCES[most]}"
    )
