"""The gradient and update of a step, compared with the equations written out literally; and the optimizer's side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from literal_step import (
    Setting,
    alone,
    config,
    cut,
    literal_gradient,
    literal_losses,
    literal_sharp_gradient,
    merged_gradient,
    rows,
)
from tiny import CPU, LORA, reference_of, tiny_model, triplets, with_reference
from torch import Tensor

from corsa.algorithm.batch import Batch, Counts, MicroBatch, counts
from corsa.algorithm.learning_rate import learning_rate
from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.objectives import Answers, dpo, sft
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.pcgrad import merge, norm, products
from corsa.algorithm.step import corsa_step, gradients
from corsa.config import STEPS, StepConfig, published_trainer
from corsa.lora.flat import Lora

pytestmark = pytest.mark.usefixtures("one_thread")


SETTINGS = {
    "default": config(),
    "wide": config(rho=0.5),
    "algorithm1": config(pcgrad="algorithm1", rho=0.3),
    "authors": config(pcgrad="authors", rho=0.3),
    "off": config(pcgrad="off", rho=0.3),
    "weighted": config(lam=2.5, beta=0.5, rho=0.3),
    "sequence": config(reduction="sequence", rho=0.3),
    "relative": config(rho=0.05, radius="relative"),
    "adaptive": config(rho=2.0, radius="adaptive"),
    "flat": config(rho=0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_is_the_literal_two_phase_one(setting: Setting, name: str) -> None:
    c = SETTINGS[name]
    found = setting.gradient(c)
    expected = literal_sharp_gradient(setting, setting.start, setting.edits, c)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


def test_the_settings_tell_apart_what_they_vary(setting: Setting) -> None:
    """Otherwise the test above could pass on edits where no setting has an effect."""
    found = [literal_sharp_gradient(setting, setting.start, setting.edits, c) for c in SETTINGS.values()]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert float((one - other).norm() / one.norm()) > 1e-2
    assert setting.step(config(), torch.optim.SGD([setting.lora.phi], lr=0.0))["conflict"]


def test_update_is_adamw_on_the_literal_gradient(setting: Setting) -> None:
    """Three steps with AdamW written out by hand: phi within 1e-5."""
    c, rate = config(rho=0.2), 2e-4
    optimizer = torch.optim.AdamW([setting.lora.phi], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    phi = setting.start.clone()
    first, second = torch.zeros_like(phi), torch.zeros_like(phi)
    for step in range(1, 4):
        setting.step(c, optimizer, clip=1.0)
        g = literal_sharp_gradient(setting, phi, setting.edits, c)
        assert float(g.norm()) > 1.0, "clipping is not tested"
        g = g / g.norm()
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        phi = phi - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert float((setting.phi - setting.start).abs().max()) > 1e-4
    assert float((setting.phi - phi).abs().max()) <= 1e-5


@pytest.mark.parametrize("c", [config(rho=0), STEPS["lora"](config())], ids=["corsa without sam", "lora"])
def test_without_rho_it_is_the_plain_step_bit_for_bit(setting: Setting, c: StepConfig) -> None:
    phi = setting.start.clone().requires_grad_()
    ours = torch.optim.AdamW([setting.lora.phi], lr=1e-3, weight_decay=0.0)
    plain = torch.optim.AdamW([phi], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        with torch.no_grad():  # the hooks read lora.phi
            now = setting.phi.clone()
            setting.lora.phi.copy_(phi)
        logp = answer_logprobs(setting.model, pack(setting.edits), 6)
        losses = [-logp[0].sum(-1, keepdim=True) / sum(len(t.new) for t in setting.edits)]
        if c.lambda_ > 0:
            gain = logp - reference_of(setting.edits)
            losses.append(-F.logsigmoid(c.beta * (gain[0] - gain[1])).sum(-1, keepdim=True) / 6)
        eye = torch.eye(len(losses))[:, :, None]
        g = torch.autograd.grad([torch.stack(losses)], [setting.lora.phi], [eye], is_grads_batched=True)[0]
        g = g[0] if len(g) == 1 else merged_gradient(g[0], g[1], c.lambda_, c.pcgrad, c.eps)
        phi.grad = g * (1.0 / norm(g).clamp(min=1.0)).float()
        plain.step()
        with torch.no_grad():
            setting.lora.phi.copy_(now)
        setting.step(c, ours, clip=1.0)
        torch.testing.assert_close(setting.phi, phi.detach(), rtol=0, atol=0)
    assert not torch.equal(setting.phi, setting.start)


def test_batched_gradient_is_that_of_two_separate_calls(setting: Setting) -> None:
    batch = cut(setting.edits, 6)
    both = gradients(setting.model, setting.lora.phi, batch, rows(config()), alone).g
    logp = answer_logprobs(setting.model, batch.parts[0].rows, 6).view(2, 1, 6)
    answers = Answers(logp, None, batch.parts[0], Counts(6, sum(len(t.new) for t in setting.edits)), None)
    losses = sft(answers, rows(config())), dpo(answers, rows(config()))
    for found, loss in zip(both, losses, strict=True):
        (expected,) = torch.autograd.grad(loss, setting.lora.phi, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(setting: Setting, size: int) -> None:
    whole = gradients(setting.model, setting.lora.phi, cut(setting.edits, 6), rows(config()), alone)
    parts = gradients(setting.model, setting.lora.phi, cut(setting.edits, size), rows(config()), alone)
    torch.testing.assert_close(parts.g, whole.g, rtol=1e-3, atol=1e-6 * float(whole.g.abs().max()))
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-5, atol=1e-5)


def test_each_microbatch_is_perturbed_by_itself_where_that_is_the_scope(setting: Setting) -> None:
    c = config(scope="microbatch", rho=0.3)
    found = setting.gradient(c, size=4)  # parts of 4 and 2 edits
    parts = [setting.edits[:4], setting.edits[4:]]
    expected = sum(len(part) / 6 * literal_sharp_gradient(setting, setting.start, part, c) for part in parts)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


def cosine_of(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> float:
    """The cosine of the two gradients, literally."""
    phi = phi.clone().requires_grad_()
    sft, dpo = (torch.autograd.grad(loss, phi, retain_graph=True)[0] for loss in literal_losses(setting, phi, edits, c))
    return float(F.cosine_similarity(sft, dpo))


def rise_of(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> float:
    """L_Update(phi + e) - L_Update(phi), literally."""
    g = literal_gradient(setting, phi, edits, c)
    low, high = (literal_losses(setting, at, edits, c) for at in (phi, phi + c.rho * g / g.norm()))
    return float(high[0] + c.lambda_ * high[1] - low[0] - c.lambda_ * low[1])


def test_with_scope_microbatch_the_log_has_the_means_over_micro_batches(setting: Setting) -> None:
    """Parts of 4 and 2 edits, one in conflict and one not; so the mean cosine is not the cosine of the whole."""
    c = config(scope="microbatch", rho=0.3, lam=2.0)
    agreeing = with_reference(setting.plain, triplets(2, seed=7, opposed=99)[1:] * 2)
    edits = [*setting.edits[:4], *agreeing]
    parts = [edits[:4], edits[4:]]
    cosines = [cosine_of(setting, setting.start, part, c) for part in parts]
    assert cosines[0] < 0 < cosines[1]
    batch = cut(edits, 4)
    (log,) = corsa_step(
        setting.model, setting.lora.phi, batch, rows(c), torch.optim.SGD([setting.lora.phi]), 1.0, alone
    )
    assert log["cosine"] == pytest.approx(4 / 6 * cosines[0] + 2 / 6 * cosines[1], abs=1e-4)
    assert log["conflict"] is True
    rises = [rise_of(setting, setting.start, part, c) for part in parts]
    assert log["sharpness"] == pytest.approx(4 / 6 * rises[0] + 2 / 6 * rises[1], rel=1e-3)
    changes = []
    for part in parts:
        g, sharp = (find(setting, setting.start, part, c) for find in (literal_gradient, literal_sharp_gradient))
        changes.append(float((sharp - g).norm() / g.norm()))
    assert log["gradient_change"] == pytest.approx(4 / 6 * changes[0] + 2 / 6 * changes[1], rel=1e-3)
    with torch.no_grad():
        setting.lora.phi.copy_(setting.start)
    batch = cut(agreeing, 1)
    (log,) = corsa_step(
        setting.model, setting.lora.phi, batch, rows(c), torch.optim.SGD([setting.lora.phi]), 1.0, alone
    )
    assert log["conflict"] is False


# The optimizer's side


def test_the_merged_gradient_is_clipped_and_a_small_one_is_left_alone(setting: Setting) -> None:
    for clip in (0.5, 1e9):
        with torch.no_grad():
            setting.lora.phi.copy_(setting.start)
        log = setting.step(config(), torch.optim.SGD([setting.lora.phi], lr=1.0), clip=clip)
        assert log["grad_norm"] > 0.5
        moved = float((setting.phi - setting.start).norm())
        assert moved == pytest.approx(min(clip, log["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_a_gradient_that_is_not_finite_is_skipped(setting: Setting, scope: str) -> None:
    optimizer = torch.optim.AdamW([setting.lora.phi], lr=1e-2)
    batch = cut(setting.edits, 3)
    batch.parts[1].reference[0, 0] = math.nan
    (log,) = corsa_step(setting.model, setting.lora.phi, batch, rows(config(scope=scope)), optimizer, 1.0, alone)
    assert log["skipped"] is True
    assert torch.equal(setting.phi, setting.start)
    assert not optimizer.state
    assert setting.lora.phi.grad is None


def test_learning_rate_warms_up_and_decays_to_just_above_zero() -> None:
    rates = [learning_rate(2e-4, s, 100, 5) for s in range(100)]
    assert rates[0] == pytest.approx(2e-4 / 5)
    assert rates[4] == pytest.approx(2e-4)
    assert rates[5] == pytest.approx(2e-4)
    assert rates[99] == pytest.approx(2e-4 / 95)
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert learning_rate(1.0, 0, 100, 0) == 1.0
    assert [learning_rate(1.0, s, 2, 5) for s in range(2)] == [0.5, 1.0]  # a round shorter than its warm-up


@pytest.mark.parametrize(
    ("method", "phases", "objectives"), [("corsa", 2, 2), ("corsa-published", 2, 2), ("lora", 1, 1)]
)
def test_methods_are_settings_of_the_one_step(method: str, phases: int, objectives: int, setting: Setting) -> None:
    c = STEPS[method](config(beta=0.3, rho=0.1))
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    hook = setting.model.register_forward_pre_hook(count)
    log = setting.step(c, torch.optim.SGD([setting.lora.phi], lr=0.0), size=3)
    hook.remove()
    assert calls == 2 * phases  # two micro-batches
    assert (log["loss_dpo"] is not None) is (objectives == 2)
    assert (log["sharpness"] is not None) is (phases == 2)


def test_published_trainer_projects_dpo_alone_per_microbatch_over_tokens() -> None:
    mine = config(lam=0.5, beta=0.3, rho=0.1, reduction="sequence", microbatch=2)
    theirs = published_trainer(mine)
    assert (theirs.pcgrad, theirs.scope, theirs.reduction) == ("authors", "microbatch", "token")
    assert (theirs.lambda_, theirs.beta, theirs.rho, theirs.microbatch) == (0.5, 0.3, 0.1, 2)


def test_lora_takes_no_dpo_no_sam_and_no_projection_but_the_reduction() -> None:
    c = STEPS["lora"](config(lam=3.0, beta=0.7, rho=0.2, reduction="sequence"))
    assert c == config(lam=0.0, rho=0.0, pcgrad="off", reduction="sequence")


def test_one_objective_is_left_as_it_is() -> None:
    g = torch.randn(1, 1, 9)
    assert torch.equal(merge(g, products(g), [], "symmetric", 1e-12), g[0])


def test_several_adapters_need_no_second_step(setting: Setting) -> None:
    """Two equal adapters trained together on twice the rows each have the gradient of one."""
    model = tiny_model()
    lora = Lora(model, LORA, adapters=2)
    with torch.no_grad():
        lora.phi.copy_(setting.start.expand(2, -1))
    twice = [*setting.edits, *setting.edits]
    reference = reference_of(twice).view(2, 2, 6)
    batch = Batch([MicroBatch(pack(twice, adapters=2), reference)], 6, counts([setting.edits] * 2, CPU))
    before = lora.phi.detach().clone()
    both = rows(config(rho=0.3), config(rho=0.3))
    corsa_step(model, lora.phi, batch, both, torch.optim.SGD([lora.phi], lr=1.0), 1e9, alone)
    expected = setting.gradient(config(rho=0.3))
    for row in before - lora.phi.detach():
        torch.testing.assert_close(row, expected[0], rtol=1e-3, atol=1e-5 * float(expected.norm()))


REDUCERS: dict[str, Callable[[Tensor], Tensor]] = {"one": lambda t: t, "two": lambda t: t.mul_(2)}


def test_sums_over_workers_enter_before_the_norm_is_taken(setting: Setting) -> None:
    """Two workers with the same part see twice its gradient, and still perturb by rho."""
    found = {}
    for name, reduce in REDUCERS.items():
        with torch.no_grad():
            setting.lora.phi.copy_(setting.start)
        optimizer = torch.optim.SGD([setting.lora.phi], lr=1.0)
        corsa_step(
            setting.model, setting.lora.phi, cut(setting.edits, 6), rows(config(rho=0.3)), optimizer, 1e9, reduce
        )
        found[name] = setting.start - setting.phi
    torch.testing.assert_close(found["two"], 2 * found["one"], rtol=1e-3, atol=1e-5 * float(found["two"].norm()))


def test_everything_is_on_the_cpu_in_float32(setting: Setting) -> None:
    assert setting.lora.phi.device == CPU
    assert setting.lora.phi.dtype == torch.float32
