"""Moves the supervisor into a sandbox: namespaces, a root file system, an unprivileged user."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from corsa.sandbox import kernel, rooting

USER = 1000
"""The only user inside a sandbox. Outside it is an unprivileged user that differs for each sandbox."""
NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def enter(engine: str, owner: int) -> None:
    """Enter the sandbox. `engine`: namespaces, bubblewrap (which has already built the root), or none (no isolation).

    `owner`: the user outside, if this process is root. 0 means the user of this process.
    """
    kernel.new_keyring()
    if engine == "namespaces":
        _isolate()
        _in_child(rooting.build_root)
    if engine != "none":
        _become(owner)


def _isolate() -> None:
    if os.geteuid() == 0:
        kernel.unshare(NAMESPACES)
    else:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(NAMESPACES | kernel.CLONE_NEWUSER)
        _map("self", 0, user, group)
    kernel.mount("none", "/", flags=kernel.MS_PRIVATE | kernel.MS_REC)


def _map(process: str, inside: int, user: int, group: int) -> None:
    with suppress(OSError):
        Path(f"/proc/{process}/setgroups").write_text("deny")
    Path(f"/proc/{process}/uid_map").write_text(f"{inside} {user} 1")
    Path(f"/proc/{process}/gid_map").write_text(f"{inside} {group} 1")


def _in_child(first: Callable[[], None]) -> None:
    """Continue in a child, the first process of the new process namespace. This process exits with its status."""
    child = os.fork()
    if child:
        _pass_on(child)
    kernel.die_with_parent()
    first()


def _pass_on(child: int) -> NoReturn:
    for held in (0, 1, 2):
        with suppress(OSError):
            os.close(held)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _become(owner: int) -> None:
    """Continue in a child that is the unprivileged user `owner` outside and has privileges only in its own namespaces.

    It also gets a new network namespace, because the loopback is up in that of bubblewrap.
    """
    parent_ready, child_ready = os.pipe(), os.pipe()
    root = os.geteuid() == 0 and owner != 0
    child = os.fork()
    if child:
        os.read(child_ready[0], 1)
        user, group = (owner, owner) if root else (os.geteuid(), os.getegid())
        _map(str(child), USER, user, group)
        os.write(parent_ready[1], b"x")
        _pass_on(child)
    kernel.die_with_parent()
    if root:
        os.setgroups([])
    kernel.unshare(
        kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
    )
    os.write(child_ready[1], b"x")
    os.read(parent_ready[0], 1)
    for end in (*parent_ready, *child_ready):
        os.close(end)
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    kernel.die_with_parent()  # the change of user has reset it
    _in_child(_own_processes)


def _own_processes() -> None:
    """Mount a /proc that shows only the processes of this namespace."""
    kernel.mount("none", "/", flags=kernel.MS_PRIVATE | kernel.MS_REC)
    rooting.private_directory("4m")  # some modules need a /tmp when they load
    with suppress(OSError):  # refused if bubblewrap covers parts of /proc; its own /proc also shows only the sandbox
        kernel.mount("proc", "/proc", "proc")
    # A user namespace would give a program a larger part of the kernel to attack.
    with suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
