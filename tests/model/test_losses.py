"""L_SFT, L_DPO and what a step logs, compared with transformers' loss and with values by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from literal_step import Setting, alone, config, cut, literal_gradient, literal_losses, literal_sharp_gradient, rows
from tiny import LORA, tiny_model, triplets, with_reference

from corsa.algorithm.batch import Counts, MicroBatch
from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.objectives import Answers, dpo, sft
from corsa.algorithm.packing import pack
from corsa.algorithm.step import corsa_step
from corsa.lora.flat import Lora

pytestmark = pytest.mark.usefixtures("one_thread")


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
