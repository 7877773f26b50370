"""Finds repeated and contradicting edits, and repeated questions, among all edits that are taught together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from corsa.data.edit import Edit, Probe
from corsa.data.text import bare, folded
from corsa.errors import CorsaError

OnContradiction = Literal["report", "refuse", "keep-first"]


class Contradiction(NamedTuple):
    """One question with different new answers in one round, from two edits or from their cases."""

    first: Edit
    later: Edit
    question: str
    answers: tuple[str, str]
    taught: bool = True
    """Whether the question itself is taught; else it is a multi-hop question of two cases with different answers."""

    def __str__(self) -> str:
        first, later = self.answers
        verb = "is taught" if self.taught else "is asked for"
        return f"{self.question!r} {verb} {first!r} ({self.first.id}) and {later!r} ({self.later.id})"


class _Claim(NamedTuple):
    """The new answer that an edit gives to a question."""

    key: tuple[str, int, bool]
    names: frozenset[str]
    question: str
    answer: str


def _claims(edit: Edit) -> Iterator[_Claim]:
    """The claims about the question that the edit teaches, and about the multi-hop questions of its case."""
    names = frozenset((bare(edit.target_new),))
    yield _Claim((bare(edit.prompt), edit.round, True), names, edit.prompt, edit.target_new)
    for probe in edit.probes:
        if probe.kind == "multihop":
            names = frozenset(map(bare, (probe.answer, *probe.aliases)))
            for wording in probe.prompts:
                yield _Claim((bare(wording), edit.round, False), names, wording, probe.answer)


def contradictions(edits: Sequence[Edit]) -> list[Contradiction]:
    """For each question, the later edits whose new answer differs from that of the first edit, one per other answer.
    Two answers to a multi-hop question are the same if they share a name.
    """
    first: dict[tuple[str, int, bool], tuple[Edit, _Claim]] = {}
    found: dict[tuple[object, str], Contradiction] = {}
    for edit in edits:
        for claim in _claims(edit):
            known, before = first.setdefault(claim.key, (edit, claim))
            if not claim.names & before.names:
                answers = (before.answer, claim.answer)
                found.setdefault(
                    (claim.key, bare(claim.answer)),
                    Contradiction(known, edit, claim.question, answers, taught=claim.key[2]),
                )
    return list(found.values())


def without_repeats(facts: Sequence[Sequence[Edit]]) -> list[list[Edit]]:
    """The facts with each edit once. A later edit with the same question and answers is removed, and its additional
    probes move to the first one. Facts without a remaining edit are removed.
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

    report: all are taught. keep-first: if an edit of a fact contradicts an earlier fact, the whole fact is left out,
    because its questions depend on that edit.

    Raises:
        CorsaError: `on` is refuse, and there is a contradiction.
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
    """Paraphrases that are a taught question. They are asked as edit prompts."""
    repeated: int = 0
    """Wordings of paraphrases, multi-hop and history questions that are already asked."""
    neighbors: int = 0
    """Neighbor questions that an earlier fact already asks, or that are taught."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts under the names of a step's record."""
        return {f"not_asked_{name}": count for name, count in self._asdict().items()}


def told(record: Mapping[str, Any]) -> str:
    """Describes the questions that are not asked, from a step's record; "" if there are none."""
    said = {
        "not_asked_taught": "paraphrases that are a taught question count as edit prompts",
        "not_asked_repeated": "wordings that repeat another are asked once",
        "not_asked_neighbors": "neighbor questions that are taught, or belong to an earlier fact, are not asked again",
    }
    return "; ".join(f"{record[name]} {words}" for name, words in said.items() if record.get(name))


def asked_once(edits: Sequence[Edit], before: Sequence[Edit] = ()) -> tuple[list[Edit], Repeats]:
    """The edits with each question once, over all edits that are taught together; and how many questions are left out.

    A paraphrase that equals a taught question (`corsa.data.text.bare`) does not measure generality: it counts as an
    edit prompt. A neighbor question belongs to the first fact (chain) that has it, in the order of the edits. A taught
    question is not a neighbor. A wording counts once in a multi-hop case. A case with the questions and the answer of
    an earlier case is not asked again. `before`: further edits that are asked with these; they are not changed.
    """
    taught = {bare(edit.prompt) for edit in (*before, *edits)}
    homes: dict[tuple[object, ...], str] = {}
    cases: set[tuple[frozenset[str], str]] = set()
    counts = Counter[str]()

    def kept(edit: Edit, probe: Probe, own: set[tuple[str, str]]) -> Probe | None:
        if probe.kind == "edit":
            return probe
        wordings: list[str] = []
        answer = folded(probe.answer)
        for wording in probe.prompts:
            question = bare(wording)
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
            case = (frozenset(question for kind, question in own if kind == "multihop"), answer)
            own -= {(kind, question) for kind, question in own if kind == "multihop"}  # each case separately
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
