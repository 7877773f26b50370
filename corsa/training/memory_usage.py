"""How much memory a step of a worker took at most: of its GPU what torch had allocated, else what was resident."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


def start_peak(device: torch.device) -> None:
    """The peak begins anew from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_since(device: torch.device) -> int | None:
    """Bytes held at most since `start_peak` by this process: on a GPU `torch.cuda.max_memory_allocated`, on the CPU the
    largest resident set; None where the system does not say.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int | None:
    """Bytes of this process by a field of /proc/self/status: VmRSS now, VmHWM at most; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
