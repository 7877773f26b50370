"""Norms and inner products over vectors as long as phi match float64, without a float64 copy of phi."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.pcgrad import cosine, dot, merge, norm, products, project
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.sam import perturbation
from corsa.algorithm.step import corsa_step
from corsa.config import STEPS, StepConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = 10_000_000


@pytest.fixture(scope="module")
def correlated() -> tuple[Tensor, Tensor]:
    """Two rows of 1e7 nearly equal positive values: rounding errors accumulate instead of cancelling."""
    random = np.random.default_rng(0)
    a = np.abs(random.standard_normal((1, MANY), dtype=np.float32))
    b = a + 0.1 * random.standard_normal((1, MANY), dtype=np.float32)
    return torch.from_numpy(a), torch.from_numpy(b)


def test_sums_over_phi_are_those_of_float64(correlated: tuple[Tensor, Tensor]) -> None:
    a, b = correlated
    exact_a, exact_b = (t.numpy()[0].astype(np.float64) for t in correlated)
    assert float(dot(a, b)) == pytest.approx(exact_a @ exact_b, rel=1e-6)
    assert float(norm(a)) == pytest.approx(np.linalg.norm(exact_a), rel=1e-6)
    expected = exact_a @ exact_b / np.linalg.norm(exact_a) / np.linalg.norm(exact_b)
    assert float(cosine(products([a, b]), 0, 1, 1e-12)) == pytest.approx(expected, rel=1e-6)
    e = perturbation(a, 0.05, 1e-12).numpy()[0].astype(np.float64)
    assert np.linalg.norm(e) == pytest.approx(0.05, rel=1e-6)
    rows = torch.cat([a, b])
    assert dot(rows, rows)[:, 0].tolist() == pytest.approx([exact_a @ exact_a, exact_b @ exact_b], rel=1e-6)


def test_after_projection_of_as_many_values_no_conflict_is_left(correlated: tuple[Tensor, Tensor]) -> None:
    a, b = correlated
    left = project(a, -b, dot(a, -b), dot(b, b), 1e-12).numpy()[0].astype(np.float64)
    exact = b.numpy()[0].astype(np.float64)
    assert abs(left @ exact) / np.linalg.norm(left) / np.linalg.norm(exact) < 1e-5


def test_a_gradient_of_as_many_values_is_clipped_to_the_norm(correlated: tuple[Tensor, Tensor]) -> None:
    def forward(**inputs: Any) -> Any:
        """Logits (1, 2) whose second entry grows along `a`: the gradient of its log-probability is along `a` too."""
        return SimpleNamespace(logits=torch.stack([(phi * a).sum(), phi.new_zeros(())])[None])

    a, _ = correlated
    phi = torch.zeros(1, MANY, requires_grad=True)
    optimizer = torch.optim.SGD([phi], lr=1.0)
    edits = [Triplet([0], [1], [])]
    batch = Batch([MicroBatch(pack(edits), torch.zeros(2, 1))], 1, counts([edits], "cpu"))
    settings = RowSettings.of([STEPS["lora"](StepConfig())], "cpu")
    (log,) = corsa_step(forward, phi, batch, settings, optimizer, 1.0, lambda tensor: tensor)
    exact = 0.5 * np.linalg.norm(a.numpy()[0].astype(np.float64))
    assert log["grad_norm"] == pytest.approx(exact, rel=1e-6)
    assert np.linalg.norm(phi.detach().numpy()[0].astype(np.float64)) == pytest.approx(1.0, rel=1e-6)


def test_no_float64_copy_of_phi_is_made(correlated: tuple[Tensor, Tensor]) -> None:
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.dtype == torch.float64:
                largest = max(largest, found.numel())
            return found

    a, b = correlated
    with Watching():
        perturbation(merge([a, -b], products([a, -b]), [1.0], "symmetric", 1e-12), 0.05, 1e-12)
    assert 0 < largest <= MANY // 32
