"""Values as data: JSON for their structure, and one block of bytes for what is not text.

The two processes do not trust each other. A received value is built from the closed list of kinds in this module and
in `packages.py`. The types, lengths and depth of its parts are checked. Nothing is unpickled, no message names a
function to call, and no object receives a state.

JSON's own values (None, bool, int, float, str, list) are sent as they are. Every other kind is an object with one key,
the name of the kind: `{"tuple": [1, 2]}`, `{"bytes": [0, 16]}` (offset and length in the block of bytes).
"""

from __future__ import annotations

import json
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

DEPTH = 100
"""Maximum depth of nested containers."""
_WIDEST = 1 << 62
"""Integers from this size on are sent as hexadecimal text. Python reads it in linear time and without a digit limit."""
_DIGITS = 1 << 20
"""Maximum number of digits of a number."""
_PLAIN = frozenset({type(None), bool, str, float})
_CLASSES = {
    f"builtins.{kind.__name__}": kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}


class CannotCrossError(Exception):
    """The value is not data: its class is not on the list, it is nested too deeply, or it is malformed."""


class Writer:
    """Turns values into JSON values (trees), and collects their bytes.

    Args:
        stand_in: returns the tree of a value that stays on this side, such as a function, and None for other values.
    """

    def __init__(self, stand_in: Callable[[Any], dict[str, Any] | None] = lambda value: None) -> None:
        self.stand_in = stand_in
        self.blobs: list[bytes] = []
        self._size = 0
        self._depth = 0

    def blob(self, raw: bytes) -> list[int]:
        """Append bytes to the block. Returns [offset, length]."""
        place = [self._size, len(raw)]
        self.blobs.append(raw)
        self._size += len(raw)
        return place

    def write(self, value: Any) -> Any:
        """The tree of a value.

        Raises:
            CannotCrossError: the value is not data.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            return value if -_WIDEST < value < _WIDEST else {"int": hex(value)}
        if self._depth > DEPTH:
            raise CannotCrossError(f"a value nested more than {DEPTH} containers deep")
        self._depth += 1
        try:
            if kind is list:
                return [self.write(item) for item in value]
            if isinstance(value, type):
                return _write_class(self, value)
            writer = WRITERS.get(kind)
            if writer:
                return writer(self, value)
            found = self.stand_in(value)
            if found is None:
                from corsa.sandbox import packages

                found = packages.written(self, value)
        finally:
            self._depth -= 1
        if found is None:
            raise CannotCrossError(f"a value of {kind.__module__}.{kind.__qualname__}, which is not plain data")
        return found


class Reader:
    """Builds values from trees and a block of bytes.

    Args:
        area: the block of bytes.
        stand_ins: readers of further kinds, such as functions of the other side.
    """

    def __init__(self, area: memoryview, stand_ins: dict[str, Callable[[Any], Any]] | None = None) -> None:
        self.area = area
        self.stand_ins = stand_ins or {}
        self._depth = 0

    def blob(self, place: Any) -> memoryview:
        """The bytes at [offset, length]. Raises CannotCrossError if they are outside the block."""
        offset, length = self.integers(place, 2)
        if offset < 0 or length < 0 or offset + length > len(self.area):
            raise CannotCrossError("bytes outside the message")
        return self.area[offset : offset + length]

    def integers(self, tree: Any, count: int | None = None) -> list[int]:
        """A list of small integers. Raises CannotCrossError for anything else."""
        if type(tree) is not list or any(type(item) is not int for item in tree) or count not in (None, len(tree)):
            raise CannotCrossError("not a list of integers")
        return tree

    def text(self, tree: Any) -> str:
        """A text. Raises CannotCrossError for anything else."""
        if type(tree) is not str:
            raise CannotCrossError("not a text")
        return tree

    def items(self, tree: Any) -> list[Any]:
        """The values of a list. Raises CannotCrossError for anything else."""
        if type(tree) is not list:
            raise CannotCrossError("not a list")
        return [item if type(item) in _PLAIN else self.read(item) for item in tree]

    def pairs(self, tree: Any) -> list[tuple[Any, Any]]:
        """The pairs in a list of two-element lists. Raises CannotCrossError for anything else."""
        found = [self.items(pair) for pair in tree] if type(tree) is list else [[]]
        if any(len(pair) != 2 for pair in found):
            raise CannotCrossError("not pairs")
        return [(key, value) for key, value in found]

    def read(self, tree: Any) -> Any:
        """The value of a tree.

        Raises:
            CannotCrossError: the kind is not on the list, or the tree is malformed.
        """
        if type(tree) in _PLAIN or type(tree) is int:
            return tree
        if self._depth > DEPTH:
            raise CannotCrossError(f"a value nested more than {DEPTH} containers deep")
        self._depth += 1
        try:
            if type(tree) is list:
                return self.items(tree)
            if type(tree) is not dict or len(tree) != 1:
                raise CannotCrossError("a value without a kind")
            ((kind, parts),) = tree.items()
            make = self.stand_ins.get(kind)
            if make:
                return make(parts)
            reader = READERS.get(kind)
            if reader is None:
                from corsa.sandbox import packages

                reader = packages.READERS.get(kind)
            if reader is None:
                raise CannotCrossError("a value of a kind that is not on the list")
            return reader(self, parts)
        except CannotCrossError:
            raise
        except Exception as error:  # for example a set of lists, or a date in month 13
            raise CannotCrossError(f"a malformed value: {type(error).__name__}: {error}"[:300]) from error
        finally:
            self._depth -= 1


def encoded(value: Any, stand_in: Callable[[Any], dict[str, Any] | None] = lambda value: None) -> tuple[bytes, bytes]:
    """A value as JSON and a block of bytes. Raises CannotCrossError if it is not data."""
    writer = Writer(stand_in)
    try:
        tree = writer.write(value)
        return json.dumps(tree).encode(), b"".join(writer.blobs)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CannotCrossError(f"{type(error).__name__}: {error}"[:300]) from error


def decoded(raw: bytes, area: memoryview, stand_ins: dict[str, Callable[[Any], Any]] | None = None) -> Any:
    """The inverse of `encoded`. Raises CannotCrossError for anything that `encoded` does not write."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CannotCrossError(f"a message that is not JSON: {type(error).__name__}") from error
    return Reader(area, stand_ins).read(tree)


def _number(reader: Reader, tree: Any) -> int:
    text = reader.text(tree)
    if len(text) > _DIGITS or not re.fullmatch("-?0x[0-9a-f]+", text):
        raise CannotCrossError("not an integer")
    return int(text, 16)


def _decimal(reader: Reader, tree: Any) -> Decimal:
    text = reader.text(tree)
    if len(text) > _DIGITS:
        raise CannotCrossError(f"a number of more than {_DIGITS} digits")
    return Decimal(text)


def _timezone(reader: Reader, tree: Any) -> timezone | None:
    return None if tree is None else timezone(timedelta(*reader.integers(tree, 3)))


def _write_timezone(zone: Any) -> list[int] | None:
    if zone is not None and type(zone) is not timezone:
        raise CannotCrossError("a time zone that is not a fixed offset")
    return None if zone is None else _days(zone.utcoffset(None))


def _days(delta: timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _clock(value: datetime | time) -> list[int]:
    return [value.hour, value.minute, value.second, value.microsecond]


def _read_datetime(reader: Reader, tree: Any) -> datetime:
    *parts, zone, fold = tree
    year, month, day, *clock = reader.integers(parts, 7)
    return datetime(year, month, day, *clock, tzinfo=_timezone(reader, zone), fold=fold)


def _read_time(reader: Reader, tree: Any) -> time:
    *parts, zone, fold = tree
    hour, minute, second, micro = reader.integers(parts, 4)
    return time(hour, minute, second, micro, tzinfo=_timezone(reader, zone), fold=fold)


def _read_pattern(reader: Reader, tree: Any) -> re.Pattern[Any]:
    text, flags = reader.items(tree)
    if type(text) not in (str, bytes) or type(flags) is not int:
        raise CannotCrossError("not a regular expression")
    return re.compile(text, flags & ~re.DEBUG)


def _write_match(writer: Writer, value: re.Match[Any]) -> dict[str, Any]:
    parts = (value.re.pattern, value.re.flags, value.string, *value.span())
    return {"match": [writer.write(part) for part in parts]}


def _read_match(reader: Reader, tree: Any) -> re.Match[Any]:
    pattern, (text, start, end) = _read_pattern(reader, tree[:2]), reader.items(tree[2:])
    for found in (pattern.match(text, start), pattern.fullmatch(text, start, end)):
        if found and found.span() == (start, end):
            return found
    raise CannotCrossError("a match that does not occur in its text")


def _read_defaultdict(reader: Reader, tree: Any) -> defaultdict[Any, Any]:
    factory, pairs = tree
    return defaultdict(reader.read(factory), reader.pairs(pairs))


def _read_class(reader: Reader, tree: Any) -> type:
    return _CLASSES[reader.text(tree)]


def _write_class(writer: Writer, value: type) -> dict[str, Any] | None:
    name = f"{value.__module__}.{value.__qualname__}"
    if _CLASSES.get(name) is value:
        return {"class": name}
    from corsa.sandbox import packages

    found = writer.stand_in(value) or packages.written(writer, value)
    if found is None:
        raise CannotCrossError(f"the class {name}, which is not plain data")
    return found


def _listed(writer: Writer, values: Any) -> list[Any]:
    return [writer.write(value) for value in values]


def _paired(writer: Writer, values: Any) -> list[list[Any]]:
    return [[writer.write(key), writer.write(value)] for key, value in values.items()]


WRITERS: dict[type, Callable[[Writer, Any], Any]] = {
    tuple: lambda w, v: {"tuple": _listed(w, v)},
    dict: lambda w, v: {"dict": _paired(w, v)},
    set: lambda w, v: {"set": _listed(w, v)},
    frozenset: lambda w, v: {"frozenset": _listed(w, v)},
    bytes: lambda w, v: {"bytes": w.blob(v)},
    bytearray: lambda w, v: {"bytearray": w.blob(bytes(v))},
    complex: lambda w, v: {"complex": [v.real, v.imag]},
    range: lambda w, v: {"range": _listed(w, (v.start, v.stop, v.step))},
    slice: lambda w, v: {"slice": _listed(w, (v.start, v.stop, v.step))},
    Counter: lambda w, v: {"Counter": _paired(w, v)},
    OrderedDict: lambda w, v: {"OrderedDict": _paired(w, v)},
    defaultdict: lambda w, v: {"defaultdict": [w.write(v.default_factory), _paired(w, v)]},
    deque: lambda w, v: {"deque": [v.maxlen, _listed(w, v)]},
    date: lambda w, v: {"date": [v.year, v.month, v.day]},
    time: lambda w, v: {"time": [*_clock(v), _write_timezone(v.tzinfo), v.fold]},
    datetime: lambda w, v: {"datetime": [v.year, v.month, v.day, *_clock(v), _write_timezone(v.tzinfo), v.fold]},
    timedelta: lambda w, v: {"timedelta": _days(v)},
    timezone: lambda w, v: {"timezone": _write_timezone(v)},
    Decimal: lambda w, v: {"Decimal": str(v)},
    Fraction: lambda w, v: {"Fraction": _listed(w, (v.numerator, v.denominator))},
    re.RegexFlag: lambda w, v: {"RegexFlag": int(v)},
    re.Pattern: lambda w, v: {"pattern": [w.write(v.pattern), v.flags]},
    re.Match: _write_match,
    types.MappingProxyType: lambda w, v: {"mapping": _paired(w, v)},
}
"""Writer of each class of the standard library."""

READERS: dict[str, Callable[[Reader, Any], Any]] = {
    "int": _number,
    "tuple": lambda r, t: tuple(r.items(t)),
    "dict": lambda r, t: dict(r.pairs(t)),
    "set": lambda r, t: set(r.items(t)),
    "frozenset": lambda r, t: frozenset(r.items(t)),
    "bytes": lambda r, t: bytes(r.blob(t)),
    "bytearray": lambda r, t: bytearray(r.blob(t)),
    "complex": lambda r, t: complex(*(float(part) for part in r.items(t))),
    "range": lambda r, t: range(*r.items(t)),
    "slice": lambda r, t: slice(*r.items(t)),
    "Counter": lambda r, t: Counter(dict(r.pairs(t))),
    "OrderedDict": lambda r, t: OrderedDict(r.pairs(t)),
    "defaultdict": _read_defaultdict,
    "deque": lambda r, t: deque(r.items(t[1]), r.read(t[0])),
    "date": lambda r, t: date(*r.integers(t, 3)),
    "time": _read_time,
    "datetime": _read_datetime,
    "timedelta": lambda r, t: timedelta(*r.integers(t, 3)),
    "timezone": _timezone,
    "Decimal": _decimal,
    "Fraction": lambda r, t: Fraction(*r.items(t)),
    "RegexFlag": lambda r, t: re.RegexFlag(t),
    "pattern": _read_pattern,
    "match": _read_match,
    "mapping": lambda r, t: types.MappingProxyType(dict(r.pairs(t))),
    "class": _read_class,
}
"""Reader of each kind."""
