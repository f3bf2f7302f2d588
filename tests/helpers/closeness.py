"""Comparison of two implementations that add in another order and then round."""

from __future__ import annotations

from torch import Tensor


def assert_equal_but_for_flips(
    y: Tensor, reference: Tensor, rounding: float = 1e-5, windows: float = 1 / 8, flip: float = 0.05
) -> None:
    """Logits [windows, tokens, vocab], equal to `rounding` (float32's by default) of the largest of them.

    The ranks' own sum of the logits adds 64 products in another order. Where a machine's matrix product also rounds
    differently for a narrower matrix, a value may fall on the other side of a rounding boundary and take the next code,
    which moves its window, and no other. One window in eight may, or `windows` of them, by `flip` at most.
    """
    scale = reference.abs().max().item()
    difference = (y - reference).abs().flatten(1).amax(1)  # per window
    assert (difference > rounding * scale).sum() <= len(difference) * windows, difference
    assert difference.max() <= flip * scale, difference
