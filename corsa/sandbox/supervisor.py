"""The trusted process of a sandbox: in namespaces of its own, it forks two processes for each program and watches them.

Started by `slot.py` as `python -I -c ... ENGINE MODULES`. Requests and verdicts are frames of JSON on standard input
and output. The interpreter and the modules are loaded once; each program still gets a fork, a process namespace, a
mount namespace and a directory of its own, all of which end with it.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from corsa.sandbox import kernel, rooting
from corsa.sandbox.program import WIRE, empty_environment, limit, serve
from corsa.sandbox.test_runner import free_names, report

USER = 1000
"""The one user of a sandbox; outside it is an unprivileged one of the slot's own."""
NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def main() -> NoReturn:
    """Enter the sandbox, then serve. `ENGINE` is namespaces, bubblewrap (which has built the root) or none."""
    engine, owner, modules = sys.argv[1], int(sys.argv[2]), [m for m in sys.argv[3].split(",") if m]
    wire = os.dup(1)  # what a module prints while it is loaded must not stand among the frames
    os.dup2(2, 1)
    if engine == "namespaces":
        _isolate()
        _in_child(rooting.build_root)
    if engine != "none":
        _become(owner)
    for module in modules:
        with suppress(Exception):  # programs that need it will say so
            import_module(module)
    gc.collect()
    gc.freeze()  # forks share the pages of what is loaded
    _frame(wire, {"ready": True})
    warden = _Warden(isolated=engine != "none")
    while (request := _request()) is not None:
        _frame(wire, warden.run(request))
    os._exit(0)


# Entering


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
    """Go on in a child that is the unprivileged user `owner` outside, and rules over nothing but its own namespaces."""
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
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID)
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


# Serving


def _exactly(size: int) -> bytes | None:
    parts = b""
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            return None
        parts += part
    return parts


def _request() -> dict[str, Any] | None:
    head = _exactly(4)
    raw = head and _exactly(struct.unpack("!I", head)[0])
    return json.loads(raw) if raw else None


def _frame(file: int, message: Mapping[str, Any]) -> None:
    raw = json.dumps(message).encode()
    raw = struct.pack("!I", len(raw)) + raw
    while raw:
        raw = raw[os.write(file, raw) :]


@dataclass
class _Watch:
    """What is seen of a program from outside."""

    began: float
    output: bytes = b""
    printed: int = 0
    verdict: bytes = b""
    stopped: str = ""
    most_processes: int = 0
    ended: dict[int, int] = field(default_factory=dict)


class _Warden:
    def __init__(self, *, isolated: bool) -> None:
        self.isolated = isolated
        status = Path("/proc/self/statm").read_text().split()
        page = resource.getpagesize()
        self.held, self.resident = int(status[0]) * page, int(status[1]) * page
        self.own = os.open("/proc/self/ns/pid", os.O_RDONLY) if isolated else -1

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Both processes of one program, from their start to the end of all they have started."""
        entry = [request["entry"]] if request["entry"] else []
        request = {**request, "names": [*dict.fromkeys([*entry, *free_names(request["tests"])])]}
        ours, theirs = socket.socketpair()
        verdict_read, verdict_write = os.pipe()
        output_read, output_write = os.pipe()
        ends_read, ends_write = os.pipe()
        limits = request["limits"]
        watch = _Watch(time.monotonic())
        examiner = self._fork(lambda: self._examine(ours, request, verdict_write))
        program = self._fork(lambda: self._program(theirs, request, output_write, ends_write))
        ours.close()
        theirs.close()
        for end in (verdict_write, output_write, ends_write):
            os.close(end)
        try:
            self._watch(watch, examiner, program, verdict_read, output_read, limits)
            # A program that is gone has told how, or is about to.
            how = os.read(ends_read, 64) if self._readable(ends_read, b'"gone"' in watch.verdict) else b""
        finally:
            for process in (program, examiner):
                if process not in watch.ended:
                    self._kill(process)
            for end in (verdict_read, output_read, ends_read):
                os.close(end)
        return self._judged(watch, watch.ended.get(examiner, 0), how.decode(), limits)

    def _fork(self, act: Callable[[], None]) -> int:
        """A child, the first process of a process namespace of its own, that does `act` and ends."""
        if self.isolated:
            kernel.setns(self.own, kernel.CLONE_NEWPID)  # a second one can be made only from the first
            kernel.unshare(kernel.CLONE_NEWPID)
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            act()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        except BaseException as error:
            with suppress(OSError):
                os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode())
            os._exit(70)

    @staticmethod
    def _keep(*files: int) -> None:
        """Close all else: who holds an end of a pipe keeps the other side waiting, and could write to it."""
        before = 2
        for file in (*sorted(files), 4096):
            os.closerange(before + 1, file)
            before = file

    def _confine(self, limits: Mapping[str, Any]) -> None:
        """Namespaces, an empty directory of bounded size, no view of other processes, no privilege."""
        if not self.isolated:
            return
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        rooting.private_directory(limits["disk"])
        rooting.hide_processes()
        os.chdir("/tmp")
        kernel.drop_privileges()

    def _examine(self, end: socket.socket, request: Mapping[str, Any], verdict: int) -> None:
        self._keep(end.fileno(), verdict)
        self._confine(request["limits"])
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        empty_environment()
        report(end, request, verdict)

    def _program(self, end: socket.socket, request: Mapping[str, Any], output: int, ends: int) -> None:
        """The first process of the namespace waits: the program is a child of it, so that signals are what they are."""
        limits = request["limits"]
        self._keep(end.fileno(), output, ends)
        self._confine(limits)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        child = os.fork()
        if child == 0:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(end.fileno(), WIRE)
            os.closerange(WIRE + 1, 4096)
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            limit(limits, self.held)
            serve(socket.socket(fileno=WIRE), request)
            os._exit(0)
        os.close(output)
        end.close()
        while True:
            process, status = os.wait()
            if process == child:
                os.write(ends, str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)

    def _watch(
        self,
        watch: _Watch,
        examiner: int,
        program: int,
        verdict: int,
        output: int,
        limits: Mapping[str, Any],
    ) -> None:
        poll = select.poll()
        for end in (verdict, output):
            poll.register(end, select.POLLIN)
        deadline = watch.began + limits["wall_s"]
        open_ends = {verdict, output}
        while examiner not in watch.ended:
            for end, event in poll.poll(10 if open_ends else 2):
                part = os.read(end, 65536) if event & select.POLLIN else b""
                if not part:
                    poll.unregister(end)
                    open_ends.discard(end)
                elif end == verdict:
                    watch.verdict += part
                else:
                    watch.printed += len(part)
                    watch.output = (watch.output + part)[-2000:]
            if watch.printed > limits["output"]:
                watch.stopped = "output"
            elif time.monotonic() > deadline:
                watch.stopped = "timeout"
            elif time.monotonic() > watch.began + 0.1:
                self._count(watch, limits)
            if watch.stopped:
                return
            for process in (examiner, program):
                if process not in watch.ended and os.waitpid(process, os.WNOHANG)[0]:
                    watch.ended[process] = 0
        while (part := os.read(verdict, 65536)) if verdict in open_ends else b"":
            watch.verdict += part

    def _count(self, watch: _Watch, limits: Mapping[str, Any]) -> None:
        """Memory and processes of everything below this one, in all (limits of the kernel are per process)."""
        if not self.isolated:
            return
        page, total, processes, me = resource.getpagesize(), 0, 0, int(os.readlink("/proc/self"))
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) > me:
                with suppress(OSError, IndexError, ValueError):
                    total += max(0, int(Path(f"/proc/{entry}/statm").read_text().split()[1]) * page - self.resident)
                    processes += 1
        watch.most_processes = max(watch.most_processes, processes)
        if total > limits["memory"]:
            watch.stopped = "memory"

    def _kill(self, process: int) -> None:
        with suppress(ProcessLookupError):
            if self.isolated:
                os.kill(process, signal.SIGKILL)  # the first of its namespace: the kernel ends all others with it
            else:
                os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)

    @staticmethod
    def _readable(end: int, soon: bool) -> bool:
        return bool(select.select([end], [], [], 1.0 if soon else 0.0)[0])

    def _judged(self, watch: _Watch, status: int, how: str, limits: Mapping[str, Any]) -> dict[str, Any]:
        seconds = time.monotonic() - watch.began
        found: dict[str, Any] = {"seconds": seconds, "output": watch.output.decode(errors="replace"), "tests": {}}
        if watch.stopped:
            return found | {"outcome": watch.stopped, "detail": _STOPPED[watch.stopped].format(**limits)}
        try:
            found |= json.loads(watch.verdict)
        except ValueError:
            return found | {"outcome": "broken", "detail": "the examiner ended without a verdict"}
        if found["outcome"] == "gone":
            found |= _ended(how, in_time=seconds < limits["cpu_s"])
        elif found["outcome"] == "error":
            found["outcome"] = _limit_of(found["detail"]) or "error"
        if found["outcome"] == "error" and watch.most_processes >= limits["processes"]:
            found["outcome"] = "processes"
        return found


_STOPPED = {
    "output": "printed more than {output} bytes",
    "timeout": "ran longer than {wall_s} s",
    "memory": "its processes held more than {memory} bytes in all",
}


def _ended(how: str, *, in_time: bool) -> dict[str, str]:
    """What it means that the program ended before its tests did; `how`: its exit code, negative for a signal.

    `in_time`: before it can have used all its CPU time, for which the kernel kills it with either of two signals.
    """
    code = int(how or 0)
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and not in_time:
        return {"outcome": "cpu", "detail": "used more CPU time than it may"}
    if code < 0:
        return {"outcome": "crashed", "detail": f"killed by {signal.Signals(-code).name}"}
    return {"outcome": "exited", "detail": f"exited with status {code} before its tests were done"}


_LIMITS = {
    "memory": ("MemoryError",),
    "disk": ("No space left on device", "File too large"),
    "processes": ("BlockingIOError", "can't start new thread"),
    "files": ("Too many open files",),
}


def _limit_of(detail: str) -> str | None:
    """Which limit an exception tells of."""
    return next((name for name, words in _LIMITS.items() if any(word in detail for word in words)), None)


if __name__ == "__main__":
    main()
