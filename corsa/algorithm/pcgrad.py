"""PCGrad (Yu et al. 2020) between the objectives: the part of a gradient that opposes another one is removed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

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


Products = dict[tuple[int, int], Tensor]
"""The inner products g_i . g_j of all gradients, (K, 1) each."""


def products(g: Sequence[Tensor]) -> Products:
    """The inner products of gradients (n, K, P)."""
    found: Products = {}
    for i, j in combinations_with_replacement(range(len(g)), 2):
        found[i, j] = found[j, i] = dot(g[i], g[j])
    return found


def cosine(inner: Products, i: int, j: int, eps: float) -> Tensor:
    """Cosines between the rows of g_i and g_j: (K, 1), float64; 0 where a row is zero."""
    return inner[i, j] / (inner[i, i].sqrt() * inner[j, j].sqrt()).clamp(min=eps)


def project(g: Tensor, other: Tensor, inner: Tensor, square: Tensor, eps: float) -> Tensor:
    """P(g; other) = g - (g . other) / (|other|^2 + eps) other where g . other < 0, else g. Shapes (K, P), row by row.

    `inner` is g . other and `square` is |other|^2, (K, 1).
    """
    share = (-inner.clamp(max=0) / (square + eps)).to(g.dtype)
    return torch.addcmul(g, share, other)


def merge(g: Sequence[Tensor], inner: Products, weights: Sequence[float | Tensor], how: PCGrad, eps: float) -> Tensor:
    """g_PC, one gradient from those of n objectives (n, K, P): (K, P).

    symmetric (the paper's Section 3; Yu et al., Algorithm 1, in the order of the list): each gradient is projected in
    turn against the original of every other, then the weighted sum is taken. For two objectives it is
    P(g_SFT; g_DPO) + lambda P(g_DPO; g_SFT).
    off (Table 9, without PCGrad): the weighted sum of the gradients as they are.

    Two forms for two objectives alone:
    algorithm1 (its Algorithm 1, line 6, read literally): g_SFT is projected first; the projection of g_DPO uses the
    changed g_SFT, and the inner product taken before the change. The changed g_SFT can be short, so the result can be
    long. authors (their trainer): g_DPO is projected first, then g_SFT against the changed g_DPO. These two no longer
    oppose each other, so g_SFT stays whole. The sum is halved: (g_SFT + lambda P(g_DPO; g_SFT)) / 2.

    Args:
        g: the gradients; the first has weight 1.
        inner: their `products`; `off` needs none.
        weights: of the others, numbers or columns (K, 1). A row with weight 0 has a gradient of zero.
        how: the form.
        eps: guard of the division by a squared norm.
    """
    if len(g) == 1:
        return g[0]
    if how == "off":
        return _sum([g[0].clone(), *g[1:]], weights)
    if how == "symmetric":
        return _sum([_projected(g, i, inner, eps) for i in range(len(g))], weights)
    (first, second), (weight,) = g, weights
    if how == "authors":
        merged = _sum([first.clone(), project(second, first, inner[0, 1], inner[0, 0], eps)], weights)
        return merged.div_(1 + (weight > 0))
    changed = project(first, second, inner[0, 1], inner[1, 1], eps)
    return _sum([changed, project(second, changed, inner[0, 1], dot(changed, changed), eps)], weights)


def _projected(g: Sequence[Tensor], i: int, inner: Products, eps: float) -> Tensor:
    """g_i after its projections against the originals of the others, in the order of the list."""
    changed = g[i]
    for j in range(len(g)):
        if j != i:
            opposed = inner[i, j] if changed is g[i] else dot(changed, g[j])
            changed = project(changed, g[j], opposed, inner[j, j], eps)
    return changed


def _sum(g: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """The sum g_0 + sum_i w_i g_i, in the memory of g_0."""
    total = g[0]
    for weight, other in zip(weights, g[1:], strict=True):
        if isinstance(weight, Tensor):
            total.addcmul_(weight, other)
        else:
            total.add_(other, alpha=weight)
    return total
