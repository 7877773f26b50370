"""The process that runs the program and executes the calls of its tests."""

from __future__ import annotations

import json
import os
import socket
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from corsa.sandbox import kernel
from corsa.sandbox.confinement import bound, empty_environment
from corsa.sandbox.protocol import Peer, ProgramGone
from corsa.sandbox.values import CannotCrossError

CONNECTION = 3
"""File descriptor of the socket to the tests. Only the three standard ones are open besides it."""


def run_program(files: list[int], limits: Mapping[str, Any], held: int) -> None:
    """Run a program in a child of this process, and report how it ended.

    This process is the first of its namespace and only waits. Signals to such a process work differently, so the
    program runs in a child.

    Args:
        files: the request {before, text}, the socket to the tests, and the pipes for output and the exit status.
        limits: of the program and all processes that it starts.
        held: bytes of address space that the interpreter already uses.
    """
    request, connection, output, ends = files
    kernel.undumpable()
    child = os.fork()
    if child == 0:
        with os.fdopen(request, "rb") as file:
            asked = json.load(file)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(connection, 1023)
        os.dup2(1023, CONNECTION)
        os.closerange(CONNECTION + 1, 4096)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        kernel.die_with_parent()
        os.register_at_fork(after_in_child=_disconnect)
        bound(limits, held)
        serve(socket.socket(fileno=CONNECTION), asked)
        os._exit(0)
    for file in (request, connection, output):
        os.close(file)
    while True:
        process, status = os.wait()
        if process == child:
            os.write(ends, str(os.waitstatus_to_exitcode(status)).encode())
            return


def _disconnect() -> None:
    """In each process that the program forks: only the program itself answers its tests.

    Otherwise the messages of several processes mix, and whether the tests fail or wait for the rest of a message is a
    matter of time.
    """
    with suppress(OSError):
        os.close(CONNECTION)


def serve(end: socket.socket, request: Mapping[str, Any]) -> None:
    """Run the program, then answer calls until the tests close the socket. The program controls this process, so
    nothing is decided here.
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
        peer.receive()  # unread data at the end of this process would discard the message below
        peer.send("failed", type(error).__name__, _said(error))
        return
    _, names = peer.receive()
    names = [name for name in names if name in namespace]
    peer.functions.update({name: namespace[name] for name in names if callable(namespace[name])})
    peer.send("ready", sorted(peer.functions), {n: _data(peer, namespace[n]) for n in names if n not in peer.functions})
    while True:
        try:
            message = peer.receive()
        except ProgramGone:
            return
        kind, target, args, kwargs = message
        peer.answer(kind, target, args, kwargs)


def _said(error: Exception) -> str:
    line = None
    trace = error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<program>" else line
        trace = trace.tb_next
    return f"{error}" + (f" (line {line} of the program)" if line else "")


def _data(peer: Peer, value: Any) -> Any:
    try:
        peer.encoded(value)
    except CannotCrossError:
        return None
    return value
