"""The file system of a program: a read-only Python, four devices, and nothing else of the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from corsa.sandbox.kernel import (
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    bind_device,
    bind_read_only,
    enter_root,
    mount,
)

DEVICES = ("null", "full", "random", "urandom")
"""Without /dev/zero: its shared pages stay when no process maps them, and are counted for no process."""
CODE = "/sandbox"
"""Path of the sandbox's own code inside."""
_STAGES = ("/mnt", "/tmp", "/var/tmp", "/srv", "/opt", "/run")


def python_places() -> list[str]:
    """Files and directories that Python needs: the interpreter, its packages, the system's shared libraries."""
    places = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        places += [f"{prefix}/{part}" for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    return [place for place in dict.fromkeys(places) if os.path.lexists(place)]


def code_places() -> dict[str, str]:
    """Paths of the sandbox's own code: outside -> inside."""
    own = Path(__file__).resolve().parent
    return {str(place): f"{CODE}/{place.relative_to(own.parents[1])}" for place in (own.parent / "__init__.py", own)}


def build_root() -> None:
    """Build a root file system and enter it. This process must be alone in its mount namespace."""
    places = python_places()
    # Use a directory that contains none of the sources. Only this process sees the mount.
    sources = [*places, *code_places()]
    stage = next(s for s in _STAGES if os.path.isdir(s) and not any(p.startswith(f"{s}/") for p in sources))
    mount("none", stage, "tmpfs", data="size=4m,mode=0755")
    for place in places:
        _show(place, stage, places)
    for place, inside in code_places().items():
        target = Path(stage + inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(place):
            target.mkdir()
        else:
            target.touch()
        bind_read_only(place, str(target))
    for name in ("tmp", "proc", "dev"):
        Path(stage, name).mkdir(exist_ok=True)
    for name in DEVICES:
        target = Path(stage, "dev", name)
        target.touch()
        bind_device(f"/dev/{name}", str(target))
    Path(stage, "dev/shm").symlink_to("/tmp")
    mount("proc", f"{stage}/proc", "proc")
    enter_root(stage)
    # The root belongs to the sandbox's user. A program could write there, and a later program would find it.
    mount("none", "/", flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID)


def private_directory(size: int | str) -> None:
    """Mount an empty /tmp of at most `size` bytes. If Python is installed below /tmp, bind it into the new one."""
    hidden = [p for p in python_places() if p.startswith("/tmp/") and not os.path.islink(p)]
    files = [os.open(place, os.O_PATH) for place in hidden]
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=0700")
    for place, file in zip(hidden, files, strict=True):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{file}"):
            os.mkdir(place)
        else:
            Path(place).touch()
        mount(f"/proc/self/fd/{file}", place, flags=MS_BIND | MS_REC)
        os.close(file)


def hide_processes() -> None:
    """Replace /proc by one with only `cpuinfo`, which numeric libraries read."""
    file = os.open("/proc/cpuinfo", os.O_PATH)
    self_ = os.open("/proc/self/fd", os.O_PATH)
    mount("none", "/proc", "tmpfs", data="size=4k,nr_inodes=4,mode=0555")
    Path("/proc/cpuinfo").touch()
    os.fchdir(self_)
    mount(str(file), "/proc/cpuinfo", flags=MS_BIND)
    os.chdir("/")
    os.close(file)
    os.close(self_)


def _show(place: str, stage: str, places: list[str]) -> None:
    target = Path(stage + place)
    if target.exists() or target.is_symlink():
        return  # inside a directory that is already bound
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.islink(place):
        target.symlink_to(os.readlink(place))
        real = os.path.realpath(place)
        if real not in places:
            _show(real, stage, places)
        return
    if os.path.isdir(place):
        target.mkdir()
    else:
        target.touch()
    bind_read_only(place, str(target))


def bubblewrap(tool: str, environment: Mapping[str, str]) -> list[str]:
    """The bubblewrap command that runs the words after it in the same root file system."""
    words = [tool, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    if os.geteuid() != 0:
        words += ["--unshare-user"]
    words += [
        "--cap-add",
        "ALL",
        "--clearenv",
        "--proc",
        "/proc",
        "--perms",
        "0755",
        "--dir",
        "/dev",
        "--tmpfs",
        "/tmp",
    ]
    for name in DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    words += ["--symlink", "/tmp", "/dev/shm"]
    links = [place for place in python_places() if os.path.islink(place)]
    real = dict.fromkeys(os.path.realpath(p) if os.path.islink(p) else p for p in python_places())
    shown = {place: place for place in real} | code_places()
    parents = dict.fromkeys(str(p) for place in shown.values() for p in reversed(Path(place).parents[:-1]))
    for parent in parents:  # bubblewrap would make them with mode 0700
        words += ["--perms", "0755", "--dir", parent]
    for place, inside in shown.items():
        words += ["--ro-bind", place, inside]
    for place in links:
        words += ["--symlink", os.readlink(place), place]
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return [*words, "--remount-ro", "/", "--chdir", "/", "--"]
