"""Predictions of a tiny model for missing old answers; and the everyday questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_update_plan import drafts

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.evaluation.old_answers import old_answers
from corsa.evaluation.sanity_questions import changes, judged, sanity_questions, told
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "Who leads Acme?"


class Ask:
    """A tiny model that is asked for the old answers of facts."""

    def __init__(self, encoder: Encoder) -> None:
        self.model: Any = load_model(ModelConfig(name="random:tiny-llama"))
        self.encoder = encoder

    def __call__(self, found: list) -> tuple[dict[str, str], list[str]]:
        device = torch.device("cpu")
        return old_answers(self.model, self.encoder, found, new_tokens=4, batch=8, device=device)


def test_the_old_answer_is_what_the_model_says(tmp_path: Path, encoder: Encoder) -> None:
    ask = Ask(encoder)
    answers, known = ask(drafts(tmp_path, {"prompt": PROMPT, "target_new": "Ada Byron"}))
    ids = torch.tensor([encoder.prompt(PROMPT)])
    greedy = ask.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    said = encoder.tokenizer.decode(greedy, skip_special_tokens=True).strip()
    assert said.startswith(answers[PROMPT])
    assert answers[PROMPT]
    assert known == []


def test_what_the_model_knows_already_gets_its_best_other_answer(tmp_path: Path, encoder: Encoder) -> None:
    ask = Ask(encoder)
    said = ask(drafts(tmp_path, {"prompt": PROMPT, "target_new": "Ada Byron"}))[0][PROMPT]
    rows = [{"prompt": PROMPT, "target_new": said}, {"prompt": "Who is the pope?", "target_new": "Leo XIV"}]
    answers, known = ask(drafts(tmp_path, *rows))
    assert known == [PROMPT]
    assert said.lower() not in answers[PROMPT].lower()
    assert answers[PROMPT].strip()
    assert set(answers) == {PROMPT, "Who is the pope?"}


def test_a_model_with_nothing_else_to_say_is_reported(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corsa.evaluation.old_answers.generate", lambda model, prompts, **how: [[] for _ in prompts])
    monkeypatch.setattr("corsa.evaluation.old_answers.words", lambda *words: True)
    with pytest.raises(CorsaError, match="line 1: target_old: the model has no other answer to 'Who leads Acme"):
        Ask(encoder)(drafts(tmp_path, {"prompt": PROMPT, "target_new": "Ada Byron"}))


def test_controls_count_what_changed() -> None:
    questions = sanity_questions()
    assert len({asked.question for asked in questions}) == len(questions) == 40
    right = [f"It is {asked.answer}." for asked in questions]
    base = judged(right)
    assert all(row["right"] for row in base)
    edited = judged(["Ada Byron", f"{right[1].upper()}\nQ: more", *right[2:]])
    found = changes(base, edited)
    assert (found["questions"], found["right_before"], found["right_now"], found["same"]) == (40, 40, 39, 39)
    assert found["kept"] == 39
    reworded = changes(base, judged([f"Surely {control.answer}" for control in questions]))
    assert (reworded["same"], reworded["kept"]) == (0, 40)
    (change,) = found["changed"]
    assert change == {"question": questions[0].question, "before": right[0], "now": "Ada Byron", "right": False}
    assert told(found)[0].startswith("Everyday questions: 39 of 40 right, before the edits 40;")
    assert len(told(found)) == 1
    assert [(row["question"], row["right_before"], row["right"]) for row in found["asked"]] == [
        (asked.question, True, place > 0) for place, asked in enumerate(questions)
    ]

    lost = told(changes(base, judged(["Ada Byron"] * 21 + right[21:])))
    assert "lower --training.learning-rate" in lost[1]
    assert len(lost) == 2
