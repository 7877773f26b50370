"""A process that has loaded Python and its modules, and forks one process for each program. It never reads a request.

There are two of them in a sandbox, each started by executing Python anew: one whose forks run programs, one whose forks
run tests. So no program's memory ever held tests or another program, and a program knows no address of its tests'.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from corsa.sandbox import kernel, syscalls
from corsa.sandbox.confinement import UNCONFINED, address_space, bound, confine, keep_files
from corsa.sandbox.program import run_program
from corsa.sandbox.test_runner import examine

_CONTROL = 0
"""The descriptor of the socket to the supervisor."""
_MOST = 4096
"""Bytes of a message from the supervisor at most; what is long lies in a file whose descriptor comes with it."""


def main() -> NoReturn:
    """Load, then fork on demand: `ROLE MODULES ISOLATED`. One program at a time."""
    role, modules, isolated = sys.argv[1], [m for m in sys.argv[2].split(",") if m], sys.argv[3] == "1"
    kernel.die_with_parent()
    control = socket.socket(fileno=os.dup(_CONTROL))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    for module in modules:
        with suppress(Exception):  # programs that need it will say so
            import_module(module)
    syscalls.prepare()
    gc.collect()
    gc.freeze()  # forks share the pages of what is loaded
    own = os.open("/proc/self/ns/pid", os.O_RDONLY) if isolated else -1
    held = address_space()
    control.send(b"ready")
    while True:
        raw, files, _, _ = socket.recv_fds(control, _MOST, 4)
        if not raw:
            os._exit(0)
        limits = json.loads(raw)
        if isolated:
            kernel.setns(own, kernel.CLONE_NEWPID)  # a second one can be made only from the first
            kernel.unshare(kernel.CLONE_NEWPID)
        child = os.fork()
        if child == 0:
            _act(role, limits, files, held, isolated=isolated)
        for file in files:
            os.close(file)
        handle = os.pidfd_open(child)
        socket.send_fds(control, [str(child).encode()], [handle])
        os.close(handle)
        os.waitpid(child, 0)
        control.send(b"ended")


def _act(role: str, limits: Mapping[str, Any], files: list[int], held: int, *, isolated: bool) -> NoReturn:
    """In the fork: be confined, then run what the first file asks for, and end."""
    try:
        os.setsid()
        kernel.die_with_parent()
        keep_files(*files)
        if isolated:
            try:
                confine(limits)
            except OSError:
                os.write(files[-1], UNCONFINED)
                raise
        if role == "program":
            run_program(files, limits, held)
        else:
            # Its time is up by the clock, before the kernel ends it for the processor's: then there is a verdict.
            bound({**limits, "cpu_s": limits["wall_s"] + 2}, held)
            examine(files)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(70)
