"""The perturbation of SAM, its radii, random directions, and LookSAM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from literal_step import Setting, alone, config, cut, literal_gradient, literal_sharp_gradient, rows
from torch import Tensor

from corsa.algorithm.sam import LookSam, perturbation, perturbation_at, perturbed, random_direction
from corsa.algorithm.step import corsa_step
from corsa.config import StepConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_perturbation_has_norm_rho_in_every_row() -> None:
    g = torch.stack([torch.linspace(-1, 1, 99), 1e-6 * torch.linspace(0, 1, 99)])
    e = perturbation(g, 0.05, 1e-12)
    torch.testing.assert_close(e.norm(dim=1), torch.tensor([0.05, 0.05]))
    torch.testing.assert_close(F.cosine_similarity(e, g), torch.ones(2))
    assert torch.equal(perturbation(torch.zeros(1, 9), 0.05, 1e-12), torch.zeros(1, 9))


def test_an_adaptive_perturbation_is_the_worst_point_of_its_ellipsoid() -> None:
    """No point with |T^-1 e| = rho has a larger g.e, and a value of phi that is zero stays."""
    generator = torch.Generator().manual_seed(0)
    phi, g = (torch.randn(2, 50, generator=generator) for _ in range(2))
    phi[:, 0] = 0.0
    e = perturbation_at(phi, g, torch.tensor([[0.5], [2.0]]), 1e-12, "adaptive")
    assert e[:, 0].tolist() == [0.0, 0.0]
    torch.testing.assert_close((e[:, 1:] / phi[:, 1:]).norm(dim=1), torch.tensor([0.5, 2.0]))
    for _ in range(200):
        other = torch.randn(2, 50, generator=generator)
        other = phi.abs() * other / other.norm(dim=1, keepdim=True) * torch.tensor([[0.5], [2.0]])
        assert bool(((g * other).sum(1) < (g * e).sum(1)).all())


def test_a_relative_perturbation_has_a_share_of_the_norm_of_phi() -> None:
    phi, g = torch.ones(1, 16), torch.linspace(-1, 1, 16)[None]
    e = perturbation_at(phi, g, 0.25, 1e-12, "relative")
    assert float(e.norm()) == pytest.approx(1.0)
    assert float(F.cosine_similarity(e, g)) == pytest.approx(1.0)


@pytest.mark.parametrize("radius", ["absolute", "relative", "adaptive"])
def test_a_random_perturbation_costs_one_gradient(setting: Setting, radius: Any) -> None:
    """The gradient at phi + e, with e in a direction that does not depend on the gradient."""
    c = config(rho=0.3, radius=radius, perturbation="random")
    z = random_direction(setting.start, [7])
    e = {
        "absolute": 0.3 * z / z.norm(),
        "relative": 0.3 * setting.start.norm() * z / z.norm(),
        "adaptive": 0.3 * setting.start**2 * z / (setting.start * z).norm(),
    }[radius]
    expected = literal_gradient(setting, setting.start + e, setting.edits, c)
    passes = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return setting.model(*args, **kwargs)

    optimizer = torch.optim.SGD([setting.lora.phi], lr=1.0)
    batch = cut(setting.edits, 6)
    (log,) = corsa_step(counted, setting.lora.phi, batch, rows(c), optimizer, 1e9, alone, direction=z)
    found = setting.start - setting.phi
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))
    assert passes == c.passes == 1
    assert log["sharpness"] is None


def test_random_directions_follow_from_their_seeds_row_by_row() -> None:
    phi = torch.zeros(2, 1000)
    one = random_direction(phi, [1, 2])
    assert torch.equal(one[1], random_direction(phi, [2, 3])[0])
    assert abs(float(one.mean())) < 0.1
    assert abs(float(one.std()) - 1.0) < 0.1


def test_phi_is_restored_bit_for_bit_even_after_a_failure() -> None:
    phi = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = phi.detach().clone()
    with perturbed(phi, torch.full_like(before, 0.1)):
        assert float((phi.detach() - before).min()) > 0.09
    assert torch.equal(phi.detach(), before)
    with pytest.raises(ValueError, match="lost"), perturbed(phi, torch.full_like(before, math.nan)):
        raise ValueError("lost")
    assert torch.equal(phi.detach(), before)


def looked(setting: Setting, c: StepConfig, steps: int) -> tuple[list[Tensor], list[bool]]:
    """The gradient of each step at the same phi, and whether it was perturbed."""
    look, optimizer = LookSam(setting.lora.phi, c.perturb_every, c.reuse), torch.optim.SGD([setting.lora.phi], lr=1.0)
    found, perturbed_in = [], []
    for number in range(1, steps + 1):
        with torch.no_grad():
            setting.lora.phi.copy_(setting.start)
        look.begin(number)
        batch = cut(setting.edits, 6)
        (log,) = corsa_step(setting.model, setting.lora.phi, batch, rows(c), optimizer, 1e9, alone, look)
        found.append(setting.start - setting.phi)
        perturbed_in.append(log["sharpness"] is not None)
    return found, perturbed_in


def test_a_perturbation_in_every_step_is_the_exact_step_bit_for_bit(setting: Setting) -> None:
    found, perturbed_in = looked(setting, config(rho=0.3), steps=2)
    setting.phi.copy_(setting.start)
    exact = setting.gradient(config(rho=0.3))
    assert perturbed_in == [True, True]
    for g in found:
        assert torch.equal(g, exact)


def test_between_perturbed_steps_what_was_orthogonal_to_the_gradient_is_added(setting: Setting) -> None:
    """LookSAM, Algorithm 1, in float64: g_v = |g_s| sin(theta) along its direction, added at alpha |g|."""
    c = config(rho=0.3, perturb_every=3, reuse=0.6)
    found, perturbed_in = looked(setting, c, steps=4)
    assert perturbed_in == [True, False, False, True]
    g = literal_gradient(setting, setting.start, setting.edits, c).double()
    sharp = literal_sharp_gradient(setting, setting.start, setting.edits, c).double()
    g_v = sharp - (sharp @ g.T) / (g @ g.T) * g
    expected = g + 0.6 * g.norm() / g_v.norm() * g_v
    atol = 1e-4 * float(g.norm())
    torch.testing.assert_close(found[0].double(), sharp, rtol=1e-3, atol=atol)
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-3, atol=atol)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=0)
    assert float((sharp - g).norm()) > 0.05 * float(g.norm()), "the perturbation changes nothing here"


def test_a_perturbed_step_that_is_not_finite_leaves_what_is_used_again() -> None:
    look = LookSam(torch.zeros(1, 2), 2, 0.5)
    g = torch.tensor([[2.0, 0.0]])
    look.keep(g, torch.tensor([[1.0, 3.0]]))
    look.keep(g, torch.tensor([[math.nan, 1.0]]))
    assert look.part.tolist() == [[0.0, 3.0]]
    assert look.sharpened(g).tolist() == [[2.0, 1.0]]
    assert look.sharpened(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("part", [0.0, 1e-45, 1e-30])  # the last two have a square of 0
def test_a_step_before_any_perturbed_one_has_its_own_gradient(part: float) -> None:
    """If every perturbed step was skipped, nothing is reused, for any length of the gradient."""
    look = LookSam(torch.zeros(1, 3), 2, 0.7)
    look.part = torch.tensor([[0.0, part, 0.0]])
    for length in (1.0, 3.0, 1e6, 1e30):
        g = torch.tensor([[length, 0.0, 0.0]])
        found = look.sharpened(g)
        assert found.isfinite().all()
        assert found[0, 0] == length
        assert float(found[0, 1]) == 0


def test_the_second_gradient_is_taken_at_distance_rho_and_phi_comes_back(setting: Setting) -> None:
    seen: list[Tensor] = []
    hook = setting.model.register_forward_pre_hook(lambda *args: seen.append(setting.phi.clone()))
    setting.step(config(rho=0.07), torch.optim.AdamW([setting.lora.phi], lr=0.0, weight_decay=0.0), size=3)
    hook.remove()
    assert len(seen) == 4  # two micro-batches, two phases
    assert torch.equal(seen[0], setting.start)
    assert torch.equal(seen[1], setting.start)
    assert torch.equal(seen[2], seen[3])
    assert float((seen[2] - setting.start).norm()) == pytest.approx(0.07, rel=1e-4)
    assert torch.equal(setting.phi, setting.start)
