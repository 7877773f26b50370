"""SAM (Foret et al. 2021): the gradient is taken where the loss is worst within a radius rho of phi."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
