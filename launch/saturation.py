"""How well a plan's ranges held, for the end of a command: a line below its table, and figures for JSON and W&B.

values               that low-bit formats have encoded, on all ranks
saturated            those of them that lay beyond their calibrated range, or were NaN; saturated_share: of all
nonfinite_tokens     that held NaN or Inf on some rank, and came out as NaN; one on each rank that held it
bf16_sites           names of the sites that fell back to bf16 (drift.py)
saturated_sites      {site: saturated_share of its own values}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import distributed as dist

from megatron_lowbit.adapters import patching
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.runtime.distributed import all_gather_values, device
from megatron_lowbit.runtime.say import say

NAMED = 3  # sites in a line


def measure_saturation(engine: Engine) -> dict[str, Any]:
    """Gather the figures of the low-bit modules that are in place, of all their ranks. A collective call."""
    sites, names = patching.saturation(engine.model), engine.site_names()
    counts = [(site.values, site.saturated, site.nonfinite) for site in sites.values()]
    own = torch.tensor([[0, 0, 0], *counts], device=device())
    for group in (engine.group, engine.dp_group):  # their ranks have the same sites, other pipeline stages have others
        if group is not None:
            dist.all_reduce(own, group=group)
    total = own.sum(0)
    if engine.pp_group is not None:
        dist.all_reduce(total, group=engine.pp_group)
    values, saturated, nonfinite = total.tolist()
    bf16 = [names.get(name, name) for name, site in sites.items() if site.bf16]
    fallen = [name for copy in all_gather_values(bf16, engine.dp_group) for name in copy]
    shares = {
        names.get(name, name): beyond / of for name, (of, beyond, _) in zip(sites, own[1:].tolist(), strict=True) if of
    }
    return {
        "values": values,
        "saturated": saturated,
        "saturated_share": saturated / values if values else None,
        "nonfinite_tokens": nonfinite,
        "bf16_sites": sorted(engine.all_stages(dict.fromkeys(fallen, 1.0))),
        "saturated_sites": engine.all_stages(shares),
    }


def logged(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what metrics.jsonl and W&B record of a row."""
    if not row.get("values"):
        return {}
    figures = {key: row[key] for key in ("saturated", "saturated_share", "nonfinite_tokens")}
    return {**figures, "bf16_sites": len(row["bf16_sites"])}


def saturation_line(row: Mapping[str, Any]) -> str | None:
    """Return one sentence about a row; None where nothing was encoded in low bits."""
    if not row.get("values"):
        return None
    sites = row["bf16_sites"]
    line = (
        f"{row['name']}: {row['saturated']:,} of {row['values']:,} values ({row['saturated_share']:.2%}) beyond range"
    )
    if row["nonfinite_tokens"]:
        line += f", {row['nonfinite_tokens']:,} tokens with NaN or Inf"
    if not sites:
        return line
    more = f" and {len(sites) - NAMED} more" if len(sites) > NAMED else ""
    return f"{line}; fell back to bf16: {', '.join(sites[:NAMED])}{more}"


def print_saturation(rows: Iterable[Mapping[str, Any]], file: Any = None) -> None:
    """Print a line for every row that encoded something. file: standard output."""
    for line in filter(None, map(saturation_line, rows)):
        say(line, file=file)
