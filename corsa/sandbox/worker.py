"""One sandbox as seen from outside: a process group of its own that is handed programs and gives verdicts."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import corsa
from corsa.config.sandbox import Limits
from corsa.errors import CorsaError
from corsa.sandbox import cgroup
from corsa.sandbox.rooting import CODE, bubblewrap
from corsa.sandbox.texts import clean
from corsa.sandbox.verdicts import Outcome, Verdict, verdict

Engine = Literal["bubblewrap", "namespaces", "none"]
_START = "import sys; sys.path.insert(0, {root!r}); from corsa.sandbox.supervisor import main; del sys.path[0]; main()"
_GRACE = 20.0
"""Seconds beyond a program's own wall time after which a silent sandbox is taken for broken."""
_LONGEST = 16 << 20
"""Bytes of an answer at most."""
_UNRUN = "the tests cannot be run"
_LOADING = 300.0
"""Seconds that a sandbox may take to load its modules."""
_FIRST_USER = 1 << 30
"""Slots of root become a random user from here on, in a range that no system gives out."""


class SandboxError(CorsaError):
    """The sandbox itself failed: nothing is known of the program."""


@dataclass(frozen=True)
class Program:
    """A program and the tests it is judged by.

    text: the program, trusted with nothing. before: run before it in its own process (the updated API). tests: run in
    another process, trusted; its functions `test_*` call the program's by name, whatever else of that name the tests
    define where it is the `entry`. known_good: a program that passes; it tells a fault of the program from one of the
    sandbox or of the tests.
    """

    text: str
    tests: str
    before: str = ""
    entry: str = ""
    known_good: str = ""

    def digest(self, limits: Limits) -> str:
        """What a verdict depends on, beside the versions of Python and of packages."""
        parts = json.dumps([self.text, self.tests, self.before, self.entry, self.known_good, limits.canonical()])
        return hashlib.sha256(parts.encode()).hexdigest()


class Sandbox:
    """A supervisor with its namespaces, started when the first program comes. Use it in a `with` block.

    `modules` are loaded once, before any program: those that programs import and that take long.
    """

    def __init__(self, engine: Engine, modules: Sequence[str] = (), limits: Limits | None = None) -> None:
        self.engine, self.modules, self.limits = engine, tuple(modules), limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._group: cgroup.Group | None = None
        self._said: Any = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, program: Program) -> Verdict:
        """The verdict on a program. What a program causes is its failure, whatever it does to its sandbox.

        Raises:
            SandboxError: a known-good program fares no better: the sandbox breaks down, or nobody can run the tests.
        """
        fault = ""
        for _ in range(2):
            found, fault = self._once(program)
            if found:
                return found
            # Whose fault is it? A known-good program in its place shows it.
            _, other = self._once(_known_good(program))
            if other and (program.known_good or "NameError" not in other):
                raise SandboxError(other)
            if fault.startswith(_UNRUN):
                break
        outcome: Outcome = "error" if fault.startswith(_UNRUN) else "crashed"
        return Verdict(outcome, f"{fault}; a known-good program in its place does not cause this")

    def _once(self, program: Program) -> tuple[Verdict | None, str]:
        """The verdict, or what stands in the way of one; a sandbox that broke down is closed."""
        try:
            self.start()
        except SandboxError as error:
            return None, str(error)
        try:
            self._send({**asdict(program), "limits": self.limits.canonical()})
            found = self._receive(self.limits.wall_s + _GRACE)
            if found.get("outcome") == "faulty":
                return None, clean(f"{_UNRUN}: {found.get('detail')}", 1000)
            judged = verdict(found)
            if judged:
                return judged, ""
            raise SandboxError(f"the sandbox gave no verdict: {found.get('detail')}")
        except (SandboxError, OSError, ValueError, AttributeError) as error:
            self.close()
            return None, clean(f"the sandbox broke down: {error}", 1000)

    def start(self) -> None:
        """Start the supervisor, if it does not run. Raises SandboxError with what it said where it cannot."""
        if self._process is not None:
            return
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        root = str(Path(corsa.__file__).resolve().parents[1])
        start = _START.format(root=CODE if self.engine == "bubblewrap" else root)
        owner = _FIRST_USER + secrets.randbits(29) if os.geteuid() == 0 else 0
        self._group = cgroup.make() if self.engine != "none" else None
        procs = [self._group.procs] if self._group else []
        command = [sys.executable, "-s", "-P", "-c", start, self.engine, str(owner), ",".join(self.modules), root]
        command += map(str, procs)
        if self.engine == "bubblewrap":
            command = bubblewrap(shutil.which("bwrap") or "bwrap", _ENVIRONMENT) + command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=_ENVIRONMENT,
            start_new_session=True,
            cwd="/",
            pass_fds=procs,
        )
        try:
            self._receive(_LOADING)
            if self._group:
                self._group.bound(self.limits.memory)
        except (SandboxError, OSError) as error:
            self.close()
            raise SandboxError(str(error)) from error

    def close(self) -> None:
        """End the sandbox and all in it."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin
        assert process.stdout
        with suppress(OSError):
            process.stdin.close()  # the supervisor ends when nothing more can come
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        self._said.close()
        if self._group:
            self._group.close()
            self._group = None

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process
        assert self._process.stdin
        raw = json.dumps(request).encode()
        self._process.stdin.write(struct.pack("!I", len(raw)) + raw)
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack("!I", self._exactly(4, deadline))
        if size > _LONGEST:
            raise SandboxError(f"an answer of {size} bytes")
        return json.loads(self._exactly(size, deadline))

    def _exactly(self, size: int, deadline: float) -> bytes:
        assert self._process
        assert self._process.stdout
        file, parts = self._process.stdout.fileno(), b""
        while len(parts) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                raise SandboxError("the sandbox does not answer")
            part = os.read(file, size - len(parts))
            if not part:
                self._said.seek(0)
                said = self._said.read().decode(errors="replace").strip().splitlines()
                raise SandboxError(f"the sandbox ended: {clean(said[-1], 300) if said else 'without a word'}")
            parts += part
        return parts


def _known_good(program: Program) -> Program:
    """What stands for a program to test its sandbox. Where none is known to pass, one that defines nothing: tests that
    lack a name of it are no fault of theirs.
    """
    if program.known_good:
        return replace(program, text=program.known_good)
    return replace(program, text="pass\n", entry="")


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
} | dict.fromkeys(_THREADS, "1")
"""What the supervisor is started with; the program's own environment is empty."""


@lru_cache(maxsize=1)
def available() -> tuple[Engine | None, str]:
    """What this machine can isolate programs with, found by trying; and why not with what comes before it."""
    reasons = []
    if sys.platform != "linux":
        return None, "programs are run in Linux namespaces, and this is not Linux"
    engines: list[Engine] = ["bubblewrap", "namespaces"]
    for engine in engines:
        if engine == "bubblewrap" and shutil.which("bwrap") is None:
            reasons.append("bubblewrap is not installed")
            continue
        try:
            with Sandbox(engine) as sandbox:
                found = sandbox.run(Program("def f():\n    return 1\n", "def test_f():\n    assert f() == 1\n"))
            if found.passed:
                return engine, "; ".join(reasons)
            reasons.append(f"{engine}: {found.outcome}: {found.detail}")
        except SandboxError as error:
            reasons.append(f"{engine}: {error}")
    return None, "; ".join(reasons)


def engine(asked: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto") -> Engine:
    """The engine to run programs with.

    Raises:
        SandboxError: programs could only be run unprotected, and that was not asked for in so many words.
    """
    if asked != "auto":
        return asked
    found, why = available()
    if found is None:
        raise SandboxError(
            f"programs cannot be isolated here ({why}), so none is run. Install bubblewrap and allow user namespaces "
            "(sysctl user.max_user_namespaces; in Docker: --security-opt seccomp=unconfined), or accept that "
            "programs can do all that you can with --sandbox none"
        )
    return found
