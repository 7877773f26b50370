"""A process that loads Python and modules once, then forks one process for each program. It never reads a request.

A sandbox has two zygotes, each started as a new Python process. The forks of one run programs, those of the other run
tests. So the memory of a program never contained tests or another program, and its addresses say nothing about those
of the tests' process.
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
"""File descriptor of the socket to the supervisor."""
_MOST = 4096
"""Maximum size of a message from the supervisor in bytes. Longer content is in a file sent with the message."""


def main() -> NoReturn:
    """Load the modules, then fork on request, one program at a time. Arguments: `ROLE MODULES ISOLATED`."""
    role, modules, isolated = sys.argv[1], [m for m in sys.argv[2].split(",") if m], sys.argv[3] == "1"
    kernel.die_with_parent()
    control = socket.socket(fileno=os.dup(_CONTROL))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    for module in modules:
        with suppress(Exception):  # a program that needs it gets the error
            import_module(module)
    syscalls.prepare()
    gc.collect()
    gc.freeze()  # so that forks share the memory of loaded modules
    own = os.open("/proc/self/ns/pid", os.O_RDONLY) if isolated else -1
    held = address_space()
    control.send(b"ready")
    while True:
        raw, files, _, _ = socket.recv_fds(control, _MOST, 4)
        if not raw:
            os._exit(0)
        limits = json.loads(raw)
        if isolated:
            kernel.setns(own, kernel.CLONE_NEWPID)  # another one can be created only from here
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
    """In the fork: confine this process, run the request in the first file, and exit."""
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
            # Its CPU limit is above the wall time limit, so that the supervisor stops it first and gives a verdict.
            bound({**limits, "cpu_s": limits["wall_s"] + 2}, held)
            examine(files)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(70)
