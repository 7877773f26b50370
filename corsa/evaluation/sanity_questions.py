"""The small specificity check of an update: everyday questions to the base model and to the edited model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from corsa.config import Frozen
from corsa.data.edit import Text
from corsa.evaluation.matching import exact, words

_FILE = Path(__file__).with_name("sanity_questions.yaml")


class SanityQuestion(Frozen):
    """A question that no edit touches, and its answer."""

    question: Text
    answer: Text
    aliases: tuple[Text, ...] = ()


@cache
def sanity_questions() -> tuple[SanityQuestion, ...]:
    """The questions that come with the project."""
    return tuple(SanityQuestion.model_validate(entry) for entry in yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def digest() -> str:
    """The SHA-256 of the questions file: besides the model, the answers depend on it."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


def judged(outputs: list[str]) -> list[dict[str, Any]]:
    """One row {question, answer, output, right} per question. `right` uses the rule `words`."""
    return [
        {
            "question": asked.question,
            "answer": asked.answer,
            "output": output,
            "right": words(output, asked.answer, asked.aliases),
        }
        for asked, output in zip(sanity_questions(), outputs, strict=True)
    ]


def changes(base: list[dict[str, Any]], edited: list[dict[str, Any]]) -> dict[str, Any]:
    """How an edit changed the answers: {questions, right_before, right_now, same, kept, changed, asked}.

    `same` counts answers equal to the base model's (rule `exact`), `kept` those and others that were right and still
    are. `changed`: rows that lost or gained the right answer. `asked`: every question, as {question, answer, before,
    now, right_before, right}.
    """
    pairs = list(zip(base, edited, strict=True))
    return {
        "questions": len(pairs),
        "right_before": sum(before["right"] for before, _ in pairs),
        "right_now": sum(now["right"] for _, now in pairs),
        "same": sum(_same(before, now) for before, now in pairs),
        "kept": sum(kept(base, edited)),
        "changed": [
            {"question": now["question"], "before": before["output"], "now": now["output"], "right": now["right"]}
            for before, now in pairs
            if before["right"] != now["right"]
        ],
        "asked": [
            {
                "question": now["question"],
                "answer": now["answer"],
                "before": before["output"],
                "now": now["output"],
                "right_before": before["right"],
                "right": now["right"],
            }
            for before, now in pairs
        ],
    }


def kept(base: Sequence[dict[str, Any]], edited: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each answer is equal to the base model's (rule `exact`), or was right and still is."""
    return [_same(one, now) or (one["right"] and now["right"]) for one, now in zip(base, edited, strict=True)]


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return before["output"] == now["output"] or exact(now["output"], before["output"])


def told(found: dict[str, Any] | None) -> list[str]:
    """The changes in a sentence, and advice if more than half of the right answers are lost."""
    if found is None:
        return []
    lines = [
        f"Everyday questions: {found['right_now']} of {found['questions']} right, before the edits "
        f"{found['right_before']}; {found['same']} answered as before, {found['kept']} as before or still right."
    ]
    if 2 * found["right_now"] < found["right_before"]:
        lines.append(
            "More than half of that is lost: try fewer --training.epochs, or a lower --training.learning-rate, and see "
            "that the facts are still learnt."
        )
    return lines


def short(text: str, length: int = 40) -> str:
    """A text on one line, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
