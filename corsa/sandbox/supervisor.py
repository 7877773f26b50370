"""The trusted process of a sandbox: it hands each program and its tests to two processes, and watches them.

`worker.py` starts it as `python -c ... ENGINE OWNER MODULES ROOT [CGROUP]`. Requests and verdicts are JSON frames on
standard input and output. Each program gets its own fork, process namespace, mount namespace and directory, which are
removed after it. Its tests get the same.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from corsa.sandbox import cgroup, kernel, memory
from corsa.sandbox.confinement import UNCONFINED
from corsa.sandbox.entering import enter
from corsa.sandbox.rooting import CODE

_START = "import sys; sys.path.insert(0, {root!r}); from corsa.sandbox.zygote import main; del sys.path[0]; main()"
_VERDICT = 4 << 20
"""Maximum size of a verdict in bytes."""
_UNCOUNTED = 0.1
"""Seconds before memory is first counted. Most programs finish earlier."""


def main() -> NoReturn:
    """Enter the sandbox, load the modules, then serve. `ENGINE` is namespaces, bubblewrap or none.

    The optional last argument is a file descriptor for joining a cgroup.
    """
    engine, owner, modules, root = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    frames = os.dup(1)  # what a module prints while it loads must not get between the frames
    os.dup2(2, 1)
    for procs in sys.argv[5:]:
        cgroup.join(int(procs))
    enter(engine, owner)
    isolated = engine != "none"
    if isolated:
        kernel.keep_privileges()
    supervisor = _Supervisor(modules, CODE if isolated else root, isolated=isolated)
    _frame(frames, {"ready": True})
    while (request := _request()) is not None:
        _frame(frames, supervisor.run(request))
    os._exit(0)


def _exactly(size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _request() -> dict[str, Any] | None:
    head = _exactly(4)
    raw = head and _exactly(struct.unpack("!I", head)[0])
    return json.loads(raw) if raw else None


def _frame(file: int, message: Mapping[str, Any]) -> None:
    raw = json.dumps(message).encode()
    raw = struct.pack("!I", len(raw)) + raw
    while raw:
        raw = raw[os.write(file, raw) :]


class _Zygote:
    """A running zygote (`zygote.py`)."""

    def __init__(self, role: str, modules: str, root: str, *, isolated: bool) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start = [sys.executable, "-s", "-P", "-c", _START.format(root=root), role, modules, str(int(isolated))]
        self.process = subprocess.Popen(start, stdin=theirs.fileno(), stdout=2)
        theirs.close()

    def wait(self) -> None:
        """Wait until its modules are loaded. Raises OSError if it ended."""
        if not self.control.recv(16):
            raise OSError("a process of the sandbox ended while it loaded")

    def ask(self, limits: Mapping[str, Any], files: Sequence[int]) -> None:
        """Request a confined process that uses these files. Raises OSError if the zygote is gone."""
        socket.send_fds(self.control, [json.dumps(limits).encode()], list(files))

    def forked(self) -> _Child:
        """The requested process. Raises OSError if there is none."""
        raw, handles, _, _ = socket.recv_fds(self.control, 64, 1)
        if not raw or not handles:
            raise OSError("a process of the sandbox ended")
        return _Child(int(raw), handles[0], self.control)


@dataclass
class _Child:
    """The process of a program or of its tests.

    handle: its pidfd, which stays valid if its number is reused. control: the socket on which its zygote reports its
    end.
    """

    number: int
    handle: int
    control: socket.socket

    def kill(self, *, isolated: bool) -> None:
        """Kill it and all processes that it started. It is the first of its namespace, so the kernel kills the others
        with it.
        """
        with suppress(ProcessLookupError):
            if isolated:
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            else:
                os.killpg(self.number, signal.SIGKILL)
        os.close(self.handle)

    def wait(self) -> None:
        """Wait until it and all processes that it started have ended. Raises OSError after 10 s."""
        if not select.select([self.control], [], [], 10.0)[0] or self.control.recv(16) != b"ended":
            raise OSError("a process of the sandbox does not end")


@dataclass
class _Watch:
    """What the supervisor knows about a running program."""

    began: float
    output: bytes = b""
    printed: int = 0
    verdict: bytes = b""
    stopped: str = ""
    most_processes: int = 0
    counted: float = 0.0
    open: set[int] = field(default_factory=set)


def _held(content: Mapping[str, Any]) -> int:
    """An in-memory file with JSON, positioned at its start. A pipe would let a slow reader block the writer."""
    file = os.memfd_create("request")
    raw = json.dumps(content).encode()
    while raw:
        raw = raw[os.write(file, raw) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


class _Supervisor:
    def __init__(self, modules: str, root: str, *, isolated: bool) -> None:
        self.isolated = isolated
        roles = ("program", "tests")
        self.program, self.tests = (_Zygote(role, modules, root, isolated=isolated) for role in roles)
        for zygote in (self.program, self.tests):
            zygote.wait()
        self.own = {os.getpid(), self.program.process.pid, self.tests.process.pid}

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one program and its tests, until all their processes have ended."""
        limits = request["limits"]
        connections = socket.socketpair()
        verdict, output, ends = os.pipe(), os.pipe(), os.pipe()
        asked = _held({"before": request["before"], "text": request["text"]})
        examined = _held({"tests": request["tests"], "entry": request["entry"]})
        watch = _Watch(time.monotonic(), open={verdict[0], output[0]})
        started: list[_Child] = []
        try:
            self.program.ask(limits, [asked, connections[1].fileno(), output[1], ends[1]])
            self.tests.ask(limits, [examined, connections[0].fileno(), verdict[1]])
            started += [tests := self.tests.forked(), self.program.forked()]
            for end in (asked, examined, verdict[1], output[1], ends[1]):
                os.close(end)
            for connection in connections:
                connection.close()
            self._watch(watch, tests, verdict[0], output[0], limits)
            # If the program has ended, its exit status arrives now or soon.
            soon = 1.0 if b'"gone"' in watch.verdict else 0.0
            how = os.read(ends[0], 64) if select.select([ends[0]], [], [], soon)[0] else b""
        finally:
            for child in started:
                child.kill(isolated=self.isolated)
            for child in started:
                child.wait()
        for end in (verdict[0], output[0], ends[0]):
            os.close(end)
        return _judged(watch, how, limits)

    def _watch(self, watch: _Watch, tests: _Child, verdict: int, output: int, limits: Mapping[str, Any]) -> None:
        poll = select.poll()
        for end in (*watch.open, tests.handle):
            poll.register(end, select.POLLIN)
        deadline = watch.began + limits["wall_s"]
        while True:
            found = dict(poll.poll(10))
            for end in found.keys() & watch.open:
                part = os.read(end, 1 << 16)
                if not part:
                    poll.unregister(end)
                    watch.open.discard(end)
                elif end == verdict:
                    watch.verdict += part
                else:
                    watch.printed += len(part)
                    watch.output = (watch.output + part)[-2000:]
            now = time.monotonic()
            if watch.printed > limits["output"]:
                watch.stopped = "output"
            elif len(watch.verdict) > _VERDICT:
                watch.stopped = "verdict"
            elif now > deadline:
                watch.stopped = "timeout"
            elif now > watch.began + _UNCOUNTED and now > watch.counted:
                self._count(watch, limits)
            if watch.stopped or (tests.handle in found and verdict not in watch.open):
                return

    def _count(self, watch: _Watch, limits: Mapping[str, Any]) -> None:
        """Count memory and processes of a program and its tests together. The kernel limits only each process."""
        if not self.isolated:
            return
        began = time.monotonic()
        who = memory.processes(self.own)
        watch.most_processes = max(watch.most_processes, len(who))
        if memory.held(who, limits["memory"]) > limits["memory"]:
            watch.stopped = "memory"
        watch.counted = time.monotonic() + 2 * (time.monotonic() - began)  # counting takes a third of the time at most


def _judged(watch: _Watch, how: bytes, limits: Mapping[str, Any]) -> dict[str, Any]:
    seconds = time.monotonic() - watch.began
    found: dict[str, Any] = {"seconds": seconds, "output": watch.output.decode(errors="replace"), "tests": {}}
    if how == UNCONFINED:
        return found | {"outcome": "broken", "detail": "a process could not be confined"}
    if watch.stopped:
        outcome = "broken" if watch.stopped == "verdict" else watch.stopped
        return found | {"outcome": outcome, "detail": _STOPPED[watch.stopped].format(**limits)}
    try:
        said = json.loads(watch.verdict)
        found |= {key: said[key] for key in ("outcome", "detail", "tests")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return found | {"outcome": "broken", "detail": "the process of the tests ended without a verdict"}
    if found["outcome"] == "gone":
        found |= _ended(how, in_time=seconds < limits["cpu_s"])
    elif found["outcome"] == "error":
        found["outcome"] = _limit_of(str(found["detail"])) or "error"
    if found["outcome"] == "error" and watch.most_processes >= limits["processes"]:
        found["outcome"] = "processes"
    return found


_STOPPED = {
    "output": "printed more than {output} bytes",
    "timeout": "ran longer than {wall_s} s",
    "memory": "its processes used more than {memory} bytes together",
    "verdict": "the verdict of the tests' process is too long",
}


def _ended(how: bytes, *, in_time: bool) -> dict[str, str]:
    """The outcome if the program ended before its tests. `how`: its exit code, negative for a signal.

    `in_time`: it ended before it could use all its CPU time. At that limit the kernel sends one of two signals.
    """
    code = int(how) if how.lstrip(b"-").isdigit() else 0
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and not in_time:
        return {"outcome": "cpu", "detail": "used more CPU time than allowed"}
    if code < 0:
        return {"outcome": "crashed", "detail": f"killed by signal {-code}{_signal_name(-code)}"}
    return {"outcome": "exited", "detail": f"exited with status {code} before its tests finished"}


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal; most of them have no name
        return ""


_LIMITS = {
    "memory": ("MemoryError",),
    "disk": ("No space left on device", "File too large"),
    "processes": ("BlockingIOError", "can't start new thread"),
    "files": ("Too many open files",),
}


def _limit_of(detail: str) -> str | None:
    """The limit that an exception reports; None if it reports none."""
    return next((name for name, words in _LIMITS.items() if any(word in detail for word in words)), None)
