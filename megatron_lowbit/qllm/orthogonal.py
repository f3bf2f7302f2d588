"""Gradient descent on orthogonal matrices: the Cayley transform of a skew-symmetric step.

    A = G Q^T - Q G^T                       G: the loss's gradient at Q; A Q is tangent to the orthogonal matrices
    V = 0.9 V + A                           momentum
    Q' = (I + S / 2)^-1 (I - S / 2) Q       S = V, scaled; orthogonal, because S is skew-symmetric

The transform is found by the iteration Y = Q - S (Q + Y) / 2, as in Li, Li and Todorovic, "Efficient Riemannian
optimization on the Stiefel manifold via the Cayley transform" (ICLR 2020), which SpinQuant (arXiv 2405.16406) takes;
a few times, and then Newton-Schulz steps back onto the orthogonal matrices, in float64. These are matrix products, so
that all ranks have the same bits. S is scaled to a given angle, not by the size of the loss: SGD whose gradient is
normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.9
TOLERANCE = 1e-13  # largest entry of Q^T Q - I; float64 itself makes some 1e-15
_ITERATIONS = 4  # leave (|S| / 2)^4 of the step, which the rest makes orthogonal
_LARGEST = 1.0  # of |S|, for which the iteration surely converges


class OrthogonalMatrix:
    """Hold an orthogonal matrix, float64 [width, width], and step it down a loss."""

    def __init__(self, value: Tensor):
        self.value = value
        self._velocity = torch.zeros_like(value)

    def step(self, gradient: Tensor, angle: float) -> None:
        """Rotate by a root mean square of `angle` (radians) over the axes, less where one axis would turn by more than
        a radian. gradient: [width, width], of the loss at `value`; nothing happens where it and all before are 0."""
        q, g = self.value, gradient.to(self.value)
        a = g @ q.T
        self._velocity = MOMENTUM * self._velocity + (a - a.T)
        norm = self._velocity.norm().item()
        if norm == 0:
            return
        skew = self._velocity / norm
        spectral = (skew @ skew).norm().sqrt().item()  # an upper bound: (sum of s^4)^(1/4)
        skew *= min(angle * math.sqrt(len(q)), _LARGEST / spectral)
        y = q - skew @ q
        for _ in range(_ITERATIONS - 1):
            y = q - skew @ (q + y) / 2
        self.value = orthogonalized(y)


def orthogonalized(y: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to y, float64 [width, width], whose singular values are between 0 and
    sqrt(3): Newton-Schulz."""
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    for _ in range(30):  # quadratic; a singular value of 0.1 takes 9
        gram = y.T @ y
        if (gram - eye).abs().max() <= TOLERANCE:
            break
        y = y @ (1.5 * eye - 0.5 * gram)
    return y
