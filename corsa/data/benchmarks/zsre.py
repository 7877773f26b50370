"""ZsRE (Levy et al. 2017), as `zsre_mend_eval.json` of MEND (Mitchell et al. 2022), or as the hub's rows.

In MEND's file `alt` is the counterfactual new answer and `answers` are the true ones: the first is the old target, the
others its aliases (`pred`, the answer of the model MEND was built on, is not used). The first of `answers` equals `alt`
in 28 of the 1,037 records, and in one more but for a blank; those are bad records. `rephrase` equals `src` in 161: it
is asked all the same, since it is the benchmark's paraphrase.

In the hub's rows the new answer is the first of `alternatives`, the old one the first `output[].answer`. They have no
subject and no neighbor question.
"""

from __future__ import annotations

from collections.abc import Iterator

from corsa.data.benchmarks import BadRecord, Source
from corsa.data.benchmarks.rows import Row, facts_of
from corsa.data.edit import Edit, FieldError

_LOC_PREFIX = "nq question: "


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """Each record is one fact without a chain; `rounds` is not used. Ids are positions in the file, from 0."""
    return facts_of(source, _edits)


def _edits(row: Row, prefix: str) -> list[Edit]:
    name = f"{prefix}/{row.index}"
    return [_hub_edit(row, name) if "alternatives" in row.values else _mend_edit(row, name)]


def _mend_edit(row: Row, name: str) -> Edit:
    old, *aliases = _answers(row.texts("answers"), "answers")
    neighbors = []
    if row.get("loc") is not None:
        neighbors.append((row.text("loc").removeprefix(_LOC_PREFIX), row.text("loc_ans"), ()))
    return Edit.build(
        id=name,
        prompt=row.text("src"),
        subject=row.optional("subject"),
        target_new=row.text("alt"),
        target_old=old,
        aliases_old=aliases,
        paraphrases=row.texts("rephrase"),
        neighbors=neighbors,
    )


def _hub_edit(row: Row, name: str) -> Edit:
    new = _answers(row.texts("alternatives"), "alternatives")[0]
    outputs = row.get("output")
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise FieldError("output", "is not a list of objects with an answer")
    answers = [item["answer"] for item in outputs if isinstance(item.get("answer"), str) and item["answer"].strip()]
    old, *aliases = _answers(answers, "output[].answer")
    return Edit.build(
        id=name,
        prompt=row.text("input"),
        target_new=new,
        target_old=old,
        aliases_old=aliases,
        paraphrases=row.texts("rephrases"),
    )


def _answers(texts: list[str], field: str) -> list[str]:
    if not texts:
        raise FieldError(field, "is missing: there is no answer")
    return texts
