"""The journal of a study, one line of JSON for each change, after a full disk or a lost node."""

from __future__ import annotations

import json
import os
from pathlib import Path

from optuna.storages.journal import JournalFileSymlinkLock

from corsa.errors import CorsaError


def mended(file: Path) -> str | None:
    """Take away the last line of a journal if it was cut while it was written: what is added would join it.

    Returns:
        What was done, for a person; None if the journal is whole, or there is none.

    Raises:
        CorsaError: an earlier line is broken. That was not cut, and what follows may rest on it.
    """
    if not file.exists():
        return None
    lines = file.read_bytes().split(b"\n")
    *whole, rest = lines  # of a whole journal the rest is empty
    broken = next((number for number, line in enumerate(whole, 1) if not _is_entry(line)), None)
    if broken is None and not rest:
        return None
    last = broken or len(lines)
    if last < len(whole) or (broken and rest):
        raise CorsaError(
            f"the journal {file} is broken in line {last} of {len(whole)}: bring it back from a copy, or give this "
            "sweep a --study name of its own"
        )
    lock = JournalFileSymlinkLock(str(file))  # the one that Optuna holds while it adds to it
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
