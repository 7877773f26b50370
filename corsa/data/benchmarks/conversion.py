"""Writes the facts of any readable file in the project's own form (`corsa.data.benchmarks.file`), as JSON lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from corsa.data.benchmarks.file import Draft
from corsa.data.edit import Edit
from corsa.errors import CorsaError

_WITHOUT_COLUMN = ("multihop", "history")
"""Kinds of probes that only benchmarks have."""


def from_draft(draft: Draft) -> dict[str, Any]:
    """The record of a user's fact, or of a foreign format's. Columns without a value are left out."""
    given = draft.fields
    chained = {} if given["chain"] is None else {"chain": given["chain"], "round": given["round"]}
    names = ("id", "prompt", "target_new", "target_old", "subject", "relation")
    return _record({name: given[name] for name in names} | chained, given)


def from_edit(edit: Edit) -> dict[str, Any]:
    """The record of a benchmark's edit. Columns without a value are left out."""
    chained = {} if edit.chain == edit.id else {"chain": edit.chain, "round": edit.round}
    names = ("id", "prompt", "target_new", "target_old", "subject", "relation")
    probes: dict[str, Any] = {
        "aliases_new": edit.aliases_new,
        "aliases_old": edit.aliases_old,
        "paraphrases": [text for probe in edit.probes if probe.kind == "paraphrase" for text in probe.prompts],
        "neighbors": [(p.prompts[0], p.answer, p.aliases) for p in edit.probes if p.kind == "neighbor"],
    }
    return _record({name: getattr(edit, name) for name in names} | chained, probes)


def _record(texts: Mapping[str, Any], lists: Mapping[str, Any]) -> dict[str, Any]:
    neighbors = [
        {"prompt": prompt, "answer": answer} | ({"aliases": list(aliases)} if aliases else {})
        for prompt, answer, aliases in lists["neighbors"]
    ]
    several = {name: list(lists[name]) for name in ("aliases_new", "aliases_old", "paraphrases")}
    return {name: value for name, value in {**texts, **several, "neighbors": neighbors}.items() if value}


def left_out(edits: Iterable[Edit]) -> dict[str, int]:
    """How many questions of each kind have no column in the form."""
    kinds = Counter(probe.kind for edit in edits for probe in edit.probes if probe.kind in _WITHOUT_COLUMN)
    return dict(sorted(kinds.items()))


def write(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Writes one record a line to a new file, under its name only once it is whole.

    Raises:
        CorsaError: the file exists, or cannot be written.
    """
    if file.exists():
        raise CorsaError(f"--convert {file} exists: name a new file")
    aside = file.with_name(f".{uuid4().hex}.{file.name}")
    try:
        with aside.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CorsaError(f"--convert {file} cannot be written: {error.strerror}. Name another file") from error
