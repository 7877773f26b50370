"""PCGrad (Yu et al. 2020) between the two objectives: the part of a gradient that opposes the other one is removed."""

from __future__ import annotations

import torch
from torch import Tensor

from corsa.config import PCGrad

BLOCK = 131072
"""Values of phi per block. Products are summed in float32 within a block, and the blocks in float64."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two (K, P) tensors: (K, 1), float64.

    A single float32 sum over phi is too small by 1e-4 at 1e7 values and by 1e-2 at 1e8. The sum by blocks is right to
    1e-6. It makes no float64 copy and no product of the rows: each would need as much memory as phi.
    """
    sums = [
        torch.stack([torch.dot(x, y) for x, y in zip(p.split(BLOCK), q.split(BLOCK), strict=True)])
        for p, q in zip(a, b, strict=True)
    ]
    return torch.stack(sums, dim=1).sum(0, dtype=torch.float64)[:, None]


def norm(g: Tensor) -> Tensor:
    """Euclidean norms of the rows of a (K, P) tensor: (K, 1), float64."""
    return dot(g, g).sqrt()


def cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Cosines between the rows of two (K, P) tensors: (K, 1), float64; 0 where a row is zero."""
    return dot(a, b) / (norm(a) * norm(b)).clamp(min=eps)


def project(g: Tensor, other: Tensor, eps: float) -> Tensor:
    """P(g; other) = g - (g . other) / (|other|^2 + eps) other if g . other < 0, else g. Shapes (K, P), row by row."""
    return _without(g, dot(g, other), other, eps)


def merge(sft: Tensor, dpo: Tensor, lam: float | Tensor, how: PCGrad, eps: float) -> Tensor:
    """g_PC, one gradient from two: (K, P). `lam` is a number, or a column (K, 1).

    symmetric (the paper's Section 3): P(g_SFT; g_DPO) + lambda P(g_DPO; g_SFT), both against the original other.
    algorithm1 (its Algorithm 1, line 6, read literally): g_SFT is projected first; the projection of g_DPO uses the
    changed g_SFT, and the inner product taken before the change. The changed g_SFT can be short, so the result can be
    long. authors (their trainer): g_DPO is projected first, then g_SFT against the changed g_DPO. These two no longer
    oppose each other, so g_SFT stays whole. The sum is halved: (g_SFT + lambda P(g_DPO; g_SFT)) / 2.
    off (Table 9, without PCGrad): g_SFT + lambda g_DPO.
    """
    if how == "off":
        return _plus(sft.clone(), lam, dpo)
    if how == "authors":
        return _plus(sft.clone(), lam, project(dpo, sft, eps)).div_(2)
    inner = dot(sft, dpo)
    changed = _without(sft, inner, dpo, eps)
    other = _without(dpo, inner, changed if how == "algorithm1" else sft, eps)
    return _plus(changed, lam, other)


def _without(g: Tensor, inner: Tensor, other: Tensor, eps: float) -> Tensor:
    """The difference g - inner / (|other|^2 + eps) other where the inner product is below 0, else g."""
    share = (-inner.clamp(max=0) / (dot(other, other) + eps)).to(g.dtype)
    return torch.addcmul(g, share, other)


def _plus(a: Tensor, lam: float | Tensor, b: Tensor) -> Tensor:
    """The sum a + lam b, in the memory of a."""
    return a.addcmul_(lam, b) if isinstance(lam, Tensor) else a.add_(b, alpha=lam)
