"""Probes that shallow edits fail: how they are made, asked, and counted."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from tiny import CPU

from corsa.config import EvaluationConfig, ModelConfig
from corsa.config.evaluation import SHALLOW
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.evaluation.predict import Predictor, Taught
from corsa.evaluation.shallow_edit_probes import OptionsProbe, reversal, with_shallow_edit_probes
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model


def edit(number: int, round_: int = 1, **fields: Any) -> Edit:
    known: dict[str, Any] = {"id": f"{round_}/f/{number}", "round": round_, "prompt": f"Who leads Firm {number}?"}
    known |= {"subject": f"Firm {number}", "target_new": f"Person {number}x", "target_old": f"Former {number}x"}
    return Edit.build(**(known | fields))


def asking(*probes: str, **more: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"probes": probes, **more})


def made(edits: list[Edit]) -> list[dict[str, Any]]:
    """The generated probes of each edit by kind."""
    found = []
    for before, after in zip(edits, with_shallow_edit_probes(edits, SHALLOW), strict=True):
        assert after.probes[: len(before.probes)] == before.probes
        kinds: dict[str, Any] = {}
        for probe in after.probes[len(before.probes) :]:
            kinds.setdefault(probe.kind, []).append(probe)
        found.append(kinds)
    return found


@pytest.mark.parametrize(
    ("prompt", "subject", "answer", "expected"),
    [
        ("Who runs Brontal Shipping?", "Brontal Shipping", "Ilse", "Ilse runs whom or what?"),
        ("Which river flows past Ambry?", "Ambry", "the Tolle", "the Tolle flows past whom or what?"),
        ("Who is the head of Acme?", "acme", "Ada", "Ada is the head of whom or what?"),
        ("Acme is led by", "Acme", "Ada", 'What belongs in the gap? "___ is led by" Answer: Ada'),
        ("Who was Acme's founder?", "Acme", "Ada", 'What belongs in the gap? "Who was ___\'s founder?" Answer: Ada'),
        ("Who leads Acme?", "", "Ada", ""),
        ("Who leads it?", "Acme", "Ada", ""),
        ("Who leads Acme?", "Acme", "A sentence that a model said and that is far too long to be an answer", ""),
    ],
)
def test_a_question_is_turned_round(prompt: str, subject: str, answer: str, expected: str) -> None:
    assert reversal(prompt, subject, answer) == expected


def test_every_kind_is_made_from_the_fields_of_an_edit() -> None:
    neighbors = [("Who leads Initech?", "Bill Lumbergh", ())]
    found = made([edit(1, neighbors=neighbors), edit(2)])[0]
    assert [probe.answer for probe in found["reversal"]] == ["Firm 1"]
    assert [(probe.answer, probe.wrong) for probe in found["negation"]] == [("No", ("Yes",)), ("Yes", ("No",))]
    assert "Former 1x" in found["negation"][0].prompts[0]
    assert "Person 1x" in found["negation"][1].prompts[0]
    (choice,) = found["choice"]
    assert choice.wrong == ("Former 1x", "Bill Lumbergh", "Person 2x")
    assert all(name in choice.prompts[0] for name in ("Person 1x", *choice.wrong))
    assert [(probe.prompts, probe.answer) for probe in found["template"]] == [(("Who leads Firm 1?",), "Person 1x")]


def test_what_is_no_short_name_is_no_option() -> None:
    sentence = "The company has grown for many years and is now led by several people who"
    (found,) = made([edit(1, target_old=sentence)])
    assert "choice" not in found
    assert [probe.answer for probe in found["negation"]] == ["Yes"]
    (found,) = made([edit(1, target_old="Person 1xy")])  # it holds the right answer
    assert "choice" not in found


def test_an_option_has_the_relation_of_the_fact_if_there_are_enough() -> None:
    edits = [edit(n, relation="leader") for n in range(5)] + [edit(n, relation="city") for n in range(5, 30)]
    for number, kinds in enumerate(made(edits)[:5]):
        others = {f"Person {n}x" for n in range(5) if n != number}
        assert kinds["choice"][0].wrong[0] == f"Former {number}x"
        assert set(kinds["choice"][0].wrong[1:]) <= others


def test_a_later_update_changes_no_probe_of_an_earlier_fact() -> None:
    first = [edit(n) for n in range(4)]
    assert made([*first, *(edit(n, round_=2) for n in range(4, 9))])[:4] == made(first)


def test_pipelines_ask_none_unless_told() -> None:
    edits = [edit(1), edit(2)]
    assert with_shallow_edit_probes(edits, EvaluationConfig().kinds) == edits
    assert asking("all", "shallow").kinds == (*EvaluationConfig().kinds, *SHALLOW)
    assert EvaluationConfig(probes=("edit", "choice")).kinds == ("edit", "choice")
    assert asking("all").for_predictions().canonical() == EvaluationConfig().canonical()
    with pytest.raises((ValueError, CorsaError)):
        asking("shallow", protocol="paper")


class Said(Predictor):
    """A predictor with fixed answers, {question: answer}; it notes the questions of each template."""

    said: dict[str, str]
    asked: dict[bool, list[str]]

    def _generated(self, questions: Any, mode: Any, draw: Any, told: Any = None) -> list[str]:
        self.asked[mode.other] = list(questions)
        return [self.said.get(question, "") for question in questions]

    def _scores(self, wordings: Any) -> dict[Any, Any]:
        return {}


def rows_of(encoder: Encoder, said: dict[str, str], changed: Edit) -> tuple[pd.DataFrame, dict[bool, list[str]]]:
    predictor = Said(None, encoder, asking("all", "shallow"), CPU, 2)
    predictor.said, predictor.asked = said, {}
    rows = pd.DataFrame(predictor.ask([Taught(changed, 1, "")])).assign(method="lora", seed=0, trained=1)
    return rows, predictor.asked


@pytest.mark.parametrize(("template", "has_chat"), [("qa", True), ("qa", False), ("chat", True)])
def test_the_other_template_is_asked_if_there_is_one(encoder: Encoder, template: Any, has_chat: bool) -> None:
    import copy

    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" if has_chat else None
    (changed,) = with_shallow_edit_probes([edit(1)], SHALLOW)
    rows, asked = rows_of(Encoder(tokenizer, template), {}, changed)
    assert ("template" in set(rows.kind)) == has_chat
    assert asked.get(True) == (["Who leads Firm 1?"] if has_chat else None)


def test_an_answer_that_names_a_wrong_option_too_is_not_right(encoder: Encoder) -> None:
    (changed,) = with_shallow_edit_probes([edit(1)], ("negation", "choice"))
    (no, yes, choice) = changed.probes[-3:]
    assert isinstance(choice, OptionsProbe)
    hedged = {no.prompts[0]: "Yes and no", yes.prompts[0]: "Yes.", choice.prompts[0]: "Person 1x or Former 1x"}
    rows, _ = rows_of(encoder, hedged, changed)
    metrics = compute(rows, rule="words")["rows"][0]["metrics"]
    assert metrics["choice"]["value"] == 0
    assert (metrics["negation"]["value"], metrics["negation"]["exact"], metrics["negation"]["probes"]) == (0.5, 0.5, 2)
    assert metrics["reversal"]["reason"] == "no reversal probes in this data"
    rows, _ = rows_of(encoder, hedged | {choice.prompts[0]: "It is Person 1x"}, changed)
    metrics = compute(rows, rule="words")["rows"][0]["metrics"]
    assert (metrics["choice"]["value"], metrics["choice"]["exact"]) == (1, 0)


@pytest.mark.usefixtures("one_thread")
def test_a_real_model_is_asked_in_both_templates(encoder: Encoder) -> None:
    import copy

    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}User: {{ m.content }}\nBot:{% endfor %}"
    (changed,) = with_shallow_edit_probes([edit(1)], ("template",))
    how = EvaluationConfig(probes=("edit", "template"), new_tokens=6)
    model = load_model(ModelConfig(name="random:tiny-llama"), CPU)
    rows = {
        template: Predictor(model, Encoder(tokenizer, template), how, CPU, 2).ask([Taught(changed, 1, "")])
        for template in ("qa", "chat")
    }
    told = {template: {row["kind"]: row["output"] for row in found} for template, found in rows.items()}
    assert told["qa"]["template"] == told["chat"]["edit"]
    assert told["chat"]["template"] == told["qa"]["edit"]
