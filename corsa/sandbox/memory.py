"""Memory used by several processes together, each page counted once."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_QUICK = ("RssAnon:", "VmSwap:")
_EXACT = ("Pss_Anon:", "SwapPss:")


def processes(without: Collection[int]) -> list[int]:
    """The processes of this process namespace, except those in `without`."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in without]


def held(who: Collection[int], most: int) -> int:
    """Bytes of anonymous memory of some processes together. Exact if it may exceed `most`, else an upper bound.

    Pages shared after a fork count once, divided among the processes that map them. Memory that belongs to no process
    is not counted. The system call filter prevents it.
    """
    quick = sum(_sum(f"/proc/{process}/status", _QUICK) for process in who)
    if quick <= most:
        return quick
    return sum(_sum(f"/proc/{process}/smaps_rollup", _EXACT) for process in who)


def _sum(place: str, fields: tuple[str, ...]) -> int:
    with suppress(OSError):  # the process has ended
        lines = Path(place).read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(fields))
    return 0
