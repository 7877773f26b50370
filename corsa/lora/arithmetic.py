"""Merges adapters into one, and compresses an adapter to a rank: arithmetic on factors, without training.

The reference of a merge is the exact sum of the weighted changes, sum_i w_i b_i a_i. The product b @ a is never formed:
norms and singular values are computed from the small core between the orthogonal parts of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from corsa.errors import CorsaError, unknown_name
from corsa.lora.factors import Adapter, Factors, stack


@dataclass(frozen=True)
class Options:
    """Options of some methods: the rank of `svd`, the share of values that TIES and DARE keep, and DARE's generator."""

    rank: int | None
    density: float
    generator: torch.Generator


def merge(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> tuple[Adapter, dict[str, Any]]:
    """Merges several adapters of the same layers into one, by a method of `MERGES`.

    - `sum`: exactly sum_i w_i delta_i, factors side by side (PEFT's "cat"); the ranks add up.
    - `average`: the same with every weight 1 / n.
    - `svd`: the best approximation of the sum by changes of rank `rank`.
    - `linear`, `ties` (Yadav et al. 2023), `dare_linear`, `dare_ties` (Yu et al. 2024): PEFT's methods of these names.
      They combine the a's and the b's separately, so the product has cross terms b_i a_j and is not close to the sum.
      They equal PEFT's merge if the adapters have the same scale alpha / r: here the scale is already in `b`.

    Args:
        adapters: of the same model; see `check_same_base`.
        method: a name in `MERGES`.
        weights: one per adapter, positive or negative; 1 each by default. None for `average`.
        rank: of the result of `svd`; None for other methods.
        density: share of values that `ties`, `dare_linear` and `dare_ties` keep in each factor, in (0, 1].
        seed: for the values that DARE drops, at least 0 and below 2^63.

    Returns:
        The adapter, and {rank: the largest of its ranks, error: |merged - sum| / |sum|, Frobenius norms over all
        layers}.

    Raises:
        CorsaError: the adapters are not of the same layers and shapes, a value is not finite, the method cannot take
            their ranks, or an argument is out of bounds.
    """
    if method not in MERGES:
        raise unknown_name("merge method", method, MERGES)
    _check_options(method, len(adapters), weights, rank, density)
    if not 0 <= seed < 1 << 63:
        raise CorsaError(f"the seed is {seed}: it is at least 0 and below 2^63")
    _check_layers(adapters)
    for i, adapter in enumerate(adapters, 1):
        _check_finite(adapter, f"adapter {i}")
    if weights is None:
        weights = [1 / len(adapters) if method == "average" else 1.0] * len(adapters)
    options = Options(rank, density, torch.Generator().manual_seed(seed))
    merged: Adapter = {}
    square_error = square_norm = 0.0
    for name in sorted(adapters[0]):  # the order in which DARE draws
        parts = [adapter[name] for adapter in adapters]
        if method in FACTORWISE and len({p.rank for p in parts}) > 1:
            raise CorsaError(
                f"{method} combines the factors of the adapters one with another, so their ranks must be equal; in "
                f"{name} they are {', '.join(str(p.rank) for p in parts)}: use sum or svd, or compress them to one rank"
            )
        merged[name] = MERGES[method](parts, weights, options)
        if method not in EXACT:
            exact = stack(parts, weights)
            square_error += norm(stack([merged[name], exact], [1.0, -1.0])) ** 2
            square_norm += norm(exact) ** 2
    _check_finite(merged, f"the adapters' {method}")
    return merged, {"rank": max(f.rank for f in merged.values()), "error": _relative(square_error, square_norm)}


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of rank `rank`, or of the layer's full rank where that is smaller (Eckart and Young 1936).

    Returns:
        The adapter, and |compressed - adapter| / |adapter| (Frobenius norms over all layers).

    Raises:
        CorsaError: the rank is below 1.
    """
    if rank < 1:
        raise CorsaError(f"an adapter cannot be compressed to rank {rank}: at least 1")
    _check_finite(adapter, "the adapter")
    cuts = {name: _truncated(factors, rank) for name, factors in adapter.items()}
    lost = sum(float(values[rank:].square().sum()) for _, values in cuts.values())
    total = sum(float(values.square().sum()) for _, values in cuts.values())
    return {name: factors for name, (factors, _) in cuts.items()}, _relative(lost, total)


def norm(factors: Factors) -> float:
    """The Frobenius norm of `b @ a`: that of R_b R_a^T, where b = Q_b R_b and a^T = Q_a R_a."""
    r_b, r_a = (torch.linalg.qr(m.double(), mode="r").R for m in (factors.b, factors.a.T))
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def check_same_base(names: Sequence[str]) -> str:
    """The common base model of the adapters to merge, from the names of their base models.

    Raises:
        CorsaError: they differ.
    """
    other = next((i for i, name in enumerate(names) if name != names[0]), None)
    if other is not None:
        raise CorsaError(
            f"adapters of different base models cannot be merged: the first is for {names[0]!r}, adapter {other + 1} "
            f"for {names[other]!r}"
        )
    return names[0]


def _truncated(factors: Factors, rank: int) -> tuple[Factors, Tensor]:
    """The first `rank` terms of the singular value decomposition of `b @ a`, and all its singular values."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.T.double())
    try:
        u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # b a = Q_b (R_b R_a^T) Q_a^T
    except torch.linalg.LinAlgError as error:  # type: ignore[reportPrivateImportUsage]
        raise CorsaError(f"a change of shape {factors.shape} has no singular value decomposition here") from error
    root = values[:rank].sqrt()  # half to each factor: factors of equal size train and round alike
    a, b = (root[:, None] * v[:rank]) @ q_a.T, q_b @ (u[:, :rank] * root)
    return Factors(a.float(), b.float()), values


def _svd(parts: Sequence[Factors], weights: Sequence[float], options: Options) -> Factors:
    assert options.rank is not None
    return _truncated(stack(parts, weights), options.rank)[0]


def _sum(parts: Sequence[Factors], weights: Sequence[float], options: Options) -> Factors:
    return stack(parts, weights)


# Methods that combine factors: PEFT's rules


def _factorwise(
    combine: Callable[[Tensor, Tensor, Options], Tensor],
    parts: Sequence[Factors],
    weights: Sequence[float],
    options: Options,
) -> Factors:
    """Combines the a's and the b's separately, with weights sqrt(|w_i|). The sign of w_i goes to a_i."""
    w = torch.tensor(weights, device=parts[0].a.device)
    root = w.abs().sqrt()
    a = combine(torch.stack([p.a for p in parts]), torch.where(w < 0, -root, root), options)
    return Factors(a, combine(torch.stack([p.b for p in parts]), root, options))


def _linear(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    """sum_i w_i v_i of `values` (n, ...)."""
    return torch.tensordot(weights, values, 1)


def _elected(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    """TIES, steps 2 and 3: elect a sign for each entry, then average the w_i v_i that agree with it."""
    elected = torch.where(values.sum(0) >= 0, 1, -1)
    agree = values.sign() == elected  # a dropped value agrees with no sign
    total = torch.tensordot(weights, values * agree, 1)
    return total / agree.sum(0).clamp(min=1)


def _trimmed(values: Tensor, options: Options) -> Tensor:
    """TIES, step 1: keeps the share `density` of each adapter's values, those of largest magnitude."""
    flat = values.flatten(1)
    kept = flat.abs().topk(int(options.density * flat.shape[1])).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(values)


def _thinned(values: Tensor, options: Options) -> Tensor:
    """DARE: each value is kept with probability `density` and divided by it, so the mean does not change."""
    chances = torch.full(values.shape[1:], options.density)
    kept = torch.stack([torch.bernoulli(chances, generator=options.generator) for _ in values])
    return values * kept.to(values.device) / options.density


def _ties(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    return _elected(_trimmed(values, options), weights, options)


def _dare_linear(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    return _linear(_thinned(values, options), weights, options)


def _dare_ties(values: Tensor, weights: Tensor, options: Options) -> Tensor:
    return _elected(_thinned(values, options), weights, options)


EXACT = {"sum": _sum, "average": _sum}
FACTORWISE = {
    "linear": partial(_factorwise, _linear),
    "ties": partial(_factorwise, _ties),
    "dare_linear": partial(_factorwise, _dare_linear),
    "dare_ties": partial(_factorwise, _dare_ties),
}
MERGES: dict[str, Callable[[Sequence[Factors], Sequence[float], Options], Factors]] = {
    **EXACT,
    "svd": _svd,
    **FACTORWISE,
}
"""The ways to merge the changes of one layer, by name."""


def _relative(square_error: float, square_norm: float) -> float:
    if square_error == 0:
        return 0.0
    return math.sqrt(square_error / square_norm) if square_norm > 0 else math.inf


def _check_options(method: str, count: int, weights: Sequence[float] | None, rank: int | None, density: float) -> None:
    if count == 0:
        raise CorsaError("there are no adapters to merge")
    if method == "average" and weights is not None:
        raise CorsaError(f"average weighs each of the {count} adapters 1/{count}: use sum for weights of your own")
    if weights is not None and len(weights) != count:
        raise CorsaError(f"{len(weights)} weights for {count} adapters: one for each is needed")
    if weights is not None and not all(math.isfinite(w) for w in weights):
        raise CorsaError(f"the weights of a merge are finite numbers, not {list(weights)}")
    if method == "svd" and (rank is None or rank < 1):
        raise CorsaError(f"svd needs the rank of the merged adapter, at least 1: it is {rank}")
    if method != "svd" and rank is not None:
        raise CorsaError(f"{method} takes no rank (it is {rank}): svd does, and what {method} gives can be compressed")
    if not 0 < density <= 1:
        raise CorsaError(f"density is {density}: it is the share of values that are kept, above 0 and at most 1")


def _check_finite(adapter: Adapter, what: str) -> None:
    for name, factors in adapter.items():
        if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
            raise CorsaError(f"{what}: the change to {name} has values that are not finite, or beyond float32")


def _check_layers(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for i, adapter in enumerate(adapters[1:], 2):
        if different := sorted(set(first) ^ set(adapter)):
            has, lacks = (1, i) if different[0] in first else (i, 1)
            raise CorsaError(
                f"adapter {has} changes {different[0]} and adapter {lacks} does not "
                f"({len(different)} such layers in all): only adapters of the same layers can be merged"
            )
        for name in sorted(first):
            if first[name].shape != adapter[name].shape:
                raise CorsaError(
                    f"{name} is {first[name].shape} (outputs, inputs) in adapter 1 and {adapter[name].shape} "
                    f"in adapter {i}: they are of different models"
                )
    if not first:
        raise CorsaError("the adapters to merge change no layer")
