"""From calibrated ranges to a CommPlan (Dong et al., arXiv 2411.07942; per-token scales and adaptive bits are ours).

    range_ij = M_ij - m_ij   (asymmetric)   or   2 max(|m_ij|, |M_ij|)   (symmetric)
    R_j      = sum_i range_ij                            the aggregated range of feature j over the ranks i
    bf16_idx = top-k of R_j,  k = floor(E * bf16_fraction)   ties go to the lower index; the same set on every rank

The k widest features travel in bf16, all others as num_bits codes whose scale and zero point are static: they follow
from m_ij and M_ij, are known to every rank and never travel. bits per value = b + (16 - b) k / E: 4.1875 at b = 4,
k = E / 64.

comm.scale=per_token takes a feature's standard deviation for its scale and sends the token's own size
(kernels/wire_format.py).
comm.allocation=adaptive gives every feature of every site its own bits (bit_allocation.py), of the same total size.
The sum has ranges of its own, for the second hop of two_shot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lowbit.comm.bit_allocation import PER_TOKEN, STATIC, allocate_bits
from megatron_lowbit.comm.clipping import WIDTHS
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.plan import CalibrationStats, CommPlan, FeatureRange, SitePlan
from megatron_lowbit.config import CommConfig, LowBitError
from megatron_lowbit.kernels import BF16_BITS, header_bytes, squared_sizes
from megatron_lowbit.quant.affine import qparams_from_range


def build_plan(stats: CalibrationStats, tp_size: int, config: CommConfig, seed: int = 0) -> CommPlan:
    """Build the plan of one tensor-parallel size. Raises LowBitError where that size was not calibrated."""
    if tp_size not in stats.ranges or tp_size == 1:
        sizes = sorted(size for size in stats.ranges if size > 1)
        raise LowBitError(
            f"the calibration has ranges for tp_size {sizes}, not {tp_size}; set comm.tp_sizes=[{tp_size}]"
        )
    ranges, sums = dict(sorted(stats.ranges[tp_size].items())), stats.ranges.get(1, {})
    bits: Mapping[str, Tensor] = {}
    second: Mapping[str, Tensor] = {}
    if config.allocation == "adaptive":
        bits = adaptive_bits(ranges, sums, config, config.bits)
        second = adaptive_bits({name: sums[name] for name in ranges if name in sums}, sums, config, config.second_bits)
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name, r in ranges.items():
        chosen = None
        if config.selection == "random":
            features = r.min_vals.shape[1]
            chosen = torch.randperm(features, generator=generator)[: num_bf16(features, config)]
        sites[name] = site_plan(r, sums.get(name), config, chosen, bits.get(name), second.get(name))
    gathers = {}
    if config.gather:
        inputs = {name: r for name, r in sorted(sums.items()) if name not in sites}
        if not inputs:
            raise LowBitError("the calibration has no ranges for the all-gather; calibrate with comm.gather=true")
        gathers = {name: codec_of(r, config, uniform_bits(r, config, config.bits)) for name, r in inputs.items()}
    return CommPlan(sites, tp_size, stats.fingerprint, describe(config), gathers)


def site_plan(
    ranges: FeatureRange,
    sums: FeatureRange | None,
    config: CommConfig,
    chosen: Tensor | None = None,
    bits: Tensor | None = None,
    second_bits: Tensor | None = None,
) -> SitePlan:
    """Build the plan of one site. ranges: of each rank's partial sums; sums: of their sum. chosen: the bf16 features,
    None for the widest. bits, second_bits: of each feature in the two hops, None for uniform ones."""
    if bits is None:
        bits = uniform_bits(ranges, config, config.bits, chosen)
    if second_bits is None and sums is not None:
        second_bits = uniform_bits(sums, config, config.second_bits)
    second = None if sums is None or second_bits is None else codec_of(sums, config, second_bits)
    half = (ranges.max_vals / 2 - ranges.min_vals / 2).amax(0)
    center = ranges.max_vals / 2 + ranges.min_vals / 2
    return SitePlan(codec_of(ranges, config, bits), second, center, half, config.carrier_bits)


def synthetic_plan(partials: Tensor, config: CommConfig) -> SitePlan:
    """Build the plan that calibrating on these partial sums alone would give: float [ranks, tokens, E]."""
    ranges, sums = {"": _observed(partials)}, {"": _observed(partials.sum(0, keepdim=True))}
    size = len(partials)
    return build_plan(CalibrationStats({1: sums, size: ranges}, {}), size, config).sites[""]


def _observed(x: Tensor) -> FeatureRange:
    exact = x.double()
    std = exact.std(1, correction=0)
    mean = exact.mean(1)
    sizes = [squared_sizes(*own).mean().sqrt() for own in zip(exact, mean, std, strict=True)]
    return FeatureRange(x.amin(1).float(), x.amax(1).float(), mean.float(), std.float(), torch.stack(sizes).float())


def codec_of(ranges: FeatureRange, config: CommConfig, bits: Tensor) -> Codec:
    """Return how values with these ranges travel; bits: uint8 [E]."""
    if config.scale == "per_token":
        if ranges.mean is None or ranges.std is None:
            raise LowBitError(
                "the calibration has no standard deviations, which comm.scale=per_token needs; calibrate again"
            )
        scale = _per_token_scale(ranges.std)
        return Codec(scale, -ranges.mean / scale, bits, per_token=True)
    scale, zero_point = torch.zeros_like(ranges.min_vals), torch.zeros_like(ranges.min_vals)
    for width in bits.unique().tolist():
        own = bits == width
        num_bits = config.bits if width == BF16_BITS else width
        low, high = ranges.min_vals, ranges.max_vals
        if config.clipping == "histogram":
            if ranges.clipped is None:
                raise LowBitError(
                    "the calibration has no histograms, which comm.clipping=histogram needs; calibrate again with it"
                )
            low, high = ranges.clipped[:, num_bits - WIDTHS[0]].unbind(1)
        pair = qparams_from_range(low[:, own], high[:, own], num_bits, config.symmetric)
        scale[:, own], zero_point[:, own] = pair
    return Codec(scale, zero_point, bits)


def _per_token_scale(std: Tensor) -> Tensor:
    """Return the standard deviations, and an eighth of the sender's median one for features that never moved; [senders,
    E].

    Codes have no middle, so such a feature is off by about its scale; and if it moves after all, its values must not be
    so large that they decide on their tokens' sizes.
    """
    moves = std > torch.finfo(torch.float32).tiny
    usual = torch.where(moves, std, torch.nan).nanmedian(1, keepdim=True).values / 8
    return torch.where(moves, std, torch.where(usual > torch.finfo(torch.float32).tiny, usual, 1.0))


def uniform_bits(ranges: FeatureRange, config: CommConfig, num_bits: int, chosen: Tensor | None = None) -> Tensor:
    """Return uint8 [E]: 16 for the widest features (or the chosen ones), num_bits for all others."""
    features = ranges.min_vals.shape[1]
    if chosen is None:
        aggregated = aggregated_range(ranges.min_vals, ranges.max_vals, config.symmetric)
        chosen = widest_features(aggregated, num_bf16(features, config))
    bits = torch.full((features,), num_bits, dtype=torch.uint8)
    bits[chosen] = BF16_BITS
    return bits


def adaptive_bits(
    ranges: Mapping[str, FeatureRange], sums: Mapping[str, FeatureRange], config: CommConfig, num_bits: float
) -> dict[str, Tensor]:
    """Return {site: uint8 [E]} of all sites under one budget: what `num_bits` and `bf16_fraction` would send."""
    per_token = config.scale == "per_token"
    weights, budget, header = {}, 0.0, 8 * header_bytes([config.bits, 1], per_token)
    for name, r in ranges.items():
        features = r.min_vals.shape[1]
        spread = r.max_vals - r.min_vals
        if per_token and r.std is not None:
            # A code's error grows with the size of its token. A calibration of an earlier version has no crest.
            spread = r.std if r.crest is None else r.std * r.crest.unsqueeze(1)
        total = sums.get(name)
        # A site's error counts by the energy of its sum: what the layers after it hear is the ratio.
        energy = 1.0
        if total is not None and total.std is not None and total.mean is not None:
            energy = (total.std.double().square() + total.mean.double().square()).sum().item() or 1.0
        weights[name] = spread.double().square().sum(0) / energy
        budget += num_bits * features + (BF16_BITS - num_bits) * num_bf16(features, config) - header
    return allocate_bits(weights, budget, PER_TOKEN if per_token else STATIC)


def num_bf16(features: int, config: CommConfig) -> int:
    """Return k = floor(features * bf16_fraction)."""
    # Rounding may put the product a hair below an integer: 0.29 * 100 is 28.999999999999996.
    return math.floor(features * config.bf16_fraction + 1e-9)


def aggregated_range(min_vals: Tensor, max_vals: Tensor, symmetric: bool) -> Tensor:
    """Compute R_j from m_ij, M_ij [tp_size, features] -> [features]."""
    width = 2 * torch.maximum(min_vals.abs(), max_vals.abs()) if symmetric else max_vals - min_vals
    return width.sum(0)


def widest_features(aggregated: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values, ties to the lower index: int64 [k]."""
    return torch.sort(aggregated, descending=True, stable=True).indices[:k]


def describe(config: CommConfig) -> str:
    """Return what the collective is called in plans: int4, random int4/bf16, hybrid int4/bf16, rank-1 tiered int4 ...

    Plans keep the first name of scale=per_token, rank-1; plan.label_of returns today's.
    """
    scale = "rank-1 " if config.scale == "per_token" else "clipped " if config.clipping == "histogram" else ""
    if config.allocation == "adaptive":
        return f"{scale}tiered int{config.bits}"
    if config.bf16_fraction == 0:
        return f"{scale}int{config.bits}"
    kind = "random" if config.selection == "random" else "hybrid"
    return f"{scale}{kind} int{config.bits}/bf16"
