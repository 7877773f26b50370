"""CounterFact (Meng et al. 2022, *Locating and Editing Factual Associations in GPT*): `counterfact.json`, or the hub's
rows, which have the same structure.
"""

from __future__ import annotations

from collections.abc import Iterator

from corsa.data.benchmarks import BadRecord, Source
from corsa.data.benchmarks.rows import Row, facts_of
from corsa.data.edit import Edit, FieldError


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """Each record is one fact without a chain; `rounds` is not used."""
    return facts_of(source, _edits)


def _edits(row: Row, prefix: str) -> list[Edit]:
    prompt = row.text("requested_rewrite.prompt")
    subject = row.text("requested_rewrite.subject")
    if "{}" not in prompt:
        raise FieldError("requested_rewrite.prompt", f"has no {{}} for the subject: {prompt!r}")
    case = row.get("case_id")
    if not isinstance(case, int | str):
        raise FieldError("case_id", "is missing" if case is None else f"is not a number but {case!r}")
    true = row.text("requested_rewrite.target_true.str")
    edit = Edit.build(
        id=f"{prefix}/{case}",
        prompt=prompt.replace("{}", subject),
        subject=subject,
        relation=row.optional("requested_rewrite.relation_id"),
        target_new=row.text("requested_rewrite.target_new.str"),
        target_old=true,
        paraphrases=row.texts("paraphrase_prompts"),
        # The neighbors are subjects with the same true answer, which the edit must not touch.
        neighbors=[(question, true, ()) for question in row.texts("neighborhood_prompts")],
    )
    return [edit]
