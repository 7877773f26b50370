"""Checks names from a record, a file or an option before anything is read or written under them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from corsa.errors import CorsaError

_PART = re.compile(r"(?!\.{1,2}$)[^/\\:\x00-\x1f\x7f]{1,255}")


def part(name: str) -> str:
    """The name, if it is one part of a path. Raises `ValueError` if it is not, or could lead elsewhere.

    >>> part("3f2a9c")
    '3f2a9c'
    """
    if not _PART.fullmatch(name) or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is not the name of a file or folder")
    return name


@lru_cache(maxsize=4096)  # the steps of a store have the same names
def relative(name: str) -> str:
    """The name, if it is a path below a folder. Raises `ValueError` if it is absolute, has `..` or is no path.

    >>> relative("adapter/adapter_config.json")
    'adapter/adapter_config.json'
    """
    try:
        return "/".join(part(one) for one in name.split("/"))
    except ValueError:
        raise ValueError(f"{name[:80]!r} is not the name of a file in a folder") from None


def below(root: Path, name: str) -> Path:
    """The path `name` below `root`, with links resolved. Raises `CorsaError` if it leads elsewhere."""
    try:
        found = (root / relative(name)).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise CorsaError(f"{root}: {error}") from error
    if not found.is_relative_to(root.resolve()):
        raise CorsaError(f"{root}/{name} leads out of {root}, to {found}: a link there was not made by this project")
    return found
