"""The memory of this machine's GPUs, or of the machine. Imports torch only if there is a GPU."""

from __future__ import annotations

import os
from pathlib import Path


def memory_here(gpu: bool) -> int | None:
    """Bytes of this machine's smallest GPU, or of its memory; None if there is no GPU, or the size is unknown."""
    if not gpu:
        return _allowed() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=None)


def _allowed() -> int | None:
    """The memory limit of the container, if there is one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None
