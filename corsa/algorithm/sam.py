"""SAM (Foret et al. 2021): the gradient is taken where the loss is worst within a radius rho of phi."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from corsa.algorithm.pcgrad import dot


def perturbation(g: Tensor, rho: float | Tensor, eps: float) -> Tensor:
    """E = rho * g / (|g| + eps), the norm over all of phi, float32. Shapes (K, P), row by row; rho may be (K, 1)."""
    return g * (rho / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + eps))


@contextmanager
def perturbed(phi: Tensor, e: Tensor) -> Iterator[None]:
    """Inside the block phi + e; afterwards phi bit for bit (restored from a copy, never by subtraction)."""
    kept = phi.detach().clone()
    with torch.no_grad():
        phi.add_(e)
    try:
        yield
    finally:
        with torch.no_grad():
            phi.copy_(kept)


class LookSam:
    """LookSAM (Liu et al. 2022, *Towards Efficient and Scalable Sharpness-Aware Minimization*, Algorithm 1): the second
    gradient g_s, at phi + e, is taken in the first of every `every` steps. What of it is orthogonal to g, the gradient
    at phi, changes slowly from step to step, and is added to g in the others. An approximation, but for every = 1.

    Attributes:
        part: g_v = g_s - (g_s . g / |g|^2) g of the last perturbed step, (1, P); zero before the first.
        due: whether the step at hand is a perturbed one.
    """

    def __init__(self, phi: Tensor, every: int, alpha: float) -> None:
        self._every, self._alpha = every, alpha
        self.part = torch.zeros_like(phi, requires_grad=False)
        self.due = True

    def begin(self, step: int) -> None:
        """Step `step` of the round, from 1, begins."""
        self.due = (step - 1) % self._every == 0

    def keep(self, g: Tensor, sharp: Tensor) -> None:
        """The gradients of a perturbed step, at phi and at phi + e. Those of a step that is skipped are not kept."""
        part = torch.addcmul(sharp, -dot(sharp, g) / _above_zero(dot(g, g)), g)
        self.part = torch.where(dot(part, part).isfinite(), part, self.part)

    def sharpened(self, g: Tensor) -> Tensor:
        """The gradient of a step that is not perturbed: g + alpha |g| / |g_v| g_v."""
        length = (dot(g, g) / _above_zero(dot(self.part, self.part))).sqrt()
        return torch.addcmul(g, self._alpha * length, self.part)


def _above_zero(square: Tensor) -> Tensor:
    return square.clamp(min=torch.finfo(square.dtype).tiny)
