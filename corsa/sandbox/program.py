"""The process that runs the program, and does what the examiner asks of it."""

from __future__ import annotations

import os
import resource
import socket
import sys
import types
from collections.abc import Mapping
from typing import Any

from corsa.sandbox.protocol import CannotCrossError, Peer, ProgramGone

WIRE = 3
"""The descriptor of the wire; there is no other beside standard input and output."""


def limit(limits: Mapping[str, Any], held: int) -> None:
    """Bound what this process and its children use. `held`: bytes of address space that the interpreter has already."""
    cpu, memory = int(limits["cpu_s"]), held + int(limits["memory"])
    bounds = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_NPROC: (int(limits["processes"]),) * 2,
        resource.RLIMIT_FSIZE: (int(limits["file"]),) * 2,
        resource.RLIMIT_NOFILE: (int(limits["files"]),) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for kind, values in bounds.items():
        hard = resource.getrlimit(kind)[1]
        fitting = [v if hard == resource.RLIM_INFINITY else min(v, hard) for v in values]
        resource.setrlimit(kind, (fitting[0], fitting[1]))


def empty_environment() -> None:
    """Nothing of the machine's environment reaches a program."""
    for name in list(os.environ):
        del os.environ[name]


def serve(end: socket.socket, request: Mapping[str, Any]) -> None:
    """Run the program; then answer calls until the examiner hangs up. What the program does to this process is its
    own affair: nothing that is decided here counts.
    """
    empty_environment()
    peer = Peer(end, strict=False)
    module = types.ModuleType("__program__")
    sys.modules["__program__"] = module
    namespace = module.__dict__
    try:
        exec(compile(request["before"], "<before>", "exec"), namespace)
        exec(compile(request["text"], "<program>", "exec"), namespace)
    except Exception as error:
        peer.send("failed", type(error).__name__, _said(error))
        return
    names = [name for name in request["names"] if name in namespace]
    peer.functions.update({name: namespace[name] for name in names if callable(namespace[name])})
    peer.send("ready", sorted(peer.functions), {n: _data(peer, namespace[n]) for n in names if n not in peer.functions})
    while True:
        try:
            message = peer.receive()
        except ProgramGone:
            return
        peer.answer(*message)


def _said(error: Exception) -> str:
    line = None
    trace = error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<program>" else line
        trace = trace.tb_next
    return f"{error}" + (f" (line {line} of the program)" if line else "")


def _data(peer: Peer, value: Any) -> Any:
    try:
        peer.pickled(value)
    except CannotCrossError:
        return None
    return value
