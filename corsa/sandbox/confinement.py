"""Takes privileges from a process, and sets its limits, before it runs a program or its tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from typing import Any

from corsa.sandbox import kernel, rooting, syscalls

OWN_PROCESSES = 8
"""Processes of the sandbox itself. The kernel counts them for the same user."""
UNCONFINED = b"unconfined"
"""Written instead of an exit status if a process could not be confined, so it ran nothing."""


def confine(limits: Mapping[str, Any]) -> None:
    """Confine this process: a mount namespace with an empty directory of bounded size, no view of processes, no
    privileges, no keys, and the system call filter.
    """
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
    rooting.private_directory(limits["disk"])
    rooting.hide_processes()
    os.chdir("/tmp")
    kernel.new_keyring()
    kernel.drop_privileges()
    syscalls.restrict()


def bound(limits: Mapping[str, Any], held: int) -> None:
    """Set the limits of this process and its children. `held`: bytes of address space that it already uses."""
    cpu, memory = int(limits["cpu_s"]), held + int(limits["memory"])
    bounds = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_NPROC: (int(limits["processes"]) + OWN_PROCESSES,) * 2,
        resource.RLIMIT_FSIZE: (int(limits["file"]),) * 2,
        resource.RLIMIT_NOFILE: (int(limits["files"]),) * 2,
        resource.RLIMIT_SIGPENDING: (256, 256),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for kind, values in bounds.items():
        hard = resource.getrlimit(kind)[1]
        fitting = [v if hard == resource.RLIM_INFINITY else min(v, hard) for v in values]
        resource.setrlimit(kind, (fitting[0], fitting[1]))


def address_space() -> int:
    """Size of this process's address space in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def keep_files(*files: int) -> None:
    """Close all other files above 2. An open end of a pipe would delay its other side, and could be written to."""
    before = 2
    for file in (*sorted(files), 4096):
        os.closerange(before + 1, file)
        before = file


def empty_environment() -> None:
    """Delete all environment variables."""
    for name in list(os.environ):
        del os.environ[name]
