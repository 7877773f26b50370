"""Makes texts from a sandbox safe for tables, files and terminals. Every such text passes through here."""

from __future__ import annotations

import unicodedata
from typing import Any

_KEPT = "\n\t"
_REPLACED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that no message needs: control, format, surrogate, private use, unassigned, separators."""


def clean(text: Any, most: int) -> str:
    r"""The first `most` characters of a text. All of the categories above become U+FFFD, except line feed and tab.

    A value that is not a string becomes "".

    >>> clean("red \x1b[31m \ud800", 50) == "red \ufffd[31m \ufffd"
    True
    """
    if not isinstance(text, str):
        return ""
    return "".join("\ufffd" if unicodedata.category(c) in _REPLACED and c not in _KEPT else c for c in str(text[:most]))
