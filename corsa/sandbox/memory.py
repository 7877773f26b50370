"""Memory used by several processes together, each page counted once."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_QUICK = ("RssAnon:", "VmSwap:")
_EXACT = ("Pss_Anon:", "SwapPss:")
_TRIES, _HIDDEN = 8, 1 << 60
"""If the threads of a process change this often while they are read, it counts as using all memory."""


def processes(without: Collection[int]) -> list[int]:
    """The processes of this process namespace, except those in `without`."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in without]


def held(who: Collection[int], most: int) -> int:
    """Bytes of anonymous memory of some processes together. Exact if it may exceed `most`, else an upper bound.

    Pages shared after a fork count once, divided among the processes that map them. Memory that belongs to no process
    is not counted. The system call filter prevents it.
    """
    quick = sum(_of(process, "status", _QUICK) for process in who)
    if quick <= most:
        return quick
    return sum(_of(process, "smaps_rollup", _EXACT) for process in who)


def _of(process: int, file: str, fields: tuple[str, ...]) -> int:
    found = _sum(f"/proc/{process}/{file}", fields)
    return _of_threads(process, file, fields) if found is None else found


def _of_threads(process: int, file: str, fields: tuple[str, ...]) -> int:
    """Bytes of a process whose first thread has ended: the kernel then shows its memory only at its other threads."""
    seen: set[str] = set()
    for _ in range(_TRIES):
        try:
            new = set(os.listdir(f"/proc/{process}/task")) - seen
        except OSError:
            new = set()
        if not new:  # all threads have ended
            return 0
        for thread in new:
            found = _sum(f"/proc/{process}/task/{thread}/{file}", fields)
            if found is not None:
                return found
        seen |= new
    return _HIDDEN


def _sum(place: str, fields: tuple[str, ...]) -> int | None:
    """Bytes in these fields of a file; None if there are none, because the process or thread has ended."""
    try:
        lines = [line for line in Path(place).read_text().splitlines() if line.startswith(fields)]
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines) if lines else None
