"""Repairs the journal of a study (one JSON line per change) after a full disk or a lost node."""

from __future__ import annotations

import json
import os
from pathlib import Path

from optuna.storages.journal import JournalFileSymlinkLock

from corsa.errors import CorsaError


def mended(file: Path) -> str | None:
    """Remove the last line of a journal if it is incomplete: otherwise the next entry would be appended to it.

    Returns:
        A message on the repair; None if the journal is intact or absent.

    Raises:
        CorsaError: an earlier line is broken. This is no incomplete write, and later lines may depend on it.
    """
    if not file.exists():
        return None
    lines = file.read_bytes().split(b"\n")
    *whole, rest = lines  # the rest of an intact journal is empty
    broken = next((number for number, line in enumerate(whole, 1) if not _is_entry(line)), None)
    if broken is None and not rest:
        return None
    last = broken or len(lines)
    if last < len(whole) or (broken and rest):
        raise CorsaError(
            f"the journal {file} is broken in line {last} of {len(whole)}: bring it back from a copy, or give this "
            "sweep a --study name of its own"
        )
    lock = JournalFileSymlinkLock(str(file))  # Optuna holds this lock while it appends
    lock.acquire()
    try:
        os.truncate(file, sum(len(line) + 1 for line in lines[: last - 1]))
    finally:
        lock.release()
    return f"the journal {file} was cut in its last line, {last}: the sweep goes on without that entry"


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int)
