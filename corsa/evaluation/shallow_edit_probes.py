"""Probes that a shallow edit fails: one that ties a wording to an answer and changes nothing behind it.

- reversal: the question turned round, whose answer is the subject. Needs a subject that the question names. Other
  subjects may fit the turned question as well, so a low share alone says little; compare it with the base model's.
- negation: whether the old answer is true, and whether the new one is.
- choice: the question with the new answer among up to three others: the old one, answers of the neighbors, new answers
  of other facts of the same round (first of the same relation).
- template: the taught question in the other prompt template: `Q: ...`, `A:` or the tokenizer's chat.

They are made from the fields of an edit and are the same in every round, so that answers of rounds can be compared.
A negation or choice that also gives a wrong option is not right.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import Field

from corsa.config.evaluation import SHALLOW
from corsa.data.edit import Edit, Probe, Text
from corsa.data.text import folded

_LONGEST = 60  # characters: a longer answer is a sentence of a model, no option
_OPTIONS = 3
_WHO = re.compile(r"(who|which \w+|what) (?!(?:is|was|are|were|does|do|did)\b)(?P<verb>.+)\?", re.I)
_IS = re.compile(r"(who|what|which \w+) (?P<verb>is|was|are|were) (?P<of>the .+ of) (?P<rest>.+)\?", re.I)


class OptionsProbe(Probe):
    """A question with options. An answer that gives one of `wrong` is not right."""

    wrong: tuple[Text, ...] = Field(min_length=1)


def with_shallow_edit_probes(edits: Sequence[Edit], kinds: Collection[str]) -> list[Edit]:
    """The edits with generated probes of those kinds, after their own probes. `edits`: all edits of a scenario."""
    if not set(kinds) & set(SHALLOW):
        return list(edits)
    others = _pools(edits) if "choice" in kinds else {}
    made = []
    for edit in edits:
        generated = (*_of_one(edit), *_choice(edit, others))
        probes = tuple(probe for probe in generated if probe.kind in kinds)
        made.append(edit.model_copy(update={"probes": (*edit.probes, *probes)}))
    return made


def _of_one(edit: Edit) -> Iterator[Probe]:
    if question := reversal(edit.prompt, edit.subject, edit.target_new):
        yield Probe(kind="reversal", prompts=(question,), answer=edit.subject, aliases=())
    for answer, right, wrong in ((edit.target_old, "No", "Yes"), (edit.target_new, "Yes", "No")):
        if _short(answer):
            asked = f'Is it true that "{answer}" is the right answer to "{edit.prompt}"? Answer yes or no.'
            if not edit.prompt.endswith("?"):
                asked = f'Is it true that "{edit.prompt}" goes on with "{answer}"? Answer yes or no.'
            yield OptionsProbe(kind="negation", prompts=(asked,), answer=right, aliases=(), wrong=(wrong,))
    yield Probe(kind="template", prompts=(edit.prompt,), answer=edit.target_new, aliases=edit.aliases_new)


def reversal(prompt: str, subject: str, answer: str) -> str:
    r"""The question turned round, so that its answer is the subject; "" without a subject that the prompt names.

    >>> reversal("Who leads Acme?", "Acme", "Ada Byron")
    'Ada Byron leads whom or what?'
    >>> reversal("What is the capital of France?", "France", "Paris")
    'Paris is the capital of whom or what?'
    >>> reversal("Where is Acme's head office?", "Acme", "Lisbon")
    'What belongs in the gap? "Where is ___\'s head office?" Answer: Lisbon'
    """
    place = prompt.lower().find(subject.lower()) if subject.strip() else -1
    if place < 0 or not _short(answer):
        return ""
    found = _IS.fullmatch(prompt)
    if found and folded(found["rest"]) == folded(subject):
        return f"{answer} {found['verb']} {found['of']} whom or what?"
    found = _WHO.fullmatch(prompt)
    if found and folded(found["verb"]).endswith(" " + folded(subject)):
        return f"{answer} {found['verb'][: -len(subject)].rstrip()} whom or what?"
    return f'What belongs in the gap? "{prompt[:place]}___{prompt[place + len(subject) :]}" Answer: {answer}'


def _choice(edit: Edit, others: Mapping[tuple[int, str], list[Edit]]) -> Iterator[Probe]:
    names = [edit.target_old, *(probe.answer for probe in edit.probes if probe.kind == "neighbor")]
    for key in ((edit.round, edit.relation), (edit.round, "")):
        pool = others.get(key, []) if key[1] or not edit.relation or len(names) <= _OPTIONS else []
        start = next((i for i, other in enumerate(pool) if other.id == edit.id), 0)
        names += [other.target_new for other in (pool[start + 1 :] + pool[:start])[: 4 * _OPTIONS]]
    wrong: list[str] = []
    for name in names:
        text, taken = folded(name), [folded(n) for n in (edit.target_new, *edit.aliases_new, *wrong)]
        if _short(name) and len(wrong) < _OPTIONS and not any(text in other or other in text for other in taken):
            wrong.append(name)
    if wrong and _short(edit.target_new):
        options = sorted([edit.target_new, *wrong], key=lambda name: _order(f"{edit.id} {name}"))
        asked = f"{edit.prompt} Choose one of these: {'; '.join(options)}."
        yield OptionsProbe(
            kind="choice", prompts=(asked,), answer=edit.target_new, aliases=edit.aliases_new, wrong=tuple(wrong)
        )


def _pools(edits: Sequence[Edit]) -> dict[tuple[int, str], list[Edit]]:
    """The edits of each round, and of each round and relation, in an order that later edits of other rounds keep."""
    pools: dict[tuple[int, str], list[Edit]] = {}
    for edit in sorted(edits, key=lambda edit: (_order(edit.id), edit.id)):
        for relation in dict.fromkeys((edit.relation, "")):
            pools.setdefault((edit.round, relation), []).append(edit)
    return pools


def _order(text: str) -> int:
    return zlib.crc32(text.encode())


def _short(answer: str) -> bool:
    return 0 < len(answer.strip()) <= _LONGEST and "\n" not in answer
