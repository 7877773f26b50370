"""Everyday questions that a round is taught with the base model's own answers, so that these stay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_replay import experiment, file_of_facts
from tiny import Bench, round_config, triplets

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import NO_OLD_ANSWER, pack
from corsa.config import TrainingConfig
from corsa.config.steps import RoundsConfig
from corsa.data.text import bare
from corsa.evaluation.anchor_questions import anchor_questions
from corsa.evaluation.sanity_questions import sanity_questions
from corsa.experiments.planner import Planner
from corsa.flow import Step
from corsa.report.training import told_training
from corsa.training.mixing import Material, anchored

PLAIN = {"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_question_of_a_report_is_among_those_that_are_taught() -> None:
    taught, asked = ([bare(q) for q in qs] for qs in (anchor_questions(), (c.question for c in sanity_questions())))
    assert len(set(taught)) == len(taught) >= 60
    assert not set(taught) & set(asked)


def test_an_anchor_is_the_base_model_s_answer_as_tokens(encoder: Any) -> None:
    rows = [{"question": f"Where is {i}?", "output": text} for i, text in enumerate(("Bo", "", "far away from here"))]
    short, long = anchored(encoder, rows, most=len(encoder.answer("far away from here")) - 1)
    assert (list(short.prompt), list(short.new)) == (encoder.prompt("Where is 0?"), encoder.answer("Bo"))
    assert list(long.new) == encoder.answer("far away from here")[:-1]  # it was cut off, so it does not end here
    for made in (short, long):
        assert (list(made.old), made.reference[1], made.kept) == ([], NO_OLD_ANSWER, True)


def test_a_batch_holds_its_share_of_anchors() -> None:
    config = round_config(batch=8, replay=0.25, anchor=0.25)
    material = Material(triplets(5, seed=1), triplets(4, seed=2), triplets(9, seed=3))
    for batch in material.batches(config, 1):
        assert [sum(low <= i < high for i in batch) for low, high in ((5, 9), (9, 18))] == [2, 2]
    assert [sum(i < 5 for i in batch) for batch in material.batches(config, 1)] == [4, 1]


def test_an_anchor_need_not_be_learnt_for_a_round_to_stop(tmp_path: Path) -> None:
    """The same improbable answer lets a round stop as an anchor, and not as an earlier fact."""
    bench = Bench(triplets(6, opposed=9))
    hard, *_, third, second, first = sorted(bench.edits, key=lambda edit: edit.reference[0])
    between = math.exp((hard.reference[0] + third.reference[0]) / 2)
    with torch.no_grad():
        bench.start.copy_(bench.loaded.lora.phi.zero_())  # the base model, from which the answers' probabilities are
    config = round_config(step=PLAIN, epochs=3, learning_rate=1e-9, batch=3, anchor=0.34)
    config = config.model_copy(update={"training": config.training.model_copy(update={"stop_above": between})})
    for kept, steps in ((True, 1), (False, 3)):
        anchor = replace(hard, old=(), reference=(0.0, NO_OLD_ANSWER), kept=kept)
        trained = bench.train(config, tmp_path / str(kept), edits=[first, second], anchors=[anchor])
        assert len(trained.curves) == steps
        assert {row["below"] for row in trained.curves} == {0 if kept else 1}


def test_anchors_are_taught_without_an_old_answer(bench: Bench, tmp_path: Path) -> None:
    """CoRSA's step on a batch with anchors: L_DPO is a mean over the edits, L_SFT over all answer tokens."""
    anchor = replace(bench.edits[0], old=(), reference=(0.0, NO_OLD_ANSWER), kept=True)
    own = bench.edits[1:4]
    row = bench.train(round_config(epochs=1, anchor=0.25), tmp_path, edits=own, anchors=[anchor]).curves[0]
    with torch.no_grad():
        bench.loaded.lora.phi.copy_(bench.start)
        new, old = answer_logprobs(bench.loaded.model, pack([*own, anchor]), 4).double()
    reference = torch.tensor([edit.reference for edit in own], dtype=torch.float64).T
    margin = (new[:3] - reference[0]) - (old[:3] - reference[1])
    assert row["loss_dpo"] == pytest.approx(float(-(0.1 * margin).sigmoid().log().mean()), rel=1e-5)
    tokens = sum(len(edit.new) for edit in [*own, anchor])
    assert row["loss_sft"] == pytest.approx(float(-new.sum()) / tokens, rel=1e-5)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(4, opposed=9))


def test_a_round_with_anchors_depends_on_the_base_model_s_answers(tmp_path: Path) -> None:
    data = file_of_facts(tmp_path / "own.jsonl", 4)

    def rounds(method: str, **training: Any) -> list[Step]:
        planner = Planner.of(experiment(data, **training), "")
        taught = planner.facts()
        return planner.chain(method, 0, taught, planner.schedule(taught, RoundsConfig(rounds=2)), rounds=(1, 2))

    anchors = {
        step.inputs["anchors"].fingerprint for step in (*rounds("lora", anchor=0.2), *rounds("corsa", anchor=0.4))
    }
    assert len(anchors) == 1  # one step for all rounds and methods
    for method in ("lora", "f-learning", "joint", "memit", "alphaedit", "locft", "in-context"):
        found = rounds(method, anchor=0.0 if method == "lora" else 0.2)
        assert all("anchors" not in step.inputs for step in found)
    assert "anchor" not in TrainingConfig().canonical()


def test_a_report_says_what_was_kept() -> None:
    training = TrainingConfig(batch=12, anchor=0.25)
    (told,) = told_training(training, {"anchored_on": 60})
    assert told == "taught the base model's own answers to 60 everyday questions beside them, 3 in every step"
