"""Rows of a file or of the hub, and the access to their fields that says what is wrong with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from corsa.data.benchmarks import BENCHMARKS, BadRecord, Hub, Source
from corsa.data.edit import Edit, FieldError
from corsa.errors import CorsaError


@dataclass(frozen=True)
class Row:
    """One record: its values, its position (from 0), and where a person finds it in the file."""

    values: Mapping[str, Any]
    index: int
    where: str

    def get(self, path: str) -> Any:
        """The value at a dotted path such as `requested_rewrite.target_new.str`, or None where any part is absent."""
        value: Any = self.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, path: str, remedy: str = "") -> str:
        """The string at a path, stripped. Raises FieldError if it is absent, not a string, or blank."""
        return _text(self.get(path), path, remedy)

    def optional(self, path: str) -> str:
        """The string at a path, stripped; "" if it is absent or blank. Raises FieldError if it is not a string."""
        value = self.get(path)
        return "" if value is None or value == "" else _string(value, path).strip()

    def texts(self, path: str) -> list[str]:
        """The strings of a list at a path; of a single string, that one; none if absent.

        Raises FieldError if one is not a string or blank.
        """
        value = self.get(path)
        if isinstance(value, str):
            return [_text(value, path)]
        return [_text(item, f"{path}[{i}]") for i, item in enumerate(_list(value, path))]

    def names(self, path: str) -> list[str]:
        """As `texts`, but leaving out blank items and nulls: published lists of aliases have them."""
        value = self.get(path)
        items = [value] if isinstance(value, str) else _list(value, path)
        strings = (_string(item, f"{path}[{i}]").strip() for i, item in enumerate(items) if item is not None)
        return [string for string in strings if string]


def _list(value: Any, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise FieldError(path, f"is not a list but {_shown(value)}")
    return list(value)


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise FieldError(path, f"is not a string but {_shown(value)}")
    return value


def _text(value: Any, path: str, remedy: str = "") -> str:
    if value is None:
        raise FieldError(path, "is missing", remedy)
    text = _string(value, path).strip()
    if not text:
        raise FieldError(path, "is blank", remedy)
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def facts_of(source: Source, edits: Callable[[Row, str], list[Edit]]) -> Iterator[list[Edit] | BadRecord]:
    """The facts of a source in which each record is one, by `edits(row, prefix)`; a repeated id is a bad record."""
    seen: dict[str, str] = {}
    for row in rows_of(source):
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


def rows_of(source: Source) -> Iterator[Row | BadRecord]:
    """The rows of a source, in order; a line that does not parse is a BadRecord.

    Raises CorsaError if the file cannot be read, or if its records are not those of the source's benchmark.
    """
    rows = _file_rows(source.path) if source.path else _hub_rows(source)
    # The first rows tell whether this is the right file at all; a single odd row among them is only a bad record.
    head = list(islice(rows, 20))
    _recognise(source, [row for row in head if isinstance(row, Row)])
    return chain(head, rows)


def _recognise(source: Source, head: list[Row]) -> None:
    def fits(signatures: Iterable[frozenset[str]]) -> bool:
        return any(keys <= row.values.keys() for row in head for keys in signatures)

    own = source.benchmark.signatures
    if not head or fits(own):
        return
    other = next((name for name, known in BENCHMARKS.items() if fits(known.signatures)), None)
    if other is None and source.benchmark.on_bad_record == "stop":
        return  # a user's file: its first record will say which column is missing or misspelt
    expected = " or ".join(", ".join(sorted(keys)) for keys in own)
    hint = f"this looks like benchmark {other!r}" if other else "check --benchmark and --data"
    raise CorsaError(
        f"{source} does not hold what benchmark {source.benchmark.name!r} reads: expected records with {expected}; "
        f"found {', '.join(map(str, head[0].values)) or 'an empty record'}; {hint}"
    )


def _file_rows(path: Path) -> Iterator[Row | BadRecord]:
    readers = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CorsaError(f"{path}: unknown kind of file {path.suffix!r}; give one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise CorsaError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise CorsaError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error


def _json(path: Path) -> Iterator[Row | BadRecord]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "is the file whole? one object a line belongs into a .jsonl file"
        raise CorsaError(f"{path}, line {error.lineno}: this is not JSON: {error.msg}; {hint}") from error
    if not isinstance(records, list):
        raise CorsaError(f"{path}: expected a JSON list of records, found {_shown(records)}")
    for index, values in enumerate(records):
        yield _row(values, index, f"record [{index}]")


def _jsonl(path: Path) -> Iterator[Row | BadRecord]:
    index = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _row(json.loads(line), index, f"line {number}")
            except json.JSONDecodeError as error:
                yield BadRecord(f"line {number}", f"column {error.colno}", f"this is not JSON: {error.msg}")
            index += 1


def _row(values: Any, index: int, where: str) -> Row | BadRecord:
    if isinstance(values, Mapping):
        return Row(values, index, where)
    return BadRecord(where, "record", f"is not an object but {_shown(values)}")


def _csv(path: Path) -> Iterator[Row | BadRecord]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise CorsaError(f"{path}, line 1: a column name occurs twice in {header}; rename one")
        index, line = 0, reader.line_num + 1
        try:
            for cells in reader:
                where, line = f"line {line}", reader.line_num + 1
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    reason = f"has {len(cells)} cells, the header {len(header)}"
                    yield BadRecord(where, "record", reason, "quote cells that hold commas or line breaks")
                else:
                    # An empty cell is an absent value.
                    yield Row({key: cell or None for key, cell in zip(header, cells, strict=True)}, index, where)
                index += 1
        except csv.Error as error:
            raise CorsaError(f"{path}, line {reader.line_num}: this is not CSV: {error}; check its quotes") from error


def _parquet(path: Path) -> Iterator[Row | BadRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorsaError(
                f"{path} is not a whole Parquet file: {error}; write it again, or name it by what it is"
            ) from error
    for index, values in enumerate(table.to_pylist()):
        yield Row(values, index, f"row [{index}]")


def _hub_rows(source: Source) -> Iterator[Row | BadRecord]:
    import datasets

    hub = source.benchmark.hub
    assert isinstance(hub, Hub), "a source has a file or a hub id"
    try:
        records = datasets.load_dataset(hub.id, split=hub.split, revision=hub.revision)
    except Exception as error:  # the library raises whatever its transport raises
        raise CorsaError(
            f"{hub.id} ({hub.split}, {hub.revision}) could not be had from the Hugging Face hub: {error}; "
            "where there is no network, download the benchmark's file elsewhere and give it with --data"
        ) from error
    for index, values in enumerate(records):
        yield _row(values, index, f"row [{index}]")
