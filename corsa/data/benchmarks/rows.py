"""Rows of a file or of the hub, and checked access to their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from corsa.data.benchmarks import BENCHMARKS, COLUMNS, BadRecord, Hub, Source
from corsa.data.benchmarks.cells import structured
from corsa.data.benchmarks.files import Found, records
from corsa.data.benchmarks.foreign import FORMATS, Format
from corsa.data.edit import Edit, FieldError
from corsa.data.text import LONGEST, composed, fault, shown
from corsa.errors import CorsaError


@dataclass(frozen=True)
class Row:
    """One record: its values, its position (from 0), and its place in the file, for messages."""

    values: Mapping[str, Any]
    index: int
    where: str

    def get(self, path: str) -> Any:
        """The value at a dotted path such as `requested_rewrite.target_new.str`, or None if any part is absent."""
        value: Any = self.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, path: str, remedy: str = "") -> str:
        """The string at a path, composed and stripped. Raises FieldError if it is absent, not a string, or blank."""
        return _text(self.get(path), path, remedy)

    def optional(self, path: str) -> str:
        """The string at a path, composed and stripped; "" if it is absent or blank.

        Raises FieldError if it is not a string.
        """
        value = self.get(path)
        return "" if value is None or value == "" else _string(value, path)

    def texts(self, path: str) -> list[str]:
        """The strings of a list at a path, which may be JSON in a string. A single string gives a list of one, an
        absent value an empty list.

        Raises FieldError if an item is blank or not a string.
        """
        value = structured(self.get(path), path)
        if isinstance(value, str):
            return [_text(value, path)]
        return [_text(item, f"{path}[{i}]") for i, item in enumerate(_list(value, path))]

    def names(self, path: str) -> list[str]:
        """Like `texts`, but without blank items and nulls, which published lists of aliases contain."""
        value = structured(self.get(path), path)
        items = [value] if isinstance(value, str) else _list(value, path)
        strings = (_string(item, f"{path}[{i}]") for i, item in enumerate(items) if item is not None)
        return [string for string in strings if string]


def _list(value: Any, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise FieldError(path, f"is not a list but {shown(repr(value))}")
    return list(value)


def _string(value: Any, path: str) -> str:
    """The string in composed form. Raises FieldError if it is not a string or too long."""
    if not isinstance(value, str):
        raise FieldError(path, f"is not a string but {shown(repr(value))}")
    if len(value) > LONGEST:
        raise FieldError(path, fault(value) or "is too long")
    return composed(value)


def _text(value: Any, path: str, remedy: str = "") -> str:
    if value is None:
        raise FieldError(path, "is missing", remedy)
    text = _string(value, path)
    if wrong := fault(value):
        raise FieldError(path, wrong, remedy if not text else "")
    return text


def facts_of(source: Source, edits: Callable[[Row, str], list[Edit]]) -> Iterator[list[Edit] | BadRecord]:
    """The facts of a source with one fact per record, by `edits(row, prefix)`. A repeated id is a bad record."""
    seen: dict[str, str] = {}
    for row in rows_of(source).rows:
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            fact = edits(row, source.prefix)
        except FieldError as error:
            yield BadRecord(row.where, error.field, error.reason, error.remedy)
            continue
        name = fact[0].chain if fact else ""
        if name in seen:
            yield BadRecord(row.where, "id", f"{name!r} was used before, by {seen[name]}")
            continue
        if name:
            seen[name] = row.where
        yield fact


class Rows(NamedTuple):
    """The rows of a source."""

    rows: Iterator[Row | BadRecord]
    """In order; a record that cannot be read is a BadRecord."""
    format: Format | None = None
    """The foreign format whose columns were mapped to the benchmark's; None if there was none."""


def rows_of(source: Source) -> Rows:
    """The rows of a source. If a user's file has a known foreign format, its columns are mapped.

    Raises CorsaError if the file cannot be read, or if its records are not those of the source's benchmark.
    """
    found = records(source.path, _columns()) if source.path else _hub_rows(source)
    # The first rows show whether this is the right file. A single different row is only a bad record.
    head = list(islice(found, 20))
    known = _recognise(source, [values for values, _ in (item for item in head if not isinstance(item, BadRecord))])
    return Rows(_rows(chain(head, found), known), known)


def _rows(found: Iterable[Found | BadRecord], known: Format | None) -> Iterator[Row | BadRecord]:
    for index, item in enumerate(found):
        if isinstance(item, BadRecord):
            yield item
        else:
            values, where = item
            try:
                yield Row(known.convert(values) if known and known.convert else values, index, where)
            except FieldError as error:
                yield BadRecord(where, error.field, error.reason, error.remedy)


def _columns() -> frozenset[str]:
    """The column names of all known formats."""
    own = (keys for benchmark in BENCHMARKS.values() for keys in benchmark.signatures)
    return frozenset(COLUMNS).union(*own, *(keys for format in FORMATS for keys in format.marks))


def _recognise(source: Source, head: list[Mapping[str, Any]]) -> Format | None:
    """The foreign format of a user's file; None if its records have the benchmark's own format."""

    def fits(signatures: Iterable[frozenset[str]]) -> bool:
        return any(keys <= values.keys() for values in head for keys in signatures)

    benchmark = source.benchmark
    mine = benchmark.name == "file"
    if not head or fits(benchmark.signatures):
        return None
    other = next((name for name, known in BENCHMARKS.items() if fits(known.signatures)), None)
    known = next((format for format in FORMATS if fits(format.marks)), None) if other is None else None
    if known and known.convert and mine:
        return known
    if mine and other is None and known is None:
        return None  # the error of the first record names the missing or misspelt column
    if other:
        hint = f"this looks like benchmark {other!r}"
    elif known:
        how = f"read it with --benchmark file: {known.mapping}" if known.convert else known.mapping
        hint = f"this looks like {known.name}: {how}"
    else:
        hint = "check --benchmark and --data"
    expected = " or ".join(", ".join(sorted(keys)) for keys in benchmark.signatures)
    raise CorsaError(
        f"{source} does not hold what benchmark {benchmark.name!r} reads: expected records with {expected}; "
        f"found {shown(', '.join(map(str, head[0])), 200) or 'an empty record'}; {hint}"
    )


def _hub_rows(source: Source) -> Iterator[Found | BadRecord]:
    import datasets

    hub = source.benchmark.hub
    assert isinstance(hub, Hub), "a source has a file or a hub id"
    try:
        records = datasets.load_dataset(hub.id, split=hub.split, revision=hub.revision)
    except Exception as error:  # the library passes on any exception of its transport
        raise CorsaError(
            f"{hub.id} ({hub.split}, {hub.revision}) could not be had from the Hugging Face hub: {error}; "
            "where there is no network, download the benchmark's file elsewhere and give it with --data"
        ) from error
    for index, values in enumerate(records):
        yield values, f"row [{index}]"
