"""Peak memory of a step on a worker: allocated by torch on a GPU, resident set size on the CPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """Reset the peak to the memory held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_since(device: torch.device) -> int | None:
    """Peak bytes of this process since `start_peak`: `torch.cuda.max_memory_allocated` on a GPU, the largest resident
    set on the CPU. None where the system does not report it.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (peak). None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
