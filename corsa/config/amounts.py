"""Amounts of memory as a person writes them."""

from __future__ import annotations

import re

from corsa.errors import CorsaError

_UNITS: dict[str, int] = {"": 2**30, "gib": 2**30, "gb": 10**9, "g": 2**30, "mib": 2**20, "mb": 10**6, "tib": 2**40}


def as_bytes(text: str, option: str) -> int:
    """Bytes of "48GiB", "80GB" or "48" (GiB).

    Raises:
        CorsaError: the text is not an amount of memory.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit or float(found[1]) == 0:
        raise CorsaError(f"{option} {text}: give an amount of memory such as 48GiB, 80GB or 24 (GiB)")
    return int(float(found[1]) * unit)
