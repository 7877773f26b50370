"""A memory cgroup for a sandbox, where one may be made: the kernel's own bound, behind the supervisor's count.

Only version 2, and only where the memory controller is delegated: systemd's `Delegate=yes`, a container with a writable
cgroup file system, or root.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

_SLACK = 256 << 20
"""Bytes beside the programs' own: what the supervisor, the kernel and a program's disk take."""


def own_group(root: Path = Path("/")) -> Path | None:
    """The directory of this process's cgroup of version 2; None where there is none."""
    with suppress(OSError, StopIteration):
        mounts = (line.split() for line in (root / "proc/self/mounts").read_text().splitlines())
        where = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))
        return root / where.lstrip("/") / own.lstrip("/")
    return None


class Group:
    """A cgroup of a sandbox's own. `procs`: the file through which a process joins it, open for writing."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.procs = os.open(place / "cgroup.procs", os.O_WRONLY)

    def bound(self, memory: int) -> None:
        """Let what is in it now take `memory` bytes more. Raises OSError where the kernel refuses."""
        held = int((self.place / "memory.current").read_text())
        with suppress(OSError):  # a kernel without swap has no such file
            (self.place / "memory.swap.max").write_text("0")
        (self.place / "memory.max").write_text(str(held + memory + _SLACK))

    def close(self) -> None:
        """Take the cgroup away; its processes have ended."""
        os.close(self.procs)
        with suppress(OSError):
            self.place.rmdir()


def make(root: Path = Path("/")) -> Group | None:
    """A new cgroup beside or below this process's own, with the memory controller; None where none can be had."""
    own = own_group(root)
    for parent in (own, own and own.parent):
        if parent is None:
            continue
        place = parent / f"corsa-sandbox-{secrets.token_hex(8)}"
        made = False
        try:
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                continue
            place.mkdir()
            made = True
            return Group(place)
        except OSError:
            if made:
                place.rmdir()
    return None


def join(procs: int) -> None:
    """Put this process into the cgroup of an open `cgroup.procs`. Raises OSError where the kernel refuses."""
    os.write(procs, b"0")
    os.close(procs)
