"""Reads the records of a file or of standard input: JSON, JSON lines, CSV or Parquet, plain or gzipped."""

from __future__ import annotations

import atexit
import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from corsa.data.benchmarks import BadRecord
from corsa.data.text import shown
from corsa.errors import CorsaError
from corsa.terminal import without_user

Found = tuple[Any, str]
"""The values of a record, and its position in the file, for messages."""

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}

_PIPED = 1 << 30
"""Maximum bytes of standard input, of a pipe or of a device."""
_EXPANDED, _RATIO = 64 << 20, 200
"""A gzipped file may expand to this many bytes, and to this many times its size if that is more."""


# Where a file is


_STORES = ("s3://", "gs://", "file://")
"""The addresses of objects that are read like files."""
_kept: dict[str, Path] = {}
_names: dict[Path, str] = {}


def regular(path: str | Path) -> Path:
    """The path of a file that can be read more than once. The content of a pipe or of an object (s3://..., gs://...) is
    kept until the process ends.

    `-` is standard input. The first bytes of a pipe give its format: Parquet, a JSON list, JSON lines, or CSV.

    Raises:
        CorsaError: standard input is a terminal or closed, or cannot be read; there is no such object.
    """
    given = str(path)
    if given.startswith(_STORES):
        return _fetched(given)
    place = Path(given).expanduser()
    if re.match(r"\w{2,}:/", given):  # pathlib turns :// into :/
        raise CorsaError(f"{without_user(given)} is an address, not a file: download it first")
    piped = place.exists() and not place.is_file() and not place.is_dir()
    if given != "-" and not piped and not given.startswith(("/dev/", "/proc/")):
        return place
    if given not in _kept:
        try:
            if given == "-" and (sys.stdin is None or sys.stdin.isatty()):
                why = "is closed" if sys.stdin is None else "is a terminal"
                raise CorsaError(f"- is standard input, and that {why}: pipe a file into it, or name one")
            with nullcontext(sys.stdin.buffer) if given == "-" else place.open("rb") as file:
                content = file.read(_PIPED + 1)
        except OSError as error:
            raise CorsaError(f"{given} cannot be read: {error.strerror or error}") from error
        if len(content) > _PIPED:
            raise CorsaError(f"{given} gives more than {_PIPED >> 20} MiB: save it to a file, and name that")
        _keep(given, f"stdin{_kind(content)}", content)
        call(_kept[given], "standard input" if given in ("-", "/dev/stdin") else given)
    return _kept[given]


def _fetched(url: str) -> Path:
    if url not in _kept:
        from corsa.flow.files import Files

        address, mark, query = url.partition("?")
        folder, _, name = address.rpartition("/")
        content = Files(folder + mark + query).read(name)
        if content is None:
            raise CorsaError(f"{address} does not exist")
        _keep(url, name, content)
        call(_kept[url], address)
    return _kept[url]


def _keep(given: str, name: str, content: bytes) -> None:
    folder = Path(tempfile.mkdtemp(prefix="corsa-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _kept[given] = folder / name
    _kept[given].write_bytes(content)


def call(path: Path, name: str) -> None:
    """Set the name of a temporary file in messages."""
    _names[path] = name


def name_of(path: Path) -> str:
    """The name of a file in messages."""
    return _names.get(path, str(path))


def stem(path: Path) -> str:
    """The name of a file without its suffixes: `facts` for facts.csv.gz."""
    return Path(path.name.removesuffix(".gz")).stem


def _kind(content: bytes) -> str:
    if content.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            try:
                return f"{_kind(file.read(4096))}.gz"
            except (OSError, EOFError, zlib.error):
                return ".jsonl.gz"  # reading it reports the error
    if content.startswith(b"PAR1"):
        return ".parquet"
    first = content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b"[": ".json", b"{": ".jsonl", b"": ".jsonl"}.get(first, ".csv")


# The records of a file


def records(path: Path, columns: Collection[str]) -> Iterator[Found | BadRecord]:
    """The records of a file in order. `columns`: known column names, to find the separator of a CSV file.

    Raises:
        CorsaError: the file cannot be read, or its content does not match its suffix.
    """
    readers: dict[str, Callable[[Path], Iterator[Found | BadRecord]]] = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": lambda path: _csv(path, columns),
        ".tsv": lambda path: _csv(path, columns),
        ".parquet": _parquet,
    }
    name = name_of(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in readers:
        raise CorsaError(f"{name}: unknown kind of file {suffix!r}; give one of {', '.join(readers)}, gzipped or not")
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as error:
        raise CorsaError(_not_utf8(path, error)) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorsaError(f"{name} is not a whole gzip file: {error}; compress it again") from error
    except OSError as error:
        raise CorsaError(f"{name} cannot be read: {error.strerror or error}; check its permissions") from error


class _Gzipped(gzip.GzipFile):
    """A gzipped file. Reading raises CorsaError if it expands beyond its limit: a few bytes can hold gigabytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path, self._most = path, max(_EXPANDED, _RATIO * path.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        """As that of a file."""
        left = self._most + 1 - self.tell()
        return self._checked(super().read(left if size is None or size < 0 else min(size, left)))

    def read1(self, size: int = -1) -> bytes:
        """As that of a file."""
        return self._checked(super().read1(size))

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > self._most:
            raise CorsaError(f"{name_of(self._path)} expands to more than {self._most >> 20} MiB: give it unpacked")
        return content


def _bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return _Gzipped(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline=newline)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    with _bytes(path) as file:
        start = file.read(4)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            return f"{name_of(path)} is not UTF-8 text but UTF-16; save it as UTF-8"
        for number, line in enumerate((start + file.read()).split(b"\n"), start=1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                byte = f"byte 0x{line[found.start]:02x} at position {found.start + 1}"
                return f"{name_of(path)} is not UTF-8 text (line {number}: {byte}); save it as UTF-8"
    return f"{name_of(path)} is not UTF-8 text ({error.reason}); save it as UTF-8"


class _Repeated(dict[str, Any]):
    """A JSON object with a repeated key. Python would silently keep the last value."""

    key: str


def parsed(text: str) -> tuple[Any, bool]:
    """A JSON value, and whether an object in it repeats a key.

    Raises:
        ValueError: it is not JSON (JSONDecodeError, with a position), or Python cannot represent it.
    """
    repeated = False

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        values = dict(found)
        if len(values) == len(found):
            return values
        repeated = True
        keys = [key for key, _ in found]
        values = _Repeated(values)
        values.key = next(key for key in keys if keys.count(key) > 1)
        return values

    try:
        return json.loads(text, object_pairs_hook=pairs), repeated
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise ValueError(str(error).partition(":")[0].lower()) from None


def _checked(values: Any, where: str, repeated: bool) -> Found | BadRecord:
    if not isinstance(values, Mapping):
        return BadRecord(where, "record", f"is not an object but {shown(repr(values))}")
    twice = key_given_twice(values) if repeated else None
    return (
        BadRecord(where, shown(twice), "is given twice", "give each key once") if twice is not None else (values, where)
    )


def key_given_twice(value: Any) -> str | None:
    """A key that occurs twice in an object of a value from `parsed`, at any depth; None if there is none."""
    if isinstance(value, _Repeated):
        return value.key
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((key for item in inner if (key := key_given_twice(item)) is not None), None)


def _json(path: Path) -> Iterator[Found | BadRecord]:
    with _text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        found, repeated = parsed(text)
    except json.JSONDecodeError as error:
        hint = "is the file whole? one object a line belongs into a .jsonl file"
        raise CorsaError(f"{name_of(path)}, line {error.lineno}: this is not JSON: {error.msg}; {hint}") from error
    except ValueError as error:
        raise CorsaError(f"{name_of(path)}: this JSON cannot be read: {error}") from error
    if not isinstance(found, list):
        raise CorsaError(f"{name_of(path)}: expected a JSON list of records, found {shown(repr(found))}")
    del text
    found.reverse()
    for index in range(len(found)):
        yield _checked(found.pop(), f"record [{index}]", repeated)  # each is freed when its reader is done with it


def _jsonl(path: Path) -> Iterator[Found | BadRecord]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                values, repeated = parsed(line)
                if number == 1 and isinstance(values, list) and any(isinstance(item, Mapping) for item in values):
                    raise CorsaError(_LIST.format(name_of(path)))
                yield _checked(values, where, repeated)
            except json.JSONDecodeError as error:
                if number == 1 and line.strip() == "[":
                    raise CorsaError(_LIST.format(name_of(path))) from error
                yield BadRecord(where, f"column {error.colno}", f"this is not JSON: {error.msg}")
            except ValueError as error:
                yield BadRecord(where, "record", f"this JSON cannot be read: {error}")


_LIST = "{} holds one JSON list and not one object a line; call it .json"


def _csv(path: Path, columns: Collection[str]) -> Iterator[Found | BadRecord]:
    with _text(path, newline="") as file:
        try:
            separator, names, before = _header(path, file, columns)
        except csv.Error as error:
            raise CorsaError(f"{name_of(path)}, line 1: this is no header of a CSV file: {error}") from error
        reader = csv.reader(file, delimiter=separator, strict=True)
        line = before + 1
        try:
            for cells in reader:
                where, line = f"line {line}", before + reader.line_num + 1
                if not any(cells):
                    continue
                if len(cells) != len(names):
                    reason = f"has {len(cells)} cells, the header {len(names)}"
                    remedy = f"quote cells that hold {SEPARATORS.get(separator, separator)} or line breaks"
                    yield BadRecord(where, "record", reason, remedy.replace("a comma", "commas"))
                else:
                    # An empty cell is an absent value.
                    yield {key: cell or None for key, cell in zip(names, cells, strict=True)}, where
        except csv.Error as error:
            line = before + reader.line_num
            raise CorsaError(f"{name_of(path)}, line {line}: this is not CSV: {error}; check its quotes") from error


def _header(path: Path, file: IO[str], columns: Collection[str]) -> tuple[str, list[str], int]:
    """The separator, the names of the columns, and how many lines they take.

    Chooses the separator that gives the most known names; if names are equally known, the most columns.
    """
    first, lines = file.readline(), 1
    if first.lower().startswith("sep=") and len(first.rstrip("\r\n")) == 5:  # the optional first line of Excel
        given, first, lines = first[4], file.readline(), 2
        return given, _names_of(path, first, given, lines), lines
    found = {
        separator: [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
        for separator in SEPARATORS
    }
    best = max(found, key=lambda separator: (len(set(found[separator]) & set(columns)), len(found[separator])))
    names = _names_of(path, first, best, lines)
    if len(names) == 1 and not set(names) & set(columns):
        raise CorsaError(
            f"{name_of(path)}, line {lines}: there is one column alone, {shown(names[0])!r}: columns are separated by "
            f"{', '.join(list(SEPARATORS.values())[:-1])} or {list(SEPARATORS.values())[-1]}"
        )
    return best, names, lines


def _names_of(path: Path, line: str, separator: str, number: int) -> list[str]:
    names = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    if len(set(names)) < len(names):
        raise CorsaError(
            f"{name_of(path)}, line {number}: a column name occurs twice in {shown(repr(names))}; rename one"
        )
    if "" in names and len(names) > 1:
        raise CorsaError(
            f"{name_of(path)}, line {number}: column {names.index('') + 1} has no name; name it or leave it out "
            "(pandas: to_csv(..., index=False))"
        )
    return names


def _parquet(path: Path) -> Iterator[Found | BadRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _bytes(path) as file:
        try:
            table = pq.read_table(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file)
            rows = table.to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
            raise CorsaError(
                f"{name_of(path)} is not a whole Parquet file: {shown(str(error), 200)}; write it again, or name it by "
                "what it is"
            ) from error
    for index, values in enumerate(rows):
        yield values, f"row [{index}]"
