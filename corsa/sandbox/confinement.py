"""What is taken from a process before it runs a program or its tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from typing import Any

from corsa.sandbox import kernel, rooting, syscalls

OWN_PROCESSES = 8
"""Processes of the sandbox itself, which count as its user's as well."""
UNCONFINED = b"unconfined"
"""In place of an exit status: the process did not become one that may run anything."""


def confine(limits: Mapping[str, Any]) -> None:
    """A mount namespace with an empty directory of bounded size, no view of processes, no privilege, no key, a filter
    of system calls.
    """
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
    rooting.private_directory(limits["disk"])
    rooting.hide_processes()
    os.chdir("/tmp")
    kernel.new_keyring()
    kernel.drop_privileges()
    syscalls.restrict()


def bound(limits: Mapping[str, Any], held: int) -> None:
    """Bound what this process and its children use. `held`: bytes of address space that the interpreter has already."""
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
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def keep_files(*files: int) -> None:
    """Close all else: who holds an end of a pipe keeps the other side waiting, and could write to it."""
    before = 2
    for file in (*sorted(files), 4096):
        os.closerange(before + 1, file)
        before = file


def empty_environment() -> None:
    """Nothing of the machine's environment reaches a program."""
    for name in list(os.environ):
        del os.environ[name]
