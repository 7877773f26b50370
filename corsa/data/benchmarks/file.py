"""A user's own edits: one record per edit, in JSONL (or a JSON list), CSV (also with semicolons or tabs) or Parquet,
gzipped or not.

| column | | |
|---|---|---|
| prompt, target_new | required | the question or cloze, the new answer |
| target_old | required (not for `drafts`) | the old answer |
| id | `<file name>/<position>` | unique |
| subject, relation | "" | |
| aliases_new, aliases_old | none | list of strings; in CSV a JSON list, or separated by bars |
| paraphrases | none | list of strings; in CSV a JSON list, or separated by bars: `Who leads X? | X is led by` |
| neighbors | none | list of {prompt, answer, aliases}; in CSV as JSON: questions that the edit must not touch |
| chain, round | none | successive updates of one fact: the same `chain`, `round` from 1 without a gap |

Columns of known foreign formats are mapped to these (`corsa.data.benchmarks.foreign`). One function, `checked`, finds
the errors of a file, for every command that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from corsa.data.benchmarks import BENCHMARKS, COLUMNS, REQUIRED, BadRecord, Source, refused
from corsa.data.benchmarks.cases import contradictions
from corsa.data.benchmarks.cells import structured, texts
from corsa.data.benchmarks.files import regular, stem
from corsa.data.benchmarks.foreign import Format
from corsa.data.benchmarks.rows import Row, rows_of
from corsa.data.edit import Edit, FieldError, Question
from corsa.data.text import bare, folded, shown
from corsa.errors import CorsaError, unknown_name

_REMEDIES = {
    "prompt": "give the question or cloze that is asked",
    "target_new": "give the answer that the model shall learn",
    "target_old": "give the answer that the model shall give up, L_DPO contrasts the two; `corsa edit` needs none, it "
    "asks the model",
}


class Draft(NamedTuple):
    """A record whose old answer may be absent (""): its position, and the arguments of `Edit.build`."""

    where: str
    fields: dict[str, Any]

    def edit(self, **change: Any) -> Edit:
        """The edit with some fields changed. Raises FieldError for the first invalid field."""
        return Edit.build(**{**self.fields, **change})


class Checked(NamedTuple):
    """The records of a file, valid and invalid."""

    drafts: list[Draft]
    """The valid records, in file order; empty with `contradicting`."""
    edits: list[tuple[str, Edit]]
    """The same as edits with their position in the file, with `contradicting`: one of the two is enough."""
    faults: list[BadRecord]
    """The invalid records."""
    format: Format | None
    """The foreign format of the columns; None for the project's own."""


def checked(
    source: Source, required: Sequence[str] = ("prompt", "target_new"), *, contradicting: bool = False
) -> Checked:
    """Checks the records of a file, each alone and against the others.

    Args:
        source: the file.
        required: columns that every record must have.
        contradicting: accepts a repeated question with different answers, which `corsa.data.benchmarks.cases` handles
            later. `required` then holds target_old.

    Raises:
        CorsaError: the file cannot be read.
    """
    found = Checked([], [], [], (rows := rows_of(source)).format)
    asked: dict[tuple[str, ...], str] = {}
    ids: dict[str, str] = {}
    for row in rows.rows:
        if isinstance(row, BadRecord):
            found.faults.append(row)
            continue
        try:
            draft = Draft(row.where, _fields(row, source.prefix, required))
            edit = draft.edit(target_old=draft.fields["target_old"] or f"not {draft.fields['target_new']}")
            _once("id", edit.id, (edit.id,), ids, row.where)
            if draft.fields["chain"] is None:
                question = (bare(edit.prompt), *([bare(edit.target_new)] if contradicting else []))
                _once("prompt", folded(edit.prompt), question, asked, row.where)
            else:
                _once("round", edit.chain, ("", edit.chain, str(edit.round)), asked, row.where, edit.round)
        except FieldError as error:
            found.faults.append(BadRecord(row.where, error.field, error.reason, error.remedy))
        else:
            if contradicting:
                found.edits.append((row.where, edit))
            else:
                found.drafts.append(draft)
    return found


_ONCE = {
    "id": ("{0!r} was used before, by {1}", "give each edit an id of its own"),
    "prompt": ("{0!r} was used before, by {1}", "give each fact once"),
    "round": ("round {2} of chain {0!r} was given before, by {1}", "give each update of a chain a round of its own"),
}


def _once(field: str, value: str, key: tuple[str, ...], seen: dict[Any, str], where: str, round_: int = 1) -> None:
    if before := seen.get(key):
        reason, remedy = _ONCE[field]
        raise FieldError(field, reason.format(shown(value), before, round_), remedy)
    seen[key] = where


def drafts(source: Source) -> list[Draft]:
    """The records in file order; of a chain only the last one, which is the current value.

    Raises CorsaError if records are bad, repeated, or contradict each other, and if there are none.
    """
    found = checked(source)
    if found.faults:
        raise refused(source, found.faults)
    latest: dict[str, Draft] = {}
    for draft in found.drafts:
        chain = draft.fields["chain"] or draft.fields["id"]
        if draft.fields["round"] >= latest.setdefault(chain, draft).fields["round"]:
            latest[chain] = draft
    if not latest:
        raise CorsaError(f"{source} is empty: it holds no fact; give a file with at least one")
    now = [draft.edit(target_old=draft.fields["target_old"] or "?", round=1) for draft in latest.values()]
    if contradicting := contradictions(now):
        raise CorsaError(f"{source}: {contradicting[0]} ({len(contradicting)} such in all): correct the file")
    return list(latest.values())


def source_of(path: str | Path) -> Source:
    """A user's file, or standard input (`-`). Raises CorsaError if it does not exist."""
    place = regular(path)
    if not place.is_file():
        kind = "is a directory, not a file" if place.is_dir() else "does not exist"
        raise CorsaError(f"the file of facts {place} {kind} (seen from {Path.cwd()})")
    return Source(BENCHMARKS["file"], stem(place), place)


def drafts_of(path: str | Path) -> list[Draft]:
    """The records of a user's file, see `drafts`."""
    return drafts(source_of(path))


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """First the bad records, then the facts. A chain has the position of its first record."""
    found = checked(source, REQUIRED, contradicting=True)
    yield from found.faults
    chains: dict[str, list[tuple[str, Edit]]] = {}
    for where, edit in found.edits:
        chains.setdefault(edit.chain, []).append((where, edit))
    for members in chains.values():
        members.sort(key=lambda member: member[1].round)
        gap = _chain_fault(members)
        if gap:
            yield gap
            continue
        edits = [edit for _, edit in members]
        chained = edits[0].chain != edits[0].id
        short = rounds is not None and chained and len(edits) < rounds
        yield [] if short else edits[:rounds]


def _chain_fault(members: list[tuple[str, Edit]]) -> BadRecord | None:
    """The error in the rounds of a chain, whose members are sorted by round; None if they are 1, 2, 3, ..."""
    for expected, (where, edit) in enumerate(members, start=1):
        if edit.round > expected:
            reason = f"chain {edit.chain!r} has round {edit.round} but no round {expected}"
            return BadRecord(where, "round", reason, "number the updates of a chain 1, 2, 3, ... without a gap")
    return None


def _fields(row: Row, prefix: str, required: Sequence[str]) -> dict[str, Any]:
    """The arguments of `Edit.build` from a record. Columns that are not required may be absent."""
    _known(row.values, required)
    taught = {column: row.optional(column) for column in REQUIRED}
    taught |= {column: row.text(column, _REMEDIES[column]) for column in required}
    chain = _name(row, "chain")
    if not chain and row.get("round") is not None:
        raise FieldError("chain", "is missing, though there is a round", "say which chain the round belongs to")
    return {
        **taught,
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


def _known(values: Mapping[str, Any], required: Sequence[str]) -> None:
    """Raises FieldError if there are unknown columns. It names all of them, and the missing columns."""
    unknown = [str(column) for column in values if column not in COLUMNS]
    if not unknown:
        return
    if len(unknown) == 1:
        raise FieldError(shown(unknown[0]), str(unknown_name("column", shown(unknown[0]), COLUMNS)))
    missing = [column for column in required if values.get(column) is None]
    reason = f"{shown(', '.join(unknown), 120)} are unknown" + (f" and {', '.join(missing)} missing" * bool(missing))
    raise FieldError("columns", reason, f"known are {', '.join(COLUMNS)}")


def _texts(row: Row, column: str) -> list[str]:
    """A list of strings. A single string is a cell of a table (`corsa.data.benchmarks.cells`)."""
    return Row({column: texts(row.get(column), column)}, row.index, row.where).texts(column)


def _name(row: Row, column: str) -> str:
    """A string, or a number as a string; "" if absent."""
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
        raise FieldError("round", f"is not a whole number from 1 but {shown(repr(value))}")
    return value


def _neighbors(row: Row) -> list[Question]:
    value = structured(row.get("neighbors"), "neighbors")
    if value is None:
        return []
    example = 'give a list such as [{"prompt": "...", "answer": "..."}]'
    if isinstance(value, str):
        raise FieldError("neighbors", f"is not JSON that can be read: {shown(value)}", example)
    if not isinstance(value, list):
        raise FieldError("neighbors", f"is not a list but {shown(repr(value))}", example)
    questions = []
    for index, item in enumerate(value):
        name = f"neighbors[{index}]"
        if not isinstance(item, Mapping) or not item.keys() <= {"prompt", "answer", "aliases"}:
            raise FieldError(
                name, f"is not an object with prompt, answer and perhaps aliases: {shown(repr(item))}", example
            )
        neighbor = Row({name: item}, row.index, row.where)
        question = neighbor.text(f"{name}.prompt"), neighbor.text(f"{name}.answer"), neighbor.texts(f"{name}.aliases")
        questions.append(question)
    return questions
