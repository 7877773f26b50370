"""PCGrad (Yu et al. 2020) between the two objectives: what opposes the other one is projected away."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two (K, P) tensors: (K, 1)."""
    # without a * b in memory: the pages of a fresh tensor of phi's size cost ten times the sum
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)])[:, None]


def project(g: Tensor, other: Tensor, eps: float) -> Tensor:
    """P(g; other) = g - (g . other) / (|other|^2 + eps) other if g . other < 0, else g. Shapes (K, P), row by row."""
    return torch.addcmul(g, -dot(g, other).clamp(max=0) / (dot(other, other) + eps), other)


def merge(
    sft: Tensor, dpo: Tensor, lam: float | Tensor, how: Literal["symmetric", "sequential", "off"], eps: float
) -> Tensor:
    """g_PC, one gradient from two: (K, P). `lam` is a number, or a column (K, 1).

    symmetric (the paper's Section 3): g_PC = P(g_SFT; g_DPO) + lambda * P(g_DPO; g_SFT), both against the original
    other. sequential (the authors' trainer): the second is projected against the already changed first, and the sum is
    halved. off (Table 9, without PCGrad): g_SFT + lambda * g_DPO.
    """
    if how == "off":
        return _plus(sft.clone(), lam, dpo)
    first = project(sft, dpo, eps)
    if how == "sequential":
        return _plus(first, lam, project(dpo, first, eps)).div_(2)
    return _plus(first, lam, project(dpo, sft, eps))


def _plus(a: Tensor, lam: float | Tensor, b: Tensor) -> Tensor:
    """The sum a + lam b, in the memory of a."""
    return a.addcmul_(lam, b) if isinstance(lam, Tensor) else a.add_(b, alpha=lam)
