"""A memory cgroup for a sandbox: the kernel's limit, in addition to the supervisor's count.

It needs cgroups of version 2 with a delegated memory controller: systemd's `Delegate=yes`, a container with a writable
cgroup file system, or root.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

_SLACK = 256 << 20
"""Bytes added for the supervisor, the kernel and the disk of a program."""


def own_group(root: Path = Path("/")) -> Path | None:
    """The directory of this process's version 2 cgroup; None if it has none."""
    with suppress(OSError, StopIteration):
        mounts = (line.split() for line in (root / "proc/self/mounts").read_text().splitlines())
        where = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line[3:] for line in groups if line.startswith("0::"))
        return root / where.lstrip("/") / own.lstrip("/")
    return None


class Group:
    """The cgroup of one sandbox. `procs`: its `cgroup.procs`, open for writing, through which a process joins it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.procs = os.open(place / "cgroup.procs", os.O_WRONLY)

    def bound(self, memory: int) -> None:
        """Limit it to its present memory plus `memory` bytes. Raises OSError if the kernel refuses."""
        held = int((self.place / "memory.current").read_text())
        with suppress(OSError):  # a kernel without swap has no such file
            (self.place / "memory.swap.max").write_text("0")
        (self.place / "memory.max").write_text(str(held + memory + _SLACK))

    def close(self) -> None:
        """Remove the cgroup. Its processes must have ended."""
        os.close(self.procs)
        with suppress(OSError):
            self.place.rmdir()


def make(root: Path = Path("/")) -> Group | None:
    """A new cgroup below or beside this process's own, with the memory controller; None if none can be made."""
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
    """Move this process into the cgroup of an open `cgroup.procs`. Raises OSError if the kernel refuses."""
    os.write(procs, b"0")
    os.close(procs)
