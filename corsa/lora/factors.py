"""An adapter as what it adds to each linear layer: two factors whose product is the change of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corsa.errors import CorsaError


@dataclass(frozen=True, eq=False)
class Factors:
    """The change `delta W = b @ a` of one layer; the scale alpha / r of LoRA is already in `b`.

    Attributes:
        a: (r, inputs), float32.
        b: (outputs, r), float32.

    Raises:
        CorsaError: the factors are not two matrices of one rank.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or len(self.a) != self.b.shape[1]:
            raise CorsaError(
                f"factors of shapes a {tuple(self.a.shape)} and b {tuple(self.b.shape)} have no product b @ a: "
                "a is (rank, inputs) and b is (outputs, rank)"
            )

    @property
    def rank(self) -> int:
        """The columns of `b`: an upper bound of the rank of the change."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs), the shape of the change."""
        return len(self.b), self.a.shape[1]

    def delta(self) -> Tensor:
        """The change itself, (outputs, inputs)."""
        return self.b @ self.a


Adapter = dict[str, Factors]
"""The factors of each linear layer that is changed, by the layer's module name."""


def stack(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """The weighted sum of several changes of one layer, exactly: their factors side by side, the ranks added up.

    `[w_1 b_1, w_2 b_2, ...] @ [a_1; a_2; ...] = sum_i w_i b_i a_i`. Without weights each counts 1.
    """
    weights = [1.0] * len(parts) if weights is None else weights
    b = [p.b if w == 1 else w * p.b for p, w in zip(parts, weights, strict=True)]
    return Factors(torch.cat([p.a for p in parts]), torch.cat(b, dim=1))
