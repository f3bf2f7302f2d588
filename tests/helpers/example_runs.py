"""Folders as stages leave them, with figures made up for tests of the page: no model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.comm.build_plan import build_plan
from megatron_lowbit.comm.plan import CalibrationStats, FeatureRange
from megatron_lowbit.config import CommConfig
from megatron_lowbit.io.files import write_json

TRAP = "<script>alert(1)</script> $x$ & \"'"  # what must appear as text, wherever it comes from
ENVIRONMENT = {"versions": {"torch": "2"}, "commit": None, "command": ["megatron-lowbit", "evaluate", TRAP]}


def site_names(layers: int) -> list[str]:
    return [f"model.layers.{n}.{kind}" for n in range(layers) for kind in ("self_attn.o_proj", "mlp.down_proj")]


def calibrated(folder: Path, layers: int = 2, features: int = 64, sizes: tuple[int, ...] = (2, 4)) -> None:
    """Ranges and plans; feature 5 is 100 times as wide as the others on every rank."""
    generator = torch.Generator().manual_seed(0)
    ranges: dict[int, dict[str, FeatureRange]] = {}
    for size in sizes:
        ranges[size] = {}
        for name in site_names(layers):
            high = 1 + torch.rand(size, features, generator=generator)
            high[:, 5] = 100.0
            ranges[size][name] = FeatureRange(-high, high, torch.zeros(size, features), high / 3, torch.ones(size))
    shapes = {"weights": {name: 1 for name in site_names(layers)}}
    stats = CalibrationStats(ranges, shapes)  # type: ignore[arg-type]
    stats.save(folder)
    for size in sizes:
        build_plan(stats, size, CommConfig(preset="paper"), 0).save(folder)


def quantized(folder: Path, layers: int = 2) -> None:
    inputs = [f"model.layers.{n}.{kind}" for n in range(layers) for kind in ("input_layernorm", "mlp.down_proj")]
    about = {
        **{"threshold": 2.0, "splits": 3, "added": 4, "expansion": 0.06, "error": 0.5, "chosen": "reassemble"},
        **{"search": [[0, 1.0], [2, 0.7], [4, 0.5]], "median_before": 1.0},
        **{"widest_before": [9.0, 4.0], "widest_after": [3.0, 3.0]},
    }
    group = {
        **{
            "blocks": list(range(layers)),
            "seconds": 2.5,
            "peak_bytes": 1 << 30,
            "layers": dict.fromkeys(inputs, about),
        },
        **{"losses": [0.4, 0.3], "held_out_losses": [0.5, 0.35], "loss_before": 0.6, "loss_after": 0.35},
    }
    row = {"name": "W4A4", "linears": 14, "bytes": 900, "linear_bytes": 600, "ideal_bytes": 500.0, "groups": [group]}
    row["weight_bits"] = {"bits": {name: 3 for name in site_names(layers)}, "budget": 3.0, "kl": 0.1}
    write_record(folder, "quantize", [row], 20.0)


def evaluated(folder: Path, layers: int = 2, rows: int = 3) -> None:
    sites = site_names(layers)
    full = {"name": "full precision", "perplexity": 10.0, "perplexity_stderr": 0.5, "kl": 0.0, "kl_stderr": 0.0}
    low = [
        {
            **{
                "name": f"{TRAP} {n}",
                "perplexity": 11.0 + n,
                "perplexity_stderr": 0.5,
                "kl": 0.1 * n,
                "kl_stderr": 0.01,
            },
            **{"bits_per_value": 4.0 + n, "bytes_per_token": 800.0, "sqnr_db": 20.0, "tokens": 1000},
            **{"values": 1000, "saturated": 10, "saturated_share": 0.01, "nonfinite_tokens": 0},
            **{"bf16_sites": sites[:n], "saturated_sites": dict.fromkeys(sites, 0.01)},
            **{"accuracy": 0.5, "accuracy_stderr": 0.02, "accuracy_kept_percent": 98.5},
            **{"tasks": {"piqa": {"accuracy": 0.5, "stderr": 0.02, "measure": "acc", "n": 600}}},
            **{"evaluate_seconds": 1.0, "sites": {site: 20.0 + place for place, site in enumerate(sites)}},
        }
        for n in range(rows)
    ]
    write_record(folder, "evaluate", [full, *low], 5.0)


def benchmarked(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            **{"name": name, "algorithm": name, "ranks": ranks, "bytes": size, "rate": "1gbit", "mode": None},
            **{"seconds": seconds * size / 1e8, "ideal_seconds": size / 1.25e8, "bits_per_value": 16.0},
            **{"link_bytes": size, "sqnr_db": 50.0},
        }
        for ranks in (2, 4)
        for name, seconds in (("bf16", 2.0), ("two_shot", 1.0))
        for size in (65536, 1048576)
    ]
    rows += [
        {
            **{
                "way": way,
                "tokens": tokens,
                "outputs": 512,
                "inputs": 256,
                "threads": 1,
                "weight_bytes": 65536 * (1 + n),
            },
            **{"median_seconds": 1e-3, "gops": 10.0 + n, "peak_share": 0.5, "ratio": 1.5},
        }
        for n, way in enumerate(("W4A8", "bf16"))
        for tokens in (1, 64)
    ]
    write_record(folder, "benchmark", rows, 60.0)


def write_record(folder: Path, stage: str, rows: list[dict[str, Any]], seconds: float) -> None:
    config = {"model": TRAP, "output_dir": str(folder)}
    about = {"config": config, "rows": rows, "data": {}, "seconds": seconds, "environment": ENVIRONMENT}
    write_json(folder / f"{stage}.json", about)


def whole_run(folder: Path, layers: int = 2) -> Path:
    """A folder in which every stage has run."""
    folder.mkdir(parents=True, exist_ok=True)
    calibrated(folder, layers)
    quantized(folder, layers)
    evaluated(folder, layers)
    benchmarked(folder)
    return folder
