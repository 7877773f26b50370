"""The three rules that decide what an output gives."""

from __future__ import annotations

import pytest

from corsa.evaluation.matching import Match, contains, exact, matches, normalise


@pytest.mark.parametrize(
    ("output", "target", "aliases", "expected"),
    [
        ("The CEO is TIM COOK, since 2011", "Tim Cook", (), True),
        ("He plays for the Lakers.", "Los Angeles Lakers", ("Lakers",), True),
        ("Steve Jobs", "Tim Cook", (), False),
        ("in 2004", "4", (), True),  # the authors' rule is a plain substring, short numerals included
        ("anything", "", (), False),
        ("anything", "x", ("", "  "), False),
        ("", "Tim Cook", (), False),
    ],
)
def test_contains(output: str, target: str, aliases: tuple[str, ...], expected: bool) -> None:
    assert contains(output, target, aliases) is expected


@pytest.mark.parametrize(
    ("output", "target", "aliases", "expected"),
    [
        (' "Tim  Cook".\nQ: Who leads Apple?', "tim cook", (), True),
        ("\n\n Tim Cook", "Tim Cook", (), True),
        ("Apple Inc.", "Apple Inc", (), True),
        ("C++", "C", (), False),
        ("-5", "5", (), False),
        ("It is Tim Cook", "Tim Cook", (), False),
        ("2004", "4", (), False),
        ("Tim Cook", "Timothy Cook", ("Tim Cook",), True),
        ("?", "!", (), False),
        ("", "", (), False),
        ("München", "Mu\u0308nchen", (), True),
    ],
)
def test_exact(output: str, target: str, aliases: tuple[str, ...], expected: bool) -> None:
    assert exact(output, target, aliases) is expected


def test_normalise_keeps_an_answer_made_of_punctuation() -> None:
    assert normalise(" ? ") == "?"


@pytest.mark.parametrize(
    ("output", "new", "old", "expected"),
    [
        ("New York City", ("New York City", ()), ("New York", ()), (True, False)),
        ("New York", ("New York City", ()), ("New York", ()), (False, True)),
        ("york", ("New York City", ("York",)), ("New York", ()), (True, False)),
        ("Jobs, then Cook", ("Tim Cook", ("Cook",)), ("Steve Jobs", ("Jobs",)), (True, True)),
        (
            "Apple",
            ("Apple Inc.", ("Apple",)),
            ("Apple Records", ("Apple",)),
            (True, True),
        ),  # one alias of both: undecided
        ("neither", ("Tim Cook", ()), ("Steve Jobs", ()), (False, False)),
        ("Paris", ("Paris", ()), ("", ()), (True, False)),
    ],
)
def test_the_longer_match_wins(output: str, new: tuple, old: tuple, expected: tuple[bool, bool]) -> None:
    result = matches(output, new, old)
    assert (result.new, result.old) == expected


def test_all_rules_are_decided_at_once() -> None:
    said = matches("I think Tim Cook", ("Tim Cook", ()), ("Steve Jobs", ()))
    assert said == Match(True, False, exact_new=False, exact_old=False, words_new=True, words_old=False)
    said = matches("Steve Jobs.", ("Tim Cook", ()), ("Steve Jobs", ()))
    assert said == Match(False, True, exact_new=False, exact_old=True, words_new=False, words_old=True)
