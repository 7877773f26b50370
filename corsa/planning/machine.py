"""How much memory there is: of this machine's GPUs, or of the machine. Imports torch only where there is a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

from corsa.errors import CorsaError


def memory_here(gpu: bool) -> int | None:
    """Bytes of the smallest of this machine's GPUs, or of its memory; None where there is no GPU, or none is known."""
    if not gpu:
        return _allowed() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=None)


def _allowed() -> int | None:
    """What the container may use, where it is in one that is bounded."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None


_UNITS: dict[str, int] = {"": 2**30, "gib": 2**30, "gb": 10**9, "g": 2**30, "mib": 2**20, "mb": 10**6, "tib": 2**40}


def as_bytes(text: str, option: str) -> int:
    """Bytes of "48GiB", "80GB" or "48" (GiB).

    Raises:
        CorsaError: it is no amount of memory.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit or float(found[1]) == 0:
        raise CorsaError(f"{option} {text}: give an amount of memory such as 48GiB, 80GB or 24 (GiB)")
    return int(float(found[1]) * unit)
