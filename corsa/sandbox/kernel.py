"""System calls missing in the standard library of Python 3.11: namespaces, mounts, capabilities."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC = 32, 1024, 2048, 4096, 16384
MS_PRIVATE, MS_RELATIME = 1 << 18, 1 << 21
_MNT_DETACH = 2
_LOCKED = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME | MS_RELATIME

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 28, 38, 47
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_SECBITS = 0b101111  # root has no capabilities, none are kept on a change of user; both locked

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    """Create namespaces for this process (a pid namespace applies to its children)."""
    _checked(_libc.unshare(flags), "unshare")


def setns(file: int, kind: int) -> None:
    """Enter the namespace of an open file of /proc/PID/ns (a pid namespace applies to the children)."""
    _checked(_libc.setns(file, kind), "setns")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str = "") -> None:
    """The system call `mount`. Raises OSError."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    found = _libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(data))
    _checked(found, f"mount {kind or source} on {target}")


def bind_read_only(source: str, target: str) -> None:
    """Bind the file or directory `source` read-only at `target`, which must exist."""
    try:
        mount(source, target, flags=MS_BIND)
    except OSError:  # an unprivileged user must include the mounts below it
        mount(source, target, flags=MS_BIND | MS_REC)
    kept = os.statvfs(target).f_flag & _LOCKED  # an unprivileged user must keep these flags
    mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def bind_device(source: str, target: str) -> None:
    """Bind a device such as /dev/null at `target`, which must exist."""
    mount(source, target, flags=MS_BIND)


def enter_root(root: str) -> None:
    """Make the mount `root` this process's root file system and unmount the old one."""
    os.chdir(root)
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")


def undumpable() -> None:
    """Prevent other processes of the same user from reading this one."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def _last_capability() -> int:
    place = Path("/proc/sys/kernel/cap_last_cap")
    return int(place.read_text()) if place.exists() else 40


def keep_privileges() -> None:
    """Keep this process's capabilities when it executes a file (ambient capabilities)."""
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    _checked(_libc.capget(ctypes.byref(header), ctypes.byref(sets)), "capget")
    for part in sets:
        part.inheritable = part.permitted
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(sets)), "capset")
    for capability in range(_last_capability() + 1):
        _libc.prctl(_PR_CAP_AMBIENT, 2, capability, 0, 0)  # fails for capabilities it does not have


def new_keyring() -> None:
    """Replace the inherited session keyring by a new one. Does nothing if an outer system call filter denies keys."""
    number = _KEYCTL.get(platform.machine())
    if number is not None:
        _libc.syscall(number, 1, None)


def drop_privileges() -> None:
    """Drop all capabilities, so that executing a file cannot regain them."""
    for capability in range(_last_capability() + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails if there is none to drop
    _libc.prctl(_PR_SET_SECUREBITS, _SECBITS, 0, 0, 0)
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(sets)), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
