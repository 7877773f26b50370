"""Any number of objectives: reconciled as Yu et al. (2020) write it, over edits of several roles, from any logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from literal_step import alone
from pydantic import Field, ValidationError
from tiny import CPU, Bench, triplets
from torch import Tensor

from corsa.algorithm import objectives
from corsa.algorithm.objectives import OBJECTIVES, Answers, Objective
from corsa.algorithm.packing import Rows, Triplet
from corsa.algorithm.pcgrad import merge, products
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step, gradients
from corsa.config import Placement, StepConfig
from corsa.errors import CorsaError
from corsa.training.loop import CURVES, curves_table
from corsa.training.worker_context import Share

pytestmark = pytest.mark.usefixtures("one_thread")


# PCGrad of three


def yu(gradients: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Algorithm 1 of Yu et al. (2020), with the tasks in the order of the list, and a weighted sum."""
    total = np.zeros_like(gradients[0])
    for i, weight in enumerate(weights):
        changed = gradients[i].copy()
        for j, other in enumerate(gradients):
            if j != i and changed @ other < 0:
                changed -= changed @ other / (other @ other) * other
        total += weight * changed
    return total


def opposed(seed: int, rows: int = 2) -> Tensor:
    """Three gradients (3, rows, 40), each pair in conflict."""
    random = np.random.default_rng(seed)
    directions = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.4, -0.9]]) @ random.standard_normal((2, 40))
    g = 3 * directions[:, None] + 0.3 * random.standard_normal((3, rows, 40))
    assert all((g[i] * g[j]).sum(-1).max() < 0 for i, j in combinations(range(3), 2))
    return torch.from_numpy(g).float()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_gradients_in_conflict_are_reconciled_as_published(seed: int) -> None:
    g = opposed(seed)
    found = merge(g, products(g), [0.7, 2.0], "symmetric", 1e-12)
    exact = g.double().numpy()
    expected = np.stack([yu([own[row] for own in exact], [1.0, 0.7, 2.0]) for row in range(2)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    plain = merge(g, {}, [0.7, 2.0], "off", 1e-12)
    np.testing.assert_allclose(plain.numpy(), exact[0] + 0.7 * exact[1] + 2.0 * exact[2], rtol=1e-5, atol=1e-5)
    assert np.abs(found.numpy() - plain.numpy()).max() > 0.1


def test_three_gradients_by_hand() -> None:
    g = torch.tensor([[[1.0, 0.0]], [[-1.0, 1.0]], [[0.0, -1.0]]])
    # g_1: against g_2: (0.5, 0.5); against g_3: (0.5, 0.5).(0, -1) = -0.5: (0.5, 0)
    # g_2: against g_1: (0, 1); against g_3: (0, 1).(0, -1) = -1: (0, 0)
    # g_3: against g_1: none; against g_2: (0, -1).(-1, 1) = -1: (0, -1) + 1/2 (-1, 1) = (-0.5, -0.5)
    assert merge(g, products(g), [1.0, 1.0], "symmetric", 0.0).tolist() == [[0.0, -0.5]]
    assert merge(g, products(g), [1.0, 0.0], "symmetric", 0.0).tolist() == [[0.5, 0.0]]


def test_a_gradient_of_zero_in_one_row_leaves_that_row_to_the_others() -> None:
    g = opposed(3)
    g[2, 1] = 0.0
    weights = [torch.tensor([[0.7], [0.7]]), torch.tensor([[2.0], [0.0]])]
    found = merge(g, products(g), weights, "symmetric", 1e-12)
    exact = g.double().numpy()
    np.testing.assert_allclose(found[0].numpy(), yu([*exact[:, 0]], [1.0, 0.7, 2.0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1].numpy(), yu([*exact[:2, 1]], [1.0, 0.7]), rtol=1e-4, atol=1e-4)


# A third objective, over edits of another role


OTHER = 9


def extra(answers: Answers, settings: RowSettings) -> Tensor:
    """L_SFT over the edits of the other role."""
    return answers.sum(-answers.logp[0]) / answers.counts.tokens


class Step(StepConfig):
    """A step with a third objective."""

    extra: float = Field(default=0.0, ge=0, exclude_if=lambda weight: weight == 0)
    weights: ClassVar[tuple[str, ...]] = (*StepConfig.weights, "extra")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Objective("extra", extra, weight="extra", role=OTHER)
    monkeypatch.setattr(objectives, "OBJECTIVES", (*OBJECTIVES, added))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(6, long=(2,)))


def together(bench: Bench, groups: Sequence[Sequence[Triplet]], micro_batch: int = 16) -> Any:
    """One batch: the edits of each adapter."""
    bench.loaded.lora.resize(len(groups))
    with torch.no_grad():
        bench.loaded.lora.phi.copy_(bench.start.expand(len(groups), -1))
    shares = [Share(own, [own]) for own in groups]
    return bench.context(Placement(micro_batch=micro_batch)).batch(bench.loaded, shares, 1)


def gradients_of(bench: Bench, groups: Sequence[Sequence[Triplet]], *steps: StepConfig, micro_batch: int = 16) -> Any:
    """The gradients of one batch."""
    batch = together(bench, groups, micro_batch)
    phi = bench.loaded.lora.phi
    return gradients(bench.loaded.model, phi, batch, RowSettings.of(steps, CPU), alone)


def mixed(edits: Sequence[Triplet]) -> list[Triplet]:
    """Every third edit has another role."""
    return [replace(t, role=OTHER) if i % 3 == 1 else t for i, t in enumerate(edits)]


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("micro_batch", [2, 16])
def test_objectives_read_the_edits_of_their_role_from_one_pass(bench: Bench, micro_batch: int) -> None:
    edits = mixed(bench.edits)
    found = gradients_of(bench, [edits], Step(extra=0.5), micro_batch=micro_batch)
    taught = gradients_of(bench, [[t for t in bench.edits if t in edits]], Step())
    earlier = [t for t in bench.edits if t not in edits]
    assert len(earlier) == 2
    replayed = gradients_of(bench, [earlier], Step.model_validate({"lambda": 0.0}))
    expected = torch.cat([taught.g, replayed.g])
    torch.testing.assert_close(found.g, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(found.sums[:3], torch.cat([taught.sums[:2], replayed.sums[:1]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sums[3:], taught.sums[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_the_step_takes_three_objectives_and_logs_them(bench: Bench, scope: str) -> None:
    edits = mixed(bench.edits)
    config = Step.model_validate({"extra": 0.5, "rho": 0.2, "lambda": 2.0, "scope": scope})
    batch = together(bench, [edits])
    phi = bench.loaded.lora.phi
    optimizer = torch.optim.SGD([phi], lr=1.0)
    (log,) = corsa_step(bench.loaded.model, phi, batch, RowSettings.of([config], CPU), optimizer, 1e9, alone)
    moved = (bench.start - phi.detach())[0].double().numpy()

    def merged(at: Tensor) -> tuple[np.ndarray, Any]:
        batch, phi = together(bench, [edits]), bench.loaded.lora.phi
        with torch.no_grad():
            phi.copy_(at)
        found = gradients(bench.loaded.model, phi, batch, RowSettings.of([config], CPU), alone)
        return yu([*found.g[:, 0].double().numpy()], [1.0, 2.0, 0.5]), found

    low, at_phi = merged(bench.start)
    high, at_peak = merged(bench.start + torch.from_numpy(0.2 * low / np.linalg.norm(low)).float())
    np.testing.assert_allclose(moved, high, rtol=2e-2, atol=1e-3 * np.abs(high).max())
    losses = at_phi.sums[:3, 0, 0].tolist()
    assert [log[f"loss_{name}"] for name in ("sft", "dpo", "extra")] == pytest.approx(losses, rel=1e-4)
    rise = (at_peak.sums - at_phi.sums)[:3, 0, 0].tolist()
    assert log["sharpness"] == pytest.approx(rise[0] + 2.0 * rise[1] + 0.5 * rise[2], rel=1e-2, abs=1e-3)
    cosines = [float(F.cosine_similarity(a, b)) for a, b in combinations(at_phi.g, 2)]
    assert log["cosine"] == pytest.approx(min(cosines), abs=1e-4)
    assert log["conflict"] is (min(cosines) < 0)
    assert curves_table([log]).column_names == [*CURVES.names, "loss_extra"]
    batch, phi = together(bench, [edits]), bench.loaded.lora.phi
    (log,) = corsa_step(bench.loaded.model, phi, batch, RowSettings.of([Step()], CPU), optimizer, 1e9, alone)
    assert curves_table([log]).column_names == CURVES.names


@pytest.mark.usefixtures("third")
def test_a_row_without_the_objective_is_as_it_is_alone(bench: Bench) -> None:
    edits = mixed(bench.edits)
    steps = Step(extra=0.5), Step()
    found = gradients_of(bench, [edits, edits], *steps)
    settings = RowSettings.of(steps, CPU)
    for row, step in enumerate(steps):
        own = gradients_of(bench, [edits], step)
        expected = own.merged(RowSettings.of([step], CPU))[0]
        torch.testing.assert_close(
            found.merged(settings)[row], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
        measured = found.measured(settings), own.measured(RowSettings.of([step], CPU))
        together_, apart = (float(m.cosine[row if m is measured[0] else 0]) for m in measured)
        assert together_ == pytest.approx(apart, abs=1e-4)
    assert not found.g[2, 1].any()


def test_forms_for_two_objectives_refuse_a_third() -> None:
    with pytest.raises(ValidationError, match="pcgrad authors is for two objectives, not 3: set symmetric"):
        Step(extra=1.0, pcgrad="authors")
    rows = [Step.model_validate({"extra": 1.0, "lambda": 0.0, "pcgrad": "algorithm1"}), Step(pcgrad="algorithm1")]
    with pytest.raises(CorsaError, match="pcgrad algorithm1 is for two objectives, not 3"):
        RowSettings.of(rows, CPU)


def test_a_weight_of_zero_changes_no_identity() -> None:
    assert Step().canonical() == StepConfig().canonical()
    assert Step(extra=0.5).canonical() == StepConfig().canonical() | {"extra": 0.5}


# An objective from the logits


def certainty(logits: Tensor, rows: Rows) -> Tensor:
    """Sum_v p log p at each answer token."""
    logp = logits.log_softmax(-1)[rows.index]
    return (logp.exp() * logp).sum(-1)


def test_an_objective_can_read_all_logits_at_answer_tokens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(answers: Answers, settings: RowSettings) -> Tensor:
        assert answers.own is not None
        assert answers.lengths[0, 0].tolist() == [len(t.new) for t in sorted(bench.edits, key=len)]
        return answers.sum(answers.own[0]) / answers.counts.tokens

    added = Objective("certainty", loss, weight="extra", per_token=certainty)
    monkeypatch.setattr(objectives, "OBJECTIVES", (*OBJECTIVES, added))
    found = gradients_of(bench, [bench.edits], Step(extra=1.0))
    total, model, phi = torch.zeros(()), bench.loaded.model, bench.loaded.lora.phi
    for edit in bench.edits:  # one plain row each
        logits = model(input_ids=torch.tensor([[*edit.prompt, *edit.new]]), use_cache=False).logits[0]
        p = logits[len(edit.prompt) - 1 : -1].softmax(-1)
        total = total + (p * p.log()).sum()
    expected = total / sum(len(t.new) for t in bench.edits)
    assert float(found.sums[2]) == pytest.approx(float(expected.detach()), rel=1e-4)
    (g,) = torch.autograd.grad(expected, phi)
    torch.testing.assert_close(found.g[2], g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))
    for one, other in pairwise(found.g):
        assert not torch.equal(one, other)
