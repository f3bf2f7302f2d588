"""Ranges of activations that are narrower than a token's smallest to largest value, at every site alike.

A site is what linears read, or Q, K or V of an attention; the two ends of a token's range are multiplied by the site's
ratios, in float32, before its scale and zero point are made of them (kernels/quantizer.py). {site: Clip} is kept for
the sites whose ratios are not 1, a linear's by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Clip = tuple[float, float]  # ratios of the lower and the upper end, float32 above 0 and at most 1
Clips = tuple[Clip, Clip, Clip]  # of Q, K and V
WHOLE: Clip = (1.0, 1.0)
UNCLIPPED: Clips = (WHOLE, WHOLE, WHOLE)
HEADS = ("q", "k", "v")


def attention_sites(owner: str) -> tuple[str, str, str]:
    """Return the names of Q, K and V of an attention module; ":" is in no module's name."""
    q, k, v = (f"{owner}:{name}" for name in HEADS)
    return q, k, v


def attention_clips(clipping: Mapping[str, Clip], owner: str) -> Clips:
    """Return the ratios of Q, K and V of an attention module."""
    q, k, v = (clipping.get(site, WHOLE) for site in attention_sites(owner))
    return q, k, v


def as_clip(low: float, high: float) -> Clip:
    """Return two ratios as float32 holds them."""
    first, second = torch.tensor([low, high], dtype=torch.float32).tolist()
    return first, second
