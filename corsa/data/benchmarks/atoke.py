"""AToKe (Yin et al. 2024, *History Matters: Temporal Knowledge Editing in Large Language Model*): `AToKe-ME.json`
(several updates of each fact) and `AToKe-SE.json` (one).

The successive items of `requested_rewrite` are rounds 1..n of one chain. The edit prompt is the question
(`evaluation.questions`), which fits the template `Q: ... A:`; if it is null, the cloze (`evaluation.completion`). The
other wordings without a time are the paraphrases. Wordings with a time are not asked, because an edit states the
current value. The questions of `history_evaluation` ask for the former value, and become history probes. There are no
neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from corsa.data.benchmarks import BadRecord, Source
from corsa.data.benchmarks.rows import Row, facts_of
from corsa.data.edit import Edit, FieldError

_WORDINGS = ("questions", "completion", "paraphrase_completion")


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """Each record is one chain. One bad update among those requested makes the whole chain bad. In most cases, its new
    value equals the old one (41 chains of ME, 7 of SE, over all their updates).
    """
    return facts_of(source, partial(_edits, rounds=rounds))


def _edits(row: Row, prefix: str, rounds: int | None) -> list[Edit]:
    updates = row.get("requested_rewrite")
    if not isinstance(updates, list) or not updates or not all(isinstance(item, Mapping) for item in updates):
        raise FieldError("requested_rewrite", "is not a list of updates")
    case = row.get("case_id")
    if not isinstance(case, int | str):
        raise FieldError("case_id", "is missing" if case is None else f"is not a number but {case!r}")
    if rounds is not None and len(updates) < rounds:
        return []
    edits = []
    for position, update in enumerate(updates[:rounds]):
        # One row per update: its item of each of the record's parallel lists.
        values = {key: _item(row, key, position) for key in ("history_evaluation", "new_answer_alias", "answer_alias")}
        try:
            edits.append(_edit(Row({**update, **values}, row.index, row.where), f"{prefix}/{case}", position + 1))
        except FieldError as error:
            raise FieldError(f"update {position + 1}, {error.field}", error.reason) from None
    return edits


def _item(row: Row, key: str, position: int) -> object:
    values = row.get(key)
    return values[position] if isinstance(values, list) and position < len(values) else None


def _edit(update: Row, chain: str, round_: int) -> Edit:
    wordings = [text for key in _WORDINGS for text in update.texts(f"evaluation.{key}")]
    if not wordings:
        raise FieldError("evaluation", "has neither a question nor a completion")
    return Edit.build(
        id=f"{chain}/{round_}",
        chain=chain,
        round=round_,
        prompt=wordings[0],
        subject=update.optional("subject"),
        relation=update.optional("relation").strip("<>"),
        target_new=update.text("target_new.str"),
        target_old=update.text("target_true.str"),
        aliases_new=update.names("new_answer_alias"),
        aliases_old=update.names("answer_alias"),
        paraphrases=wordings[1:],
        history=[text for key in _WORDINGS for text in update.texts(f"history_evaluation.{key}")],
    )
