"""The projection of two gradients that conflict (Yu et al. 2020), against its properties and values by hand."""

from __future__ import annotations

import pytest
import torch
from literal_step import merged_gradient
from torch import Tensor

from corsa.algorithm.pcgrad import dot, project

pytestmark = pytest.mark.usefixtures("one_thread")


def projected(g: Tensor, other: Tensor) -> Tensor:
    """P(g; other)."""
    return project(g, other, dot(g, other), dot(other, other), 1e-12)


def pair(opposed: bool, rows: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 50, generator=random), torch.randn(rows, 50, generator=random)
    sign = -1 if opposed else 1
    return a, b - ((dot(a, b) - sign * 3.0) / dot(a, a)).float() * a  # now a . b = 3 or -3


def test_after_projection_nothing_opposes_the_other_objective() -> None:
    a, b = pair(opposed=True)
    assert float(dot(a, b)) == pytest.approx(-3.0, rel=1e-3)
    assert float(dot(projected(a, b), b)) == pytest.approx(0.0, abs=1e-5)
    assert float(dot(projected(b, a), a)) == pytest.approx(0.0, abs=1e-5)
    whole = merged_gradient(a, b, 1.0, "symmetric", 1e-12)
    assert float(dot(whole, a)) > 0
    assert float(dot(whole, b)) > 0


def test_without_conflict_nothing_changes() -> None:
    a, b = pair(opposed=False)
    assert torch.equal(projected(a, b), a)
    assert torch.equal(merged_gradient(a, b, 0.5, "symmetric", 1e-12), a + 0.5 * b)
    assert torch.equal(merged_gradient(a, b, 0.5, "algorithm1", 1e-12), a + 0.5 * b)
    assert torch.equal(merged_gradient(a, b, 0.5, "authors", 1e-12), (a + 0.5 * b) / 2)


def test_a_gradient_of_zero_is_projected_without_harm() -> None:
    a, b = pair(opposed=True)
    zero = torch.zeros_like(a)
    assert torch.equal(merged_gradient(a, zero, 1.0, "symmetric", 1e-12), a)
    assert torch.equal(merged_gradient(zero, b, 1.0, "symmetric", 1e-12), b)


def test_merging_by_hand() -> None:
    sft, dpo = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    # P(sft; dpo) = (1, 0) + 1/2 (-1, 1) = (0.5, 0.5);  P(dpo; sft) = (-1, 1) + (1, 0) = (0, 1)
    assert merged_gradient(sft, dpo, 2.0, "symmetric", 0.0).tolist() == [[0.5, 2.5]]
    # line 6 read literally: dpo + 1 / |(0.5, 0.5)|^2 (0.5, 0.5) = (0, 2)
    assert merged_gradient(sft, dpo, 2.0, "algorithm1", 0.0).tolist() == [[0.5, 4.5]]
    # dpo first: (0, 1), which does not oppose sft; the sum is halved
    assert merged_gradient(sft, dpo, 1.0, "authors", 0.0).tolist() == [[0.5, 0.5]]
    assert merged_gradient(sft, dpo, 2.0, "authors", 0.0).tolist() == [[0.5, 1.0]]
    assert merged_gradient(sft, dpo, 2.0, "off", 0.0).tolist() == [[-1.0, 2.0]]


def test_adapters_trained_together_are_merged_each_by_itself() -> None:
    opposed, agreeing = pair(opposed=True), pair(opposed=False)
    a, b = (torch.cat(rows) for rows in zip(opposed, agreeing, strict=True))
    together = merged_gradient(a, b, 1.0, "symmetric", 1e-12)
    for row, (x, y) in zip(together, (opposed, agreeing), strict=True):
        torch.testing.assert_close(row, merged_gradient(x, y, 1.0, "symmetric", 1e-12)[0])
