"""Edits that return or contradict each other, and questions that are asked twice, over all that is taught together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from corsa.data.edit import Edit, Probe
from corsa.data.text import bare, folded
from corsa.errors import CorsaError

OnContradiction = Literal["report", "refuse", "keep-first"]


class Contradiction(NamedTuple):
    """One question that is given, in one round, different new answers by two edits, or by the cases they belong to."""

    first: Edit
    later: Edit
    question: str
    answers: tuple[str, str]
    taught: bool = True
    """Whether it is taught itself; else it is a multi-hop question, which two cases ask for different answers."""

    def __str__(self) -> str:
        first, later = self.answers
        verb = "is taught" if self.taught else "is asked for"
        return f"{self.question!r} {verb} {first!r} ({self.first.id}) and {later!r} ({self.later.id})"


class _Claim(NamedTuple):
    """What an edit says of a question: its new answer."""

    key: tuple[str, int, bool]
    names: frozenset[str]
    question: str
    answer: str


def _claims(edit: Edit) -> Iterator[_Claim]:
    """Of the question that it teaches, and of the multi-hop questions that it asks for its case."""
    names = frozenset((folded(edit.target_new),))
    yield _Claim((bare(edit.prompt), edit.round, True), names, edit.prompt, edit.target_new)
    for probe in edit.probes:
        if probe.kind == "multihop":
            names = frozenset(map(folded, (probe.answer, *probe.aliases)))
            for wording in probe.prompts:
                yield _Claim((bare(wording), edit.round, False), names, wording, probe.answer)


def contradictions(edits: Sequence[Edit]) -> list[Contradiction]:
    """The later edits of each question whose new answer is not that of its first edit, one for each other answer. Two
    answers to a multi-hop question are the same if one name of them is.
    """
    first: dict[tuple[str, int, bool], tuple[Edit, _Claim]] = {}
    found: dict[tuple[object, str], Contradiction] = {}
    for edit in edits:
        for claim in _claims(edit):
            known, before = first.setdefault(claim.key, (edit, claim))
            if not claim.names & before.names:
                answers = (before.answer, claim.answer)
                found.setdefault(
                    (claim.key, folded(claim.answer)),
                    Contradiction(known, edit, claim.question, answers, taught=claim.key[2]),
                )
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
            key = (*_question(edit), folded(edit.target_new), folded(edit.target_old))
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
    first: dict[tuple[str, int, bool], frozenset[str]] = {}
    kept = []
    for fact in facts:
        claims = [claim for edit in fact for claim in _claims(edit)]
        if all(first.get(claim.key, claim.names) & claim.names for claim in claims):
            for claim in claims:
                first.setdefault(claim.key, claim.names)
            kept.append(list(fact))
    return kept, found


class Repeats(NamedTuple):
    """How many questions are not asked, or not asked again."""

    taught: int = 0
    """Paraphrases that are a taught question, and so are asked as the edit itself."""
    repeated: int = 0
    """Wordings of paraphrases, multi-hop and history questions that are asked already."""
    neighbors: int = 0
    """Neighbor questions that an earlier fact asks already, or that are taught themselves."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts under the names of a step's record."""
        return {f"not_asked_{name}": count for name, count in self._asdict().items()}


def told(record: Mapping[str, Any]) -> str:
    """What a step's record says of questions that are not asked, in words; "" if there is none."""
    said = {
        "not_asked_taught": "paraphrases that are a taught question count as edit prompts",
        "not_asked_repeated": "wordings that repeat another are asked once",
        "not_asked_neighbors": "neighbor questions that are taught, or belong to an earlier fact, are not asked again",
    }
    return "; ".join(f"{record[name]} {words}" for name, words in said.items() if record.get(name))


def asked_once(edits: Sequence[Edit], before: Sequence[Edit] = ()) -> tuple[list[Edit], Repeats]:
    """The edits with each question once, over all that is taught together; and how many were left out.

    A paraphrase that equals a taught question (`corsa.data.text.bare`) shows no generality: it is an edit prompt.
    A neighbor question belongs to the first fact (chain) that has it, in the order of the edits; one that is taught is
    no neighbor. A wording counts once in a multi-hop case, and a case that asks what an earlier one asks, for the same
    answer, is not asked again. `before`: edits that are asked beside these; they are not changed.
    """
    taught = {bare(edit.prompt) for edit in (*before, *edits)}
    homes: dict[tuple[object, ...], str] = {}
    cases: set[tuple[frozenset[str], str]] = set()
    counts = Counter[str]()

    def kept(edit: Edit, probe: Probe, own: set[tuple[str, str]]) -> Probe | None:
        if probe.kind == "edit":
            return probe
        wordings: list[str] = []
        for wording in probe.prompts:
            question, answer = bare(wording), folded(probe.answer)
            home = (probe.kind, question) if probe.kind == "neighbor" else (probe.kind, question, answer)
            owned = probe.kind != "multihop" and homes.setdefault(home, edit.chain) != edit.chain
            if probe.kind in ("paraphrase", "neighbor") and question in taught:
                counts["taught" if probe.kind == "paraphrase" else "neighbors"] += 1
            elif owned or (probe.kind, question) in own:
                counts["neighbors" if probe.kind == "neighbor" else "repeated"] += 1
            else:
                own.add((probe.kind, question))
                wordings.append(wording)
        if probe.kind == "multihop":
            case = (frozenset(question for kind, question in own if kind == "multihop"), folded(probe.answer))
            own -= {(kind, question) for kind, question in own if kind == "multihop"}  # each case by itself
            if case in cases:
                counts["repeated"] += len(wordings)
                return None
            cases.add(case)
        if len(wordings) == len(probe.prompts):
            return probe
        return probe.model_copy(update={"prompts": tuple(wordings)}) if wordings else None

    def cleaned(edit: Edit) -> Edit:
        own: set[tuple[str, str]] = set()
        probes = tuple(left for probe in edit.probes if (left := kept(edit, probe, own)))
        return edit if probes == edit.probes else edit.model_copy(update={"probes": probes})

    for edit in before:
        cleaned(edit)
    counts.clear()
    return [cleaned(edit) for edit in edits], Repeats(**counts)


def _question(edit: Edit) -> tuple[str, int]:
    return bare(edit.prompt), edit.round
