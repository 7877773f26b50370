"""Texts that come out of a sandbox, made fit for tables, files and terminals. Every one of them passes through here."""

from __future__ import annotations

import unicodedata
from typing import Any

_KEPT = "\n\t"
_REPLACED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode that no message needs: controls, marks of direction, surrogates, private and unassigned."""


def clean(text: Any, most: int) -> str:
    r"""At most `most` characters of a text, each printable, a line feed or a tab; others become U+FFFD.

    What is no text becomes "".

    >>> clean("red \x1b[31m \ud800", 50) == "red \ufffd[31m \ufffd"
    True
    """
    if not isinstance(text, str):
        return ""
    return "".join("\ufffd" if unicodedata.category(c) in _REPLACED and c not in _KEPT else c for c in str(text[:most]))
