"""From calibrated ranges to a CommPlan (Dong et al., arXiv 2411.07942).

    range_ij = M_ij - m_ij   (asymmetric)   or   2 max(|m_ij|, |M_ij|)   (symmetric)
    R_j      = sum_i range_ij                            the aggregated range of feature j over the ranks i
    bf16_idx = top-k of R_j,  k = floor(E * bf16_fraction)   ties go to the lower index; the same set on every rank

The k widest features travel in bf16, all others as num_bits codes whose scale and zero point are static: they follow
from m_ij and M_ij, are known to every rank and never travel. bits per value = b + (16 - b) k / E: 4.1875 at b = 4,
k = E / 64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lowbit.artifacts import CalibrationStats, CommPlan, SitePlan
from megatron_lowbit.config import CommConfig, LowBitError
from megatron_lowbit.quantizer import qparams_from_range


def build_plan(stats: CalibrationStats, tp_size: int, config: CommConfig, seed: int = 0) -> CommPlan:
    """The plan of one tensor-parallel size. Raises LowBitError where that size was not calibrated."""
    if tp_size not in stats.ranges or tp_size == 1:
        sizes = sorted(size for size in stats.ranges if size > 1)
        raise LowBitError(
            f"the calibration has ranges for tp_size {sizes}, not {tp_size}; set comm.tp_sizes=[{tp_size}]"
        )
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name, r in sorted(stats.ranges[tp_size].items()):
        features = r.min_vals.shape[1]
        k = num_bf16(features, config)
        if config.selection == "random":
            chosen = torch.randperm(features, generator=generator)[:k]
        else:
            chosen = widest_features(aggregated_range(r.min_vals, r.max_vals, config.symmetric), k)
        scale, zero_point = qparams_from_range(r.min_vals, r.max_vals, config.bits, config.symmetric)
        sites[name] = SitePlan(scale, zero_point, chosen.sort().values, config.bits)
    gathers = {}
    if config.gather:
        inputs = {name: r for name, r in sorted(stats.ranges[1].items()) if name not in sites}
        if not inputs:
            raise LowBitError("the calibration has no ranges for the all-gather; calibrate with comm.gather=true")
        for name, r in inputs.items():
            k = num_bf16(r.min_vals.shape[1], config)
            chosen = widest_features(aggregated_range(r.min_vals, r.max_vals, config.symmetric), k)
            scale, zero_point = qparams_from_range(r.min_vals, r.max_vals, config.bits, config.symmetric)
            gathers[name] = SitePlan(scale, zero_point, chosen.sort().values, config.bits)
    return CommPlan(sites, tp_size, stats.fingerprint, describe(config), gathers)


def num_bf16(features: int, config: CommConfig) -> int:
    """k = floor(features * bf16_fraction)."""
    # Rounding may put the product a hair below an integer: 0.29 * 100 is 28.999999999999996.
    return math.floor(features * config.bf16_fraction + 1e-9)


def aggregated_range(min_vals: Tensor, max_vals: Tensor, symmetric: bool) -> Tensor:
    """R_j from m_ij, M_ij [tp_size, features] -> [features]."""
    width = 2 * torch.maximum(min_vals.abs(), max_vals.abs()) if symmetric else max_vals - min_vals
    return width.sum(0)


def widest_features(aggregated: Tensor, k: int) -> Tensor:
    """Indices of the k largest values, ties to the lower index: int64 [k]."""
    return torch.sort(aggregated, descending=True, stable=True).indices[:k]


def describe(config: CommConfig) -> str:
    """What the collective is called in results: int4, random int4/bf16 or hybrid int4/bf16."""
    if config.bf16_fraction == 0:
        return f"int{config.bits}"
    kind = "random" if config.selection == "random" else "hybrid"
    return f"{kind} int{config.bits}/bf16"
