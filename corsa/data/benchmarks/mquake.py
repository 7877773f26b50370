"""MQuAKE (Zhong et al. 2023) and MQuAKE-Remastered (Zhong et al. 2025): cases of one or
several edited facts, and questions that need all facts of the case.

A case's edits are taught together. Its multi-hop questions are one probe of its last edit. The prompt of an edit is the
cloze (`requested_rewrite[].prompt`), and its paraphrase is the question, as in the authors' CoRSA code. In MQuAKE-CF-3k
nearly half of the edits occur again in a later case: each is taught once (`corsa.data.benchmarks.cases`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from corsa.data.benchmarks import BadRecord, Source
from corsa.data.benchmarks.rows import Row, facts_of
from corsa.data.edit import Edit, FieldError, Probe


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """Each case is one fact; `rounds` is not used."""
    return facts_of(source, _edits)


def _edits(row: Row, prefix: str) -> list[Edit]:
    case = row.get("case_id")
    if not isinstance(case, int | str):
        raise FieldError("case_id", "is missing" if case is None else f"is not a number but {case!r}")
    rewrites = row.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        raise FieldError("requested_rewrite", "is missing: there is no edit")
    hops = {name: _aliases(row, name) for name in ("single_hops", "new_single_hops")}
    name = f"{prefix}/{case}"
    edits = [
        _edit(Row(values, row.index, row.where), f"{name}/{n}", name, hops) for n, values in enumerate(rewrites, 1)
    ]
    answer, *_ = row.names("new_answer") or [""]
    questions = row.texts("questions")
    if not questions:
        raise FieldError("questions", "is missing: there is no multi-hop question")
    if not answer:
        raise FieldError("new_answer", "is missing: nothing answers the multi-hop questions")
    multihop = Probe(
        kind="multihop", prompts=tuple(questions), answer=answer, aliases=tuple(row.names("new_answer_alias"))
    )
    return [*edits[:-1], edits[-1].model_copy(update={"probes": (*edits[-1].probes, multihop)})]


def _edit(rewrite: Row, name: str, case: str, hops: Mapping[str, Mapping[str, list[str]]]) -> Edit:
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in prompt:
        raise FieldError("requested_rewrite[].prompt", f"has no {{}} for the subject: {prompt!r}")
    question = rewrite.text("question")
    return Edit.build(
        id=name,
        case=case,
        prompt=prompt.replace("{}", subject),
        subject=subject,
        relation=rewrite.optional("relation_id"),
        target_new=_target(rewrite, "target_new"),
        target_old=_target(rewrite, "target_true"),
        aliases_new=hops["new_single_hops"].get(question, ()),
        aliases_old=hops["single_hops"].get(question, ()),
        paraphrases=[question],
    )


def _target(rewrite: Row, name: str) -> str:
    """The target: nested in the original rows, flat in the remastered rows."""
    flat = f"{name}_str"
    return rewrite.text(flat) if rewrite.get(flat) is not None else rewrite.text(f"{name}.str")


def _aliases(row: Row, field: str) -> dict[str, list[str]]:
    """The aliases of each single hop's answer, by its question."""
    hops: Any = row.get(field)
    if not isinstance(hops, list) or not hops:
        raise FieldError(field, "is missing: a case has its single hops with their questions and answers")
    rows = [Row(hop, row.index, row.where) for hop in hops]
    return {hop.text("question"): hop.names("answer_alias") for hop in rows}
