"""How the supervisor gets into a sandbox: namespaces, a root, a user who rules over nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from corsa.sandbox import kernel, rooting

USER = 1000
"""The one user of a sandbox; outside it is an unprivileged one of the sandbox's own."""
NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def enter(engine: str, owner: int) -> None:
    """Go on inside. `engine`: namespaces, bubblewrap (which has built the root), or none, which changes nothing.

    `owner`: the user outside, where this process is root's; 0: the user of this process.
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
    """Go on in a child, the first process of the new process namespace; this one passes its end on."""
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
    """Go on in a child that is the unprivileged user `owner` outside, and rules over nothing but its own namespaces.

    The network namespace is a new one as well: that of bubblewrap has a loopback that is up.
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
    kernel.die_with_parent()  # a change of user takes it off
    _in_child(_own_processes)


def _own_processes() -> None:
    """See the processes of this namespace alone."""
    kernel.mount("none", "/", flags=kernel.MS_PRIVATE | kernel.MS_REC)
    rooting.private_directory("4m")  # some modules want one to be loaded
    with suppress(OSError):  # not where bubblewrap covers parts of /proc; its own shows the sandbox alone as well
        kernel.mount("proc", "/proc", "proc")
    # Whoever could make user namespaces would have a larger part of the kernel to attack.
    with suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
