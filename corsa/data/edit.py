"""The Edit record: one fact to be changed, with the questions that show whether it was; and its Arrow schema.

Every benchmark record and every fact of a user's file becomes this type (`corsa.data.benchmarks`). On disk it is a
Parquet table of `EDIT_SCHEMA`, one row an edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from corsa.config import Frozen
from corsa.errors import CorsaError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A string with something in it; surrounding blanks are taken off."""

Question = tuple[str, str, Sequence[str]]
"""A prompt, its answer, and aliases of the answer."""


class FieldError(CorsaError):
    """One field of one record is wrong. Who reads the record adds where it stands."""

    def __init__(self, field: str, reason: str, remedy: str = "") -> None:
        super().__init__(field, reason, remedy)
        self.field, self.reason, self.remedy = field, reason, remedy

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


class Probe(Frozen):
    """A question asked of the edited model. Each wording is asked, and scored, on its own."""

    kind: Literal["edit", "paraphrase", "neighbor", "multihop", "history"]
    prompts: tuple[Text, ...] = Field(min_length=1, description="wordings of the question, without any template")
    answer: Text = Field(description="the expected answer")
    aliases: tuple[Text, ...] = Field((), description="other names of the answer")


class Edit(Frozen):
    """One fact to be changed: asked `prompt`, the model shall answer `target_new` and no longer `target_old`."""

    id: Text = Field(description="stable and unique, such as counterfact/4482; <chain>/<round> in chains")
    chain: Text = Field(
        description="id of the chain of successive updates of one fact; equals id for a fact without a chain"
    )
    round: int = Field(ge=1, description="position in the chain, from 1")
    case: str = Field(
        default="", description="edits of one case are taught together; blank: the edit's chain is its case"
    )
    prompt: Text = Field(description="the question or cloze, without any template")
    subject: str = ""
    relation: str = ""
    target_new: Text
    target_old: Annotated[str, StringConstraints(strip_whitespace=True)] = Field(
        description="blank: there is no old answer, and L_DPO leaves the edit out (`build` refuses that)"
    )
    aliases_new: tuple[Text, ...] = ()
    aliases_old: tuple[Text, ...] = ()
    probes: tuple[Probe, ...] = ()

    @field_validator("target_old")
    @classmethod
    def _differs(cls, old: str, info: ValidationInfo) -> str:
        new = info.data.get("target_new")
        if old and new is not None and normalise(new) == normalise(old):
            raise PydanticCustomError("same_target", "is the same as target_new ({old})", {"old": repr(old)})
        return old

    @classmethod
    def build(
        cls,
        *,
        id: str,
        prompt: str,
        target_new: str,
        target_old: str,
        chain: str | None = None,
        round: int = 1,
        case: str = "",
        subject: str = "",
        relation: str = "",
        aliases_new: Sequence[str] = (),
        aliases_old: Sequence[str] = (),
        paraphrases: Sequence[str] = (),
        neighbors: Iterable[Question] = (),
        history: Sequence[str] = (),
    ) -> Edit:
        """An edit with its probes, in this order: the edit prompt, all `paraphrases` (one probe), each of `neighbors`,
        and `history` (wordings of the question for the former value; one probe).

        Aliases that are blank, repeat the target or name the other target as well are left out: under the rule
        `contains` a blank one would match any output, and an ambiguous one both targets.

        Raises FieldError for the first field that is not valid.
        """
        if isinstance(target_old, str) and not target_old.strip():
            raise FieldError("target_old", "is blank")
        new = _distinct(aliases_new, target_new, target_old)
        old = _distinct(aliases_old, target_old, target_new)
        both = {normalise(alias) for alias in new} & {normalise(alias) for alias in old}
        new, old = ([a for a in names if normalise(a) not in both] for names in (new, old))
        try:
            edit = cls(
                id=id,
                chain=id if chain is None else chain,
                round=round,
                case=case,
                prompt=prompt,
                subject=subject,
                relation=relation,
                target_new=target_new,
                target_old=target_old,
                aliases_new=tuple(new),
                aliases_old=tuple(old),
            )
            probes = [Probe(kind="edit", prompts=(edit.prompt,), answer=edit.target_new, aliases=edit.aliases_new)]
            if paraphrases:
                aliases = edit.aliases_new
                probes.append(
                    Probe(kind="paraphrase", prompts=tuple(paraphrases), answer=edit.target_new, aliases=aliases)
                )
            for question, answer, names in neighbors:
                aliases = tuple(_distinct(names, answer))
                probes.append(Probe(kind="neighbor", prompts=(question,), answer=answer, aliases=aliases))
            if history:
                aliases = edit.aliases_old
                probes.append(Probe(kind="history", prompts=tuple(history), answer=edit.target_old, aliases=aliases))
            return edit.model_copy(update={"probes": tuple(probes)})
        except ValidationError as error:
            raise field_error(error) from None


def normalise(text: str) -> str:
    """The text as it is compared: single spaces, case folded.

    >>> normalise("  New   YORK ")
    'new york'
    """
    return " ".join(text.split()).casefold()


def _distinct(names: Sequence[str], *taken: str) -> list[str]:
    """The names that are not blank and whose normal form is neither taken nor repeated, in their order."""
    if not names:  # most have none, and a benchmark has some 10 neighbors an edit
        return []
    seen = {"", *map(normalise, taken)}
    kept = []
    for name in names:
        if (normal := normalise(name)) not in seen:
            seen.add(normal)
            kept.append(name)
    return kept


def field_error(error: ValidationError) -> FieldError:
    """The first fault that pydantic found, as field and reason in plain words."""
    fault = error.errors()[0]
    return FieldError(".".join(map(str, fault["loc"])), _reason(fault))


def _reason(fault: ErrorDetails) -> str:
    match fault["type"]:
        case "missing":
            return "is missing"
        case "string_too_short":
            return "is blank"
        case "string_type":
            return f"is not a string but {fault['input']!r}"
        case _:
            return fault["msg"][:1].lower() + fault["msg"][1:]


_NAMES = pa.list_(pa.string())
EDIT_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "chain": pa.string(),
        "round": pa.int32(),
        "case": pa.string(),
        "prompt": pa.string(),
        "subject": pa.string(),
        "relation": pa.string(),
        "target_new": pa.string(),
        "target_old": pa.string(),
        "aliases_new": _NAMES,
        "aliases_old": _NAMES,
        "probes": pa.list_(
            pa.struct({"kind": pa.string(), "prompts": _NAMES, "answer": pa.string(), "aliases": _NAMES})
        ),
    }
)
"""The columns of a table of edits; no value is null."""


def to_table(edits: Iterable[Edit]) -> pa.Table:
    """The edits as a table of `EDIT_SCHEMA`, one row an edit, in their order."""
    return pa.Table.from_pylist([edit.model_dump() for edit in edits], schema=EDIT_SCHEMA)


def from_table(table: pa.Table) -> list[Edit]:
    """The edits of a table that has the columns of `EDIT_SCHEMA` (and perhaps others), in its order.

    Raises CorsaError where a column is missing or of another type, or a row is no valid edit.
    """
    missing = [name for name in EDIT_SCHEMA.names if name not in table.column_names]
    if missing:
        raise CorsaError(f"this is not a table of edits: column {missing[0]!r} is missing; it has {table.column_names}")
    try:
        rows = table.select(EDIT_SCHEMA.names).cast(EDIT_SCHEMA).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise CorsaError(f"this is not a table of edits: {error}; write it with corsa.data.edit.to_table") from error
    edits = []
    for index, row in enumerate(rows):
        try:
            edits.append(Edit.model_validate(row))
        except ValidationError as error:
            fault = field_error(error)
            raise CorsaError(
                f"row {index} of the table of edits: {fault}; write it with corsa.data.edit.to_table"
            ) from None
    return edits
