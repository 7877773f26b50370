"""What `corsa edit` says of an update: the headline, the facts, earlier facts then and now, everyday questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import Window, chromium, sized
from rich.console import Console
from test_report import EVIL, Page

from corsa.evaluation.matching import matches
from corsa.evaluation.metrics import compute
from corsa.evaluation.sanity_questions import changes
from corsa.report.facts import summary, tables
from corsa.report.page import write_report
from corsa.report.update import update

BASE, LORA = "base", "lora"
ANSWERS = {
    # fact: (update that taught it, the base model's, right after its update, now); then the same for its other wording
    "Who leads Acme?": (1, "Bob", "Ada", "It is Bob"),
    "Is Acme led by whom?": (1, "Bob", "Ada", "Bob"),
    "Who leads Initech?": (1, "Bob", "Bob", "Ada"),
    "Who leads Hooli?": (1, "Bob", "Ada", "Ada"),
    "Who leads Globex?": (2, "Bob", "Ada, of course", "Ada, of course"),
    "Globex is led by whom?": (2, "Bob", "nobody knows", "nobody knows"),
    "Who leads Umbrella?": (2, EVIL, EVIL, EVIL),
}
NEIGHBOR = {"Who wrote Hamlet?": (2, "Ada", "Bob", ""), "Who wrote Faust?": (2, "Bob", "Bob", "")}


def answers() -> pd.DataFrame:
    """A line of two updates; every right answer is Ada."""
    rows: list[dict[str, Any]] = []

    def add(method: str, trained: int, place: int, question: str, learnt: int, output: str) -> None:
        other = "led by" in question
        kind = "neighbor" if question in NEIGHBOR else "paraphrase" if other else "edit"
        match = matches(output, ("Ada", ()), ("Bob", ()))
        names = ("matched_new", "matched_old", "exact_new", "exact_old", "words_new", "words_old")
        edit = f"{learnt}/f/{place - other}" if kind != "neighbor" else "2/f/4"
        rows.append(
            {"method": method, "seed": 0, "trained": trained, "edit": edit, "chain": edit, "learnt": learnt, "part": ""}
            | {"kind": kind, "probe": place, "wording": 0, "draw": 0, "prompt": question, "answer": "Ada"}
            | {"target_old": "Bob", "output": output, "logp_new": None, "logp_old": None}
            | dict(zip(names, match, strict=True))
        )

    for place, (question, (learnt, base, then, now)) in enumerate((ANSWERS | NEIGHBOR).items()):
        add(BASE, 0, place, question, learnt, base)
        add(LORA, learnt, place, question, learnt, then)
        if learnt < 2:
            add(LORA, 2, place, question, learnt, now)
    return pd.DataFrame(rows)


def everyday() -> dict[str, Any]:
    """12 questions: 7 right answers lost, 2 won."""
    rights = [(True, False)] * 7 + [(False, True)] * 2 + [(True, True), (False, False), (False, False)]
    rows = [
        [
            {
                "question": f"question {n}",
                "answer": "yes",
                "output": "yes" if right[side] else f"no {n}",
                "right": right[side],
            }
            for n, right in enumerate(rights)
        ]
        for side in (0, 1)
    ]
    return changes(*rows)


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return compute(answers(), rule="words", taught_questions=True) | {"controls": everyday()}


@pytest.fixture(scope="module")
def file(metrics: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = {
        "title": "Update 2",
        "scenario": "update",
        "notes": ["line: stopped after 3 steps."],
        "command": "corsa edit",
    }
    directory = tmp_path_factory.mktemp("page")
    return write_report(directory, metrics=metrics, predictions=answers(), curves=pd.DataFrame(), run=run)


def test_the_headline_counts_what_took_and_what_was_lost(metrics: dict[str, Any]) -> None:
    found = update(metrics, answers())
    # Globex took, Umbrella did not; of three answers to earlier facts that were right then, two are wrong now
    assert found["headline"] == (
        "1 of 2 facts took (0 word for word), 1 of 1 other wordings failed, 2 of 3 earlier answers lost, "
        "1 of 1 neighbor answers lost, 7 everyday answers lost, 2 won."
    )
    assert [(fact["took"], fact["exact"], fact["before"]) for fact in found["facts"]] == [
        (True, False, "Bob"),
        (False, False, EVIL),
    ]


def test_every_earlier_fact_is_shown_then_and_now(metrics: dict[str, Any]) -> None:
    found = update(metrics, answers())["earlier"]
    assert [(row["prompt"], row["then"], row["now"], row["outcome"]) for row in found] == [
        ("Who leads Acme?", "Ada", "It is Bob", "lost"),
        ("Who leads Initech?", "Bob", "Ada", "won"),
        ("Who leads Hooli?", "Ada", "Ada", "kept"),
    ]
    assert [(row["wordings"], row["wordings_then"], row["wordings_now"]) for row in found] == [
        (1, 1, 0),
        (0, 0, 0),
        (0, 0, 0),
    ]


def test_the_console_shows_all_that_was_lost_and_won(metrics: dict[str, Any]) -> None:
    console = Console(width=120, record=True)
    found = update(metrics, answers())
    for table in tables(found):
        console.print(table)
    text = console.export_text()
    for number in range(9):
        assert f"question {number}" in text
    assert "question 9" not in text
    assert text.count("✗") == 1 + 1 + 7
    assert text.count("✓") == 1 + 2 + 2
    assert next(summary(metrics, found)) == found["headline"]


def test_many_facts_are_shown_on_the_page_and_only_the_failed_on_the_console(metrics: dict[str, Any]) -> None:
    (first, second) = update(metrics, answers())["facts"]
    many = [first | {"right": 1, "prompt": f"fact {n}"} for n in range(40)] + [second]
    console = Console(width=120, record=True)
    for table in tables({"facts": many, "earlier": [], "everyday": []}):
        console.print(table)
    text = console.export_text()
    assert "Who leads Umbrella?" in text
    assert "fact 7" not in text
    assert "and 40 more, in the report" in text


def test_the_page_has_every_row_and_the_technical_part_is_folded(file: Path, metrics: dict[str, Any]) -> None:
    page = Page(file)
    found = update(metrics, answers())
    assert found["headline"] in page.text
    before, folded, after = page.text.partition("Technical details: how")
    assert folded
    for question in [*ANSWERS, *NEIGHBOR, *(f"question {n}" for n in range(12))]:
        assert question in before
    assert "exploratory" not in before
    assert "stopped after 3 steps" in after
    assert EVIL not in page.source
    for phrase in ("revised where the data", "old answers are the model's own", "before: "):
        assert phrase not in page.text
    assert [attributes.get("open") for attributes in page.all("details") if attributes.get("class") == "technical"] == [
        None
    ]
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= targets


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    with chromium(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.process
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_phone_and_desktop(browser: Window, file: Path, width: int) -> None:
    sized(browser, width)
    browser.get(file.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if "chrome://" not in entry["message"]] == []


@pytest.mark.process
def test_print_shows_every_question_and_not_the_technical_part(browser: Window, file: Path) -> None:
    sized(browser, 720, paper=True)
    browser.get(file.as_uri())
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    text = browser.execute_script("return document.body.innerText")
    assert all(f"question {number}" in text for number in range(12))
    assert "Technical details: how" not in text
    assert "Repeat this run" not in text
