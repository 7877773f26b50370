"""How much memory processes hold together, each page counted once."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_QUICK = ("RssAnon:", "VmSwap:")
_EXACT = ("Pss_Anon:", "SwapPss:")


def processes(without: Collection[int]) -> list[int]:
    """The processes of this process namespace, but some."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in without]


def held(who: Collection[int], most: int) -> int:
    """Bytes of memory without a file that some processes hold in all; exact where it may be above `most`.

    Pages that a fork shares with what it was forked from count once, divided among those that map them. Memory that
    belongs to no process is not counted here: the filter of system calls leaves none to be had.
    """
    quick = sum(_sum(f"/proc/{process}/status", _QUICK) for process in who)
    if quick <= most:
        return quick
    return sum(_sum(f"/proc/{process}/smaps_rollup", _EXACT) for process in who)


def _sum(place: str, fields: tuple[str, ...]) -> int:
    with suppress(OSError):  # it has ended
        lines = Path(place).read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(fields))
    return 0
