"""Cells of a table that hold more than a text: JSON, a printed Python list, or texts with bars between them.

A list in a cell is never read as one text without saying so: JSON is read, and a list as Python prints it is refused.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from corsa.data.benchmarks.files import key_given_twice, parsed
from corsa.data.edit import FieldError
from corsa.data.text import shown

_LIST = re.compile(r"""\s*\[\s*['"].*\]\s*$""", re.DOTALL)
"""A list of strings, as JSON or Python writes it."""

_REMEDY = "write JSON (pandas: df[{0!r}] = df[{0!r}].map(json.dumps) before to_csv), or put a bar between items: a | b"


def structured(value: Any, column: str) -> Any:
    """The JSON list, object or string in a cell, or else the value itself. None for null and NaN, which `json.dumps`
    writes for a missing value.

    Raises:
        FieldError: the cell is a list, tuple, set or dict as Python, NumPy or pandas prints it, or JSON in which an
            object gives a key twice.
    """
    if not isinstance(value, str):
        return value
    cell = value.strip()
    if cell in ("null", "NaN"):
        return None
    if cell[:1] in ("[", "{", '"'):
        try:
            found, repeated = parsed(cell)
        except ValueError:
            pass
        else:
            if repeated:
                raise FieldError(column, f"{shown(str(key_given_twice(found)))} is given twice", "give each key once")
            return found
    if printed(cell):
        raise FieldError(column, f"is a Python list, no JSON: {shown(cell)}", _REMEDY.format(column))
    return value


def texts(value: Any, column: str) -> list[Any]:
    """The items of a list, or of a cell: a JSON list, a JSON string, or texts with bars between them.

    Raises:
        FieldError: the value is not a list, or an item is a list itself.
    """
    found = structured(value, column)
    if found is None:
        return []
    if isinstance(found, str) and found == value:
        if found.strip()[:1] == "[" and found.strip()[-1:] == "]":
            raise FieldError(column, f"stands in brackets, but is no JSON list: {shown(found)}", _REMEDY.format(column))
        found = [text for item in re.split(r"[|\uff5c]", found) if (text := item.strip())]
    items = [found] if isinstance(found, str) else found
    if not isinstance(items, list | tuple):
        raise FieldError(column, f"is not a list but {shown(repr(found))}", _REMEDY.format(column))
    for index, item in enumerate(items):
        if isinstance(item, str) and lists(item):
            raise FieldError(f"{column}[{index}]", f"is a list in a list: {shown(item)}", "give each text as an item")
    return list(items)


def lists(text: str) -> bool:
    """Whether a text is a list of strings, as JSON or Python writes it."""
    return _LIST.match(text) is not None


def printed(cell: str) -> bool:
    """Whether a text is the printed form of a list, tuple, set or dict in Python, NumPy or pandas."""
    if (cell[:1], cell[-1:]) not in (("[", "]"), ("(", ")"), ("{", "}")):
        return re.match(r"\w+\([\[({].*\)$", cell, re.DOTALL) is not None  # array([...]), deque([...])
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return re.match(r"""\[\s*['"]""", cell) is not None  # a truncated list, or a printed NumPy array
    return isinstance(value, list | tuple | set | dict)
