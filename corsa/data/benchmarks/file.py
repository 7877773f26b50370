"""A user's own edits: one record an edit, in JSONL (or a JSON list), CSV or Parquet.

| column | | |
|---|---|---|
| prompt, target_new | required | the question or cloze, the new answer |
| target_old | required (`drafts` does without) | the answer to give up |
| id | `<file name>/<position>` | unique |
| subject, relation | "" | |
| aliases_new, aliases_old | none | list of strings; in CSV with a bar between them |
| paraphrases | none | list of strings; in CSV with a bar between them: `Who leads X? | X is led by` |
| neighbors | none | list of {prompt, answer, aliases}; in CSV as JSON: questions that the edit must not touch |
| chain, round | none | updates of one fact that follow each other: the same `chain`, `round` from 1 without a gap |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from corsa.data.benchmarks import BENCHMARKS, BadRecord, Source
from corsa.data.benchmarks.rows import Row, rows_of
from corsa.data.edit import Edit, FieldError, Question, normalise
from corsa.errors import CorsaError, unknown_name

REQUIRED = ("prompt", "target_new", "target_old")
COLUMNS = (
    *REQUIRED,
    *("id", "subject", "relation", "aliases_new", "aliases_old", "paraphrases", "neighbors", "chain", "round"),
)

_REMEDIES = {
    "prompt": "give the question or cloze that is asked",
    "target_new": "give the answer that the model shall learn",
    "target_old": "give the answer that the model shall give up: L_DPO contrasts the two",
}


class Draft(NamedTuple):
    """A record that may lack its old answer (""): where it stands, and the arguments of `Edit.build`."""

    where: str
    fields: dict[str, Any]

    def edit(self, **change: Any) -> Edit:
        """The edit with some fields changed. Raises FieldError for the first that is not valid."""
        return Edit.build(**{**self.fields, **change})


def drafts(source: Source) -> list[Draft]:
    """The records in file order, of a chain the last one alone: what holds now is what a model is to be told.

    Raises CorsaError at the first record that is bad, is given twice, or contradicts another; and if there is none.
    """
    latest: dict[str, Draft] = {}
    asked: dict[str, str] = {}
    ids: dict[str, str] = {}
    for row in rows_of(source):
        try:
            if isinstance(row, BadRecord):
                raise FieldError(row.field, row.reason, row.remedy)
            draft = Draft(row.where, _fields(row, source.prefix, ("prompt", "target_new")))
            edit = draft.edit(target_old=draft.fields["target_old"] or f"not {draft.fields['target_new']}")
            _once("id", edit.id, ids, row.where)
            if draft.fields["chain"] is None:
                _once("prompt", normalise(edit.prompt), asked, row.where)
            else:
                _once("round", f"{edit.round} of chain {edit.chain}", asked, row.where)
        except FieldError as error:
            raise CorsaError(f"{source}, {row.where}: {error}") from None
        if edit.round >= latest.setdefault(edit.chain, draft).fields["round"]:
            latest[edit.chain] = draft
    if not latest:
        raise CorsaError(f"{source} is empty: it holds no fact; give a file with at least one")
    return list(latest.values())


def _once(field: str, value: str, seen: dict[str, str], where: str) -> None:
    if value in seen:
        raise FieldError(field, f"{value!r} was used before, by {seen[value]}", "give each fact once")
    seen[value] = where


def drafts_of(path: Path) -> list[Draft]:
    """The records of a user's file, see `drafts`."""
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise CorsaError(f"the file of facts {path} {kind} (seen from {Path.cwd()})")
    return drafts(Source(BENCHMARKS["file"], path.stem, path))


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """First the records that are bad by themselves, then the facts; a chain has the place of its first record."""
    chains: dict[str, list[tuple[str, Edit]]] = {}
    ids: dict[str, str] = {}
    for row in rows_of(source):
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            edit = _edit(row, source.prefix)
            if edit.id in ids:
                raise FieldError(
                    "id", f"{edit.id!r} was used before, by {ids[edit.id]}", "give each edit an id of its own"
                )
        except FieldError as error:
            yield BadRecord(row.where, error.field, error.reason, error.remedy)
            continue
        ids[edit.id] = row.where
        chains.setdefault(edit.chain, []).append((row.where, edit))
    for members in chains.values():
        members.sort(key=lambda member: member[1].round)
        fault = _chain_fault(members)
        if fault:
            yield fault
            continue
        edits = [edit for _, edit in members]
        chained = edits[0].chain != edits[0].id
        short = rounds is not None and chained and len(edits) < rounds
        yield [] if short else edits[:rounds]


def _chain_fault(members: list[tuple[str, Edit]]) -> BadRecord | None:
    """What is wrong with the rounds of a chain, whose members are sorted by round; None where they are 1, 2, 3, ..."""
    before, expected = "", 1
    for where, edit in members:
        if edit.round < expected:
            reason = f"round {edit.round} of chain {edit.chain!r} was given before, by {before}"
            return BadRecord(where, "round", reason, "give each update of a chain a round of its own")
        if edit.round > expected:
            reason = f"chain {edit.chain!r} has round {edit.round} but no round {expected}"
            return BadRecord(where, "round", reason, "number the updates of a chain 1, 2, 3, ... without a gap")
        before, expected = where, expected + 1
    return None


def _edit(row: Row, prefix: str) -> Edit:
    return Edit.build(**_fields(row, prefix, REQUIRED))


def _fields(row: Row, prefix: str, required: Sequence[str]) -> dict[str, Any]:
    """The arguments of `Edit.build` that a record gives; a column that is not required may be absent."""
    for column in row.values:
        if column not in COLUMNS:
            raise FieldError(str(column), str(unknown_name("column", str(column), COLUMNS)))
    texts = {column: row.optional(column) for column in REQUIRED}
    texts |= {column: row.text(column, _REMEDIES[column]) for column in required}
    chain = _name(row, "chain")
    if not chain and row.get("round") is not None:
        raise FieldError("chain", "is missing, though there is a round", "say which chain the round belongs to")
    return {
        **texts,
        "id": _name(row, "id") or f"{prefix}/{row.index}",
        "chain": chain or None,
        "round": _round(row) if chain else 1,
        "subject": row.optional("subject"),
        "relation": row.optional("relation"),
        "aliases_new": _texts(row, "aliases_new"),
        "aliases_old": _texts(row, "aliases_old"),
        "paraphrases": _texts(row, "paraphrases"),
        "neighbors": _neighbors(row),
    }


def _texts(row: Row, column: str) -> list[str]:
    """A list of strings; a single string is a CSV cell, or a list of one."""
    value = row.get(column)
    if isinstance(value, str):
        row = Row({column: value.split(" | ")}, row.index, row.where)
    return row.texts(column)


def _name(row: Row, column: str) -> str:
    """A string, or a number as one; "" if absent."""
    value = row.get(column)
    return str(value) if isinstance(value, int) else row.optional(column)


def _round(row: Row) -> int:
    value = row.get("round")
    # Text in CSV; a float in Parquet written by pandas, where a column has gaps.
    if (isinstance(value, str) and value.strip().isdecimal()) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if value is None:
        raise FieldError("round", "is missing, though there is a chain", "number the updates of a chain 1, 2, 3, ...")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FieldError("round", f"is not a whole number from 1 but {value!r}")
    return value


def _neighbors(row: Row) -> list[Question]:
    value: Any = row.get("neighbors")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise FieldError("neighbors", f"is not JSON: {error.msg} at character {error.pos + 1}") from None
    if value is None:
        return []
    example = 'give a list such as [{"prompt": "...", "answer": "..."}]'
    if not isinstance(value, list):
        raise FieldError("neighbors", f"is not a list but {value!r}", example)
    questions = []
    for index, item in enumerate(value):
        name = f"neighbors[{index}]"
        if not isinstance(item, Mapping) or not item.keys() <= {"prompt", "answer", "aliases"}:
            raise FieldError(name, f"is not an object with prompt, answer and perhaps aliases: {item!r}", example)
        neighbor = Row({name: item}, row.index, row.where)
        question = neighbor.text(f"{name}.prompt"), neighbor.text(f"{name}.answer"), neighbor.texts(f"{name}.aliases")
        questions.append(question)
    return questions
