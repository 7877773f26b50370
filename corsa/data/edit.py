"""The Edit record: one fact to change, with the questions that test the change; and its Arrow schema.

Every benchmark record and every fact of a user's file becomes this type (`corsa.data.benchmarks`). On disk it is a
Parquet table of `EDIT_SCHEMA`, one row per edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Annotated, Any, overload

import pyarrow as pa
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from corsa.config import Frozen
from corsa.config.evaluation import ProbeKind
from corsa.data.text import bare, composed, fault, folded, same_text, shown, templated, visible
from corsa.errors import CorsaError


def _sound(text: str) -> str:
    if not visible(text):
        raise PydanticCustomError("invisible", "has no visible character")
    return composed(text)


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_sound)]
"""A string in composed form (`corsa.data.text`) that has a visible character."""

Question = tuple[str, str, Sequence[str]]
"""A prompt, its answer, and aliases of the answer."""


class FieldError(CorsaError):
    """One field of one record is wrong. The reader of the file adds the position of the record."""

    def __init__(self, field: str, reason: str, remedy: str = "") -> None:
        super().__init__(field, reason, remedy)
        self.field, self.reason, self.remedy = field, reason, remedy

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


class Probe(Frozen):
    """A question to the edited model. Each wording is asked and scored separately."""

    kind: ProbeKind
    prompts: tuple[Text, ...] = Field(min_length=1, description="wordings of the question, without any template")
    answer: Text = Field(description="the expected answer")
    aliases: tuple[Text, ...] = Field((), description="other names of the answer")


class Edit(Frozen):
    """One fact to change: to `prompt`, the model should answer `target_new` and no longer `target_old`."""

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
        description="blank: no old answer, L_DPO leaves the edit out (`build` refuses that)"
    )
    aliases_new: tuple[Text, ...] = ()
    aliases_old: tuple[Text, ...] = ()
    probes: tuple[Probe, ...] = ()

    @field_validator("target_old")
    @classmethod
    def _differs(cls, old: str, info: ValidationInfo) -> str:
        new = info.data.get("target_new")
        if old and new is not None and same_text(new, old):
            raise PydanticCustomError("same_target", "is the same as target_new ({old})", {"old": shown(repr(old))})
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

        Leaves out aliases that are blank, repeat the target, or also name the other target. Under the rule `contains`,
        a blank alias would match any output, and an ambiguous alias would match both targets.

        Refuses new and old answers that differ only in form (`corsa.data.text.same_text`), and a question that is
        already in a template.

        Raises FieldError for the first field that is not valid.
        """
        neighbors = list(neighbors)
        if isinstance(target_old, str) and not target_old.strip():
            raise FieldError("target_old", "is blank")
        _readable("target_new", [target_new])
        _readable("target_old", [target_old])
        _readable("neighbors", [answer for _, answer, _ in neighbors])
        _readable("prompt", [prompt], question=True)
        _readable("paraphrases", paraphrases, question=True)
        _readable("neighbors", [question for question, _, _ in neighbors], question=True)
        _readable("history", history, question=True)
        new, old = _aliases(aliases_new, target_new, aliases_old, target_old)
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
                aliases_new=new,
                aliases_old=old,
            )
            return edit.model_copy(update={"probes": tuple(_probes(edit, paraphrases, neighbors, history))})
        except ValidationError as error:
            raise field_error(error) from None


def _aliases(
    aliases_new: Sequence[str], target_new: str, aliases_old: Sequence[str], target_old: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The aliases of the new and of the old answer that name only this answer."""
    new = [alias for alias in _distinct(aliases_new, target_new) if not same_text(alias, target_old)]
    old = [alias for alias in _distinct(aliases_old, target_old) if not same_text(alias, target_new)]
    both = {bare(alias) for alias in new} & {bare(alias) for alias in old}
    return tuple(a for a in new if bare(a) not in both), tuple(a for a in old if bare(a) not in both)


def _probes(
    edit: Edit, paraphrases: Sequence[str], neighbors: Iterable[Question], history: Sequence[str]
) -> Iterator[Probe]:
    """The probes of an edit, in the order of `Edit.build`."""
    new, old = edit.aliases_new, edit.aliases_old
    yield Probe(kind="edit", prompts=(edit.prompt,), answer=edit.target_new, aliases=new)
    if paraphrases:
        yield Probe(kind="paraphrase", prompts=tuple(paraphrases), answer=edit.target_new, aliases=new)
    for question, answer, names in neighbors:
        yield Probe(kind="neighbor", prompts=(question,), answer=answer, aliases=tuple(_distinct(names, answer)))
    if history:
        yield Probe(kind="history", prompts=tuple(history), answer=edit.target_old, aliases=old)


def _readable(field: str, texts: Sequence[str], *, question: bool = False) -> None:
    """Raises FieldError for an invalid text (`corsa.data.text.fault`), or for a question that is already in a template.
    Does not check blank texts and values that are not strings: the validation of the field does.
    """
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            continue
        if wrong := fault(text):
            raise FieldError(field, wrong)
        if question and templated(text):
            reason = f"stands in a template already: {shown(text)!r}"
            raise FieldError(field, reason, "give the question alone, the template is added to it")


def _distinct(names: Sequence[str], taken: str) -> list[str]:
    """The names in their order, without blank ones and those whose folded form is that of `taken` or repeated."""
    if not names:  # fast path: most are empty, and a benchmark has about 10 neighbors per edit
        return []
    seen = {"", folded(taken)}
    kept = []
    for name in names:
        if (normal := folded(name)) not in seen:
            seen.add(normal)
            kept.append(name)
    return kept


def field_error(error: ValidationError) -> FieldError:
    """The first error that pydantic found, as field and reason in plain words."""
    first = error.errors()[0]
    return FieldError(".".join(map(str, first["loc"])), _reason(first))


def _reason(error: ErrorDetails) -> str:
    match error["type"]:
        case "missing":
            return "is missing"
        case "string_too_short":
            return "is blank"
        case "string_type":
            return f"is not a string but {shown(repr(error['input']))}"
        case _:
            return error["msg"][:1].lower() + error["msg"][1:]


BLOCK = 4096
"""Edits that are Python objects at a time where a table of them is written or read."""

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
    """The edits as a table of `EDIT_SCHEMA`, one row per edit, in their order."""
    return pa.Table.from_batches(_batches(edits), schema=EDIT_SCHEMA)


def _batches(edits: Iterable[Edit]) -> Iterator[pa.RecordBatch]:
    """Converts a block of edits at a time, since an edit as Python objects takes several times its row."""
    rest = iter(edits)
    while block := list(islice(rest, BLOCK)):
        yield pa.RecordBatch.from_pylist([edit.model_dump() for edit in block], schema=EDIT_SCHEMA)


def from_table(table: pa.Table) -> list[Edit]:
    """The edits of a table with the columns of `EDIT_SCHEMA`, in its order. Other columns are ignored.

    Raises CorsaError if a column is missing or has another type, or if a row is not a valid edit.
    """
    return list(EditTable(table))


class EditTable(Sequence[Edit]):
    """The edits of a table, each made when it is read. A row takes about a tenth of the memory of an `Edit`.

    Raises CorsaError like `from_table`: for the columns now, for a row when it is read.
    """

    def __init__(self, table: pa.Table) -> None:
        missing = [name for name in EDIT_SCHEMA.names if name not in table.column_names]
        if missing:
            raise CorsaError(
                f"this is not a table of edits: column {missing[0]!r} is missing; it has {table.column_names}"
            )
        try:
            self._table = table.select(EDIT_SCHEMA.names).cast(EDIT_SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise CorsaError(
                f"this is not a table of edits: {error}; write it with corsa.data.edit.to_table"
            ) from error
        self._places: Sequence[int] = range(len(table))

    def only(self, places: Sequence[int]) -> EditTable:
        """The edits at these positions. The table is shared."""
        chosen = copy(self)
        chosen._places = [self._places[place] for place in places]
        return chosen

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        return self._table[name].take(pa.array(self._places, pa.int64())).to_pylist()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...
    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        places = self._places[index]
        return self._made([places])[0] if isinstance(places, int) else self._made(places)

    def __iter__(self) -> Iterator[Edit]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def _made(self, places: Sequence[int]) -> list[Edit]:
        rows = self._table.take(pa.array(places, pa.int64())).to_pylist()
        edits = []
        for place, row in zip(places, rows, strict=True):
            try:
                edits.append(Edit.model_validate(row))
            except ValidationError as error:
                raise CorsaError(
                    f"row {place} of the table of edits: {field_error(error)}; write it with corsa.data.edit.to_table"
                ) from None
        return edits
