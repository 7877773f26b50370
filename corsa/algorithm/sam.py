"""SAM (Foret et al. 2021): the gradient is taken where the loss is worst within a radius rho of phi."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from corsa.algorithm.pcgrad import dot, norm
from corsa.config import Radius


def perturbation(g: Tensor, rho: float | Tensor, eps: float) -> Tensor:
    """E = rho * g / (|g| + eps), with the norm over all of phi. Shapes (K, P), row by row; rho may be (K, 1)."""
    return g * (rho / (norm(g) + eps)).to(g.dtype)


def perturbation_at(phi: Tensor, g: Tensor, rho: float | Tensor, eps: float, radius: Radius) -> Tensor:
    """E in the direction of `g`, with a radius of one of these kinds. Shapes (K, P), row by row; rho may be (K, 1).

    - absolute: rho itself.
    - relative: rho |phi|.
    - adaptive: ASAM (Kwon et al. 2021, arXiv 2102.11600, Eq. 8): e = rho T^2 g / (|T g| + eps) with T = diag(|phi_i|),
      the worst point within |T^-1 e| <= rho. A value of phi that is zero is not perturbed.
    """
    if radius == "adaptive":
        scale = phi.abs()
        return scale * perturbation(scale * g, rho, eps)
    return perturbation(g, rho * norm(phi) if radius == "relative" else rho, eps)


def random_direction(phi: Tensor, seeds: Sequence[int]) -> Tensor:
    """Independent normal values in the shape of phi (K, P), one seed a row. They depend on the seeds alone, not on the
    device.
    """
    rows = [torch.randn(phi.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(phi.device)


@contextmanager
def perturbed(phi: Tensor, e: Tensor) -> Iterator[None]:
    """Sets phi to phi + e inside the block. Restores phi bit for bit from a copy afterwards, not by subtraction."""
    kept = phi.detach().clone()
    with torch.no_grad():
        phi.add_(e)
    try:
        yield
    finally:
        with torch.no_grad():
            phi.copy_(kept)


class LookSam:
    """LookSAM (Liu et al. 2022, *Towards Efficient and Scalable Sharpness-Aware Minimization*, Algorithm 1): the first
    of every `every` steps computes the second gradient g_s, at phi + e. The part of g_s orthogonal to g, the gradient
    at phi, changes slowly, so the other steps add it to g. This is exact only for every = 1.

    Attributes:
        part: g_v = g_s - (g_s . g / |g|^2) g of the last perturbed step, (1, P); zero before the first.
        due: whether the current step is perturbed.
    """

    def __init__(self, phi: Tensor, every: int, alpha: float) -> None:
        self._every, self._alpha = every, alpha
        self.part = torch.zeros_like(phi, requires_grad=False)
        self.due = True

    def begin(self, step: int) -> None:
        """Begin step `step` of the round (from 1)."""
        self.due = (step - 1) % self._every == 0

    def keep(self, g: Tensor, sharp: Tensor) -> None:
        """Keep `part` of a perturbed step from its gradients at phi and at phi + e. Non-finite ones are not kept."""
        part = torch.addcmul(sharp, _factor(-dot(sharp, g) / dot(g, g), g), g)
        self.part = torch.where(dot(part, part).isfinite(), part, self.part)

    def sharpened(self, g: Tensor) -> Tensor:
        """The gradient of an unperturbed step: g + alpha |g| / |g_v| g_v, or g while g_v is zero."""
        return torch.addcmul(g, _factor(self._alpha * norm(g) / norm(self.part), g), self.part)


def _factor(ratio: Tensor, g: Tensor) -> Tensor:
    """A ratio as a factor in g's dtype; 0 where it is not finite (the denominator is zero or nearly zero)."""
    factor = ratio.to(g.dtype)
    return torch.where(factor.isfinite(), factor, 0.0)
