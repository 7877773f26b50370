"""Edits that return, and edits that contradict each other, over all that is taught together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from corsa.data.edit import Edit, normalise
from corsa.errors import CorsaError

OnContradiction = Literal["report", "refuse", "keep-first"]


class Contradiction(NamedTuple):
    """Two edits that give one question, in one round, different new answers."""

    first: Edit
    later: Edit

    def __str__(self) -> str:
        answers = f"{self.first.target_new!r} ({self.first.id}) and {self.later.target_new!r} ({self.later.id})"
        return f"{self.later.prompt!r} is taught {answers}"


def contradictions(edits: Sequence[Edit]) -> list[Contradiction]:
    """The later edits of each question whose new answer is not that of its first edit, one for each other answer."""
    first: dict[tuple[str, int], Edit] = {}
    found: dict[tuple[str, int, str], Contradiction] = {}
    for edit in edits:
        question = _question(edit)
        known = first.setdefault(question, edit)
        answer = normalise(edit.target_new)
        if answer != normalise(known.target_new):
            found.setdefault((*question, answer), Contradiction(known, edit))
    return list(found.values())


def without_repeats(facts: Sequence[Sequence[Edit]]) -> list[list[Edit]]:
    """The facts with each edit once: a later one with the same question and answers is left out, and what it asks
    beyond the first is asked of the first. Facts that are left without an edit are gone.
    """
    kept: dict[tuple[str, int, str, str], Edit] = {}
    homes: list[list[tuple[str, int, str, str]]] = []
    for fact in facts:
        own = []
        for edit in fact:
            key = (*_question(edit), normalise(edit.target_new), normalise(edit.target_old))
            if key not in kept:
                kept[key] = edit
                own.append(key)
                continue
            more = tuple(probe for probe in edit.probes if probe not in kept[key].probes)
            kept[key] = kept[key].model_copy(update={"probes": (*kept[key].probes, *more)})
        homes.append(own)
    return [[kept[key] for key in own] for own in homes if own]


def resolved(facts: Sequence[Sequence[Edit]], on: OnContradiction) -> tuple[list[list[Edit]], list[Contradiction]]:
    """The facts (cases, chains) that are taught, and all contradictions between them.

    report: all are taught. keep-first: a fact with an edit that contradicts an earlier fact's is left out whole, since
    what it asks rests on that edit.

    Raises:
        CorsaError: refuse, and there is a contradiction.
    """
    found = contradictions([edit for fact in facts for edit in fact])
    if found and on == "refuse":
        raise CorsaError(
            f"{found[0]} ({len(found)} such in all): correct the data, or pass --on-contradiction keep-first or report"
        )
    if on != "keep-first":
        return list(map(list, facts)), found
    first: dict[tuple[str, int], str] = {}
    kept = []
    for fact in facts:
        if all(first.get(_question(e), normalise(e.target_new)) == normalise(e.target_new) for e in fact):
            first |= {_question(e): normalise(e.target_new) for e in fact}
            kept.append(list(fact))
    return kept, found


def _question(edit: Edit) -> tuple[str, int]:
    return normalise(edit.prompt), edit.round
