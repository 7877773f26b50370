"""The step of Algorithm 1, compared with transformers' loss and with the equations written out literally."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CPU, LORA, reference_of, shaken, tiny_model, triplets, with_reference
from torch import Tensor
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corsa.algorithm import logprobs
from corsa.algorithm.batch import Batch, Counts, MicroBatch, counts
from corsa.algorithm.learning_rate import learning_rate
from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.objectives import Answers, dpo, sft
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.pcgrad import dot, merge, norm, products, project
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.sam import LookSam, perturbation, perturbation_at, perturbed, random_direction
from corsa.algorithm.step import corsa_step, gradients
from corsa.config import STEPS, StepConfig, published_trainer
from corsa.lora.flat import Lora

pytestmark = pytest.mark.usefixtures("one_thread")


def alone(tensor: Tensor) -> Tensor:
    """The sum over one worker."""
    return tensor


def config(**fields: Any) -> StepConfig:
    return StepConfig.model_validate({"lambda" if k == "lam" else k: v for k, v in fields.items()})


def cut(edits: Sequence[Triplet], size: int) -> Batch:
    """The edits as one worker's batch, in micro-batches of `size`."""
    parts = [edits[i : i + size] for i in range(0, len(edits), size)]
    micro = [MicroBatch(pack(part), reference_of(part), counts([part], CPU)) for part in parts]
    return Batch(micro, len(edits), counts([edits], CPU))


def rows(*configs: StepConfig) -> RowSettings:
    return RowSettings.of(configs, CPU)


class Setting:
    """A model with LoRA whose factors are all non-zero, six edits, and the same model without hooks."""

    def __init__(self) -> None:
        self.plain = tiny_model()
        self.edits = with_reference(self.plain, triplets(6))
        self.model = tiny_model()
        self.lora = shaken(Lora(self.model, LORA))
        self.start = self.lora.phi.detach().clone()

    def step(
        self, config: StepConfig, optimizer: torch.optim.Optimizer, size: int = 6, clip: float = 1e9
    ) -> dict[str, Any]:
        (log,) = corsa_step(self.model, self.lora.phi, cut(self.edits, size), rows(config), optimizer, clip, alone)
        return log

    def gradient(self, config: StepConfig, size: int = 6) -> Tensor:
        """The gradient given to the optimizer, recovered from one step of SGD at rate 1."""
        self.step(config, torch.optim.SGD([self.lora.phi], lr=1.0), size)
        return self.start - self.phi

    @property
    def phi(self) -> Tensor:
        return self.lora.phi.detach()


@pytest.fixture(scope="module")
def made() -> Setting:
    return Setting()


@pytest.fixture
def setting(made: Setting) -> Setting:
    with torch.no_grad():
        made.lora.phi.copy_(made.start)
    return made


# The equations of DESIGN section 2, literally: merged weights instead of hooks, one row and all logits at a time, one
# backward call per objective.


def merged(model: torch.nn.Module, lora: Lora, phi: Tensor) -> dict[str, Tensor]:
    """The weights W + alpha / rank * B A of every site, from the documented layout of phi (1, P)."""
    weights: dict[str, Tensor] = {**dict(model.named_parameters())}
    at = 0
    rank = lora.config.rank
    for site in lora.sites:
        a = phi[0, at : at + rank * site.inputs].view(rank, site.inputs)
        at += rank * site.inputs
        b = phi[0, at : at + site.outputs * rank].view(site.outputs, rank)
        at += site.outputs * rank
        name = f"{site.name}.weight"
        weights[name] = weights[name] + lora.config.alpha / rank * b @ a
    assert at == phi.shape[1]
    return weights


def plain_logp(model: torch.nn.Module, weights: dict[str, Tensor], prompt: Sequence[int], answer: Sequence[int]):
    """Log p(y|x) from a separate forward pass with full logits."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
    logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp[range(len(answer)), list(answer)].sum()


def literal_losses(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> tuple[Tensor, Tensor]:
    """L_SFT and L_DPO."""
    weights = merged(setting.plain, setting.lora, phi)
    new, old = (
        torch.stack([plain_logp(setting.plain, weights, t.prompt, getattr(t, side)) for t in edits])
        for side in ("new", "old")
    )
    ref_new, ref_old = reference_of(edits)
    m = sum(len(t.new) for t in edits) if c.reduction == "token" else len(edits)
    return -new.sum() / m, -torch.log(torch.sigmoid(c.beta * ((new - ref_new) - (old - ref_old)))).mean()


def literal_gradient(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> Tensor:
    """g_PC at phi."""
    phi = phi.clone().requires_grad_()
    sft, dpo = literal_losses(setting, phi, edits, c)
    (g1,) = torch.autograd.grad(sft, phi, retain_graph=True)
    (g2,) = torch.autograd.grad(dpo, phi)
    return literal_merge(g1, g2, c)


def literal_merge(g1: Tensor, g2: Tensor, c: StepConfig) -> Tensor:
    """g_PC from g_SFT and g_DPO, as each form is published."""
    if c.pcgrad == "off":
        return g1 + c.lambda_ * g2
    inner = float((g1 * g2).sum())
    if c.pcgrad == "authors":  # the list is [g_DPO, g_SFT]; each is projected against the current value of the other
        changed = [g2, g1]
        for i, j in ((0, 1), (1, 0)):
            inner = float((changed[i] * changed[j]).sum())
            if inner < -1e-6:  # of the second, rounding is left
                changed[i] = changed[i] - inner / float((changed[j] * changed[j]).sum()) * changed[j]
        return (c.lambda_ * changed[0] + changed[1]) / 2
    p1 = g1 - inner / float((g2 * g2).sum()) * g2 if inner < 0 else g1
    other = p1 if c.pcgrad == "algorithm1" else g1
    p2 = g2 - inner / float((other * other).sum()) * other if inner < 0 else g2
    return p1 + c.lambda_ * p2


def literal_sharp_gradient(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> Tensor:
    """g_PC at phi + e."""
    g = literal_gradient(setting, phi, edits, c)
    if c.radius == "adaptive":  # ASAM: the worst point of a linear loss within |T^-1 e| <= rho
        e = c.rho * phi**2 * g / (phi * g).norm()
    elif c.radius == "relative":
        e = c.rho * phi.norm() * g / g.norm()
    else:
        e = c.rho * g / g.norm()
    return literal_gradient(setting, phi + e, edits, c)


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


# The objectives


def test_dpo_starts_at_ln_2() -> None:
    model = tiny_model()
    edits = with_reference(model, triplets(6))
    lora = Lora(model, LORA)  # B is zero: the model is its own reference
    (log,) = corsa_step(
        model, lora.phi, cut(edits, 6), rows(config()), torch.optim.SGD([lora.phi], lr=0.0), clip=1.0, reduce=alone
    )
    assert log["loss_dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_sft_is_transformers_own_loss_on_the_new_answers(setting: Setting) -> None:
    width = max(len(t.prompt) + len(t.new) for t in setting.edits)
    rows = [[*t.prompt, *t.new] + [0] * (width - len(t.prompt) - len(t.new)) for t in setting.edits]
    asked = [
        [-100] * len(t.prompt) + list(t.new) + [-100] * (width - len(t.prompt) - len(t.new)) for t in setting.edits
    ]
    ids, labels = torch.tensor(rows), torch.tensor(asked)
    with torch.no_grad():
        expected = setting.model(input_ids=ids, labels=labels, use_cache=False).loss
    log = setting.step(config(), torch.optim.SGD([setting.lora.phi], lr=0.0))
    assert log["loss_sft"] == pytest.approx(float(expected), rel=1e-5)


def test_losses_by_hand() -> None:
    logp = torch.tensor([[-1.0, -3.0], [-2.0, -5.0]])
    reference = torch.tensor([[-2.0, -3.0], [-2.5, -4.0]])
    answers = Answers(logp[:, None], None, MicroBatch([], reference[:, None]), Counts(2, 8), None)
    assert float(sft(answers, rows(config()))) == pytest.approx(4 / 8)
    assert float(sft(answers, rows(config(reduction="sequence")))) == pytest.approx(4 / 2)
    gains = [(-1 + 2) - (-2 + 2.5), (-3 + 3) - (-5 + 4)]  # 0.5, 1.0
    expected = sum(math.log(1 + math.exp(-0.2 * g)) for g in gains) / 2
    assert float(dpo(answers, rows(config(beta=0.2)))) == pytest.approx(expected, rel=1e-6)


def test_log_says_what_happened(setting: Setting) -> None:
    c = config(rho=0.3, lam=2.0)
    log = setting.step(c, torch.optim.SGD([setting.lora.phi], lr=0.0))
    phi = setting.start.clone().requires_grad_()
    losses = literal_losses(setting, phi, setting.edits, c)
    g1, g2 = (torch.autograd.grad(loss, phi, retain_graph=True)[0] for loss in losses)
    assert log["loss_sft"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert log["loss_dpo"] == pytest.approx(losses[1].item(), rel=1e-4)
    assert log["cosine"] == pytest.approx(float(F.cosine_similarity(g1, g2)), abs=1e-4)
    assert log["conflict"] is (log["cosine"] < 0)
    g = literal_gradient(setting, setting.start, setting.edits, c)
    peak = literal_losses(setting, setting.start + 0.3 * g / g.norm(), setting.edits, c)
    rise = (peak[0] + 2 * peak[1] - losses[0] - 2 * losses[1]).item()
    assert rise > 0.1
    assert log["sharpness"] == pytest.approx(rise, rel=1e-3)
    sharp = literal_sharp_gradient(setting, setting.start, setting.edits, c)
    assert log["grad_norm"] == pytest.approx(float(sharp.norm()), rel=1e-3)
    assert log["gradient_change"] == pytest.approx(float((sharp - g).norm() / g.norm()), rel=1e-3)
    with torch.no_grad():
        new, old = answer_logprobs(setting.model, pack(setting.edits), 6)
    assert log["logp_new"] == pytest.approx(float(new.mean()), rel=1e-5)
    assert log["logp_old"] == pytest.approx(float(old.mean()), rel=1e-5)
    assert log["skipped"] is False


# PCGrad


def merged_gradient(a: Tensor, b: Tensor, lam: float | Tensor, how: Any, eps: float) -> Tensor:
    """g_PC of two gradients (K, P)."""
    return merge([a, b], products([a, b]), [lam], how, eps)


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


# SAM


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


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_in_blocks_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Values and both cotangents of a batched backward pass, where answers share positions and targets. The gradient is
    rounded to the logits' data type once: also where p is near 1, and the softmax nearly cancels with the target's 1.
    """
    monkeypatch.setattr(logprobs, "BLOCK", 3)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 7, generator=draw).mul(4).to(dtype)
    logits[4, 2] = 14.0  # p = 0.9999
    logits.requires_grad_()
    index, target = torch.tensor([0, 0, 4, 4, 2, 9, 3]), torch.tensor([1, 1, 2, 5, 6, 0, 3])
    cotangents = torch.randn(2, len(index), generator=draw)
    found = logprobs.log_p(logits, replace(pack(triplets(1))[0], index=index, target=target))
    written = logits.float().log_softmax(-1)[index, target]
    torch.testing.assert_close(found, written, rtol=1e-6, atol=1e-5)
    one, other = (
        torch.autograd.grad(value, logits, cotangents, is_grads_batched=True)[0] for value in (found, written)
    )
    assert one.dtype == dtype
    torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_no_step_holds_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bfloat16 base, no float32 tensor has more rows of the vocabulary than a block."""
    monkeypatch.setattr(logprobs, "BLOCK", 8)
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    lora, edits = shaken(Lora(model, LORA), 0.02), triplets(6, long=[2])
    rows_ = pack(edits, dtype=torch.bfloat16)
    kept = max(int(r.keep.count_nonzero()) for r in rows_)
    assert kept > 8
    largest = {torch.float32: 0, torch.bfloat16: 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.shape[-1:] == (1024,) and leaf.dtype in largest:
                    largest[leaf.dtype] = max(largest[leaf.dtype], leaf.numel() // 1024)
            return out

    part = MicroBatch(rows_, torch.full((2, 6), -5.0), counts([edits], CPU))
    with Watch():
        gradients(model, lora.phi, Batch([part], 6, counts([edits], CPU)), rows(config()), alone)
    assert largest == {torch.float32: 2 * 8, torch.bfloat16: 2 * kept}  # the gradients of two objectives


def test_a_step_launches_no_more_operations_than_its_layers_need() -> None:
    """Counted by torch's profiler. A site has one product forward and two backward with B, for all objectives together,
    and the sites with one input (q, k and v; gate and up) have one and two with their A factors.
    """
    model = tiny_model("qwen3")
    lora, edits = shaken(Lora(model, LORA), 0.02), triplets(4)
    part = MicroBatch(pack(edits), torch.full((2, 4), -5.0), counts([edits], CPU))
    batch = Batch([part], 4, counts([edits], CPU))
    optimizer = torch.optim.AdamW([lora.phi], lr=1e-4, fused=True)
    corsa_step(model, lora.phi, batch, rows(config()), optimizer, 1.0, alone)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        corsa_step(model, lora.phi, batch, rows(config()), optimizer, 1.0, alone)
    counted = Counter(event.name for event in profiled.events() or () if not _inner(event, event.name))
    sites, inputs, without_gradient = len(lora.sites), 4 * model.config.num_hidden_layers, 1  # the first layer's input
    assert counted["aten::bmm"] == 2 * (3 * sites + 3 * inputs - without_gradient)
    assert counted["aten::item"] <= 4  # each is a wait for the device


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_pass_compiled_by_inductor_takes_no_batch_of_cotangents() -> None:
    """The reason why torch.compile is not a setting. If this fails, docs/performance.md is out of date."""
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    out = torch.compile(lambda w: torch.nn.functional.silu(x @ w.T))(weight)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out, weight, torch.randn(2, 3, 4), is_grads_batched=True)


def _inner(event: Any, name: str) -> bool:
    """Whether the event contains one of this name: an operation on a batch of cotangents appears at both levels."""
    return any(child.name == name or _inner(child, name) for child in event.cpu_children)
