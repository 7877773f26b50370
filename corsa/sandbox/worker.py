"""One sandbox seen from outside: a process group that receives programs and returns verdicts."""

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
"""Seconds after a program's wall time limit until a sandbox that does not answer counts as broken."""
_LONGEST = 16 << 20
"""Maximum size of an answer in bytes."""
_UNRUN = "the tests cannot be run"
_LOADING = 300.0
"""Maximum seconds for loading the modules of a sandbox."""
_FIRST_USER = 1 << 30
"""If this process is root, each sandbox becomes a random user from this number up. Systems do not assign these."""


class SandboxError(CorsaError):
    """The sandbox itself failed, so nothing is known about the program."""


@dataclass(frozen=True)
class Program:
    """A program and its tests.

    text: the untrusted program. before: trusted code that runs before it in the same process (the updated API). tests:
    trusted code that runs in another process; its functions `test_*` call the program's functions by name. entry: a
    function of the program that replaces one of the same name in the tests. known_good: a program that passes; it
    shows whether the program, or the sandbox or the tests, caused a failure.
    """

    text: str
    tests: str
    before: str = ""
    entry: str = ""
    known_good: str = ""

    def digest(self, limits: Limits) -> str:
        """A hash of what the verdict depends on, apart from the versions of Python and the packages."""
        parts = json.dumps([self.text, self.tests, self.before, self.entry, self.known_good, limits.canonical()])
        return hashlib.sha256(parts.encode()).hexdigest()


class Sandbox:
    """A supervisor in its namespaces. It starts with the first program. Use it in a `with` block.

    `modules` are loaded once, before any program. List those that programs import and that load slowly.
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
        """The verdict on a program. If a program breaks its sandbox, that is a failure of the program.

        Raises:
            SandboxError: the sandbox breaks, or the tests do not load, with a known-good program as well.
        """
        fault = ""
        for _ in range(2):
            found, fault = self._once(program)
            if found:
                return found
            # Run a known-good program in its place to find the cause.
            _, other = self._once(_known_good(program))
            if other and (program.known_good or "NameError" not in other):
                raise SandboxError(other)
            if fault.startswith(_UNRUN):
                break
        outcome: Outcome = "error" if fault.startswith(_UNRUN) else "crashed"
        return Verdict(outcome, f"{fault}; a known-good program in its place does not cause this")

    def _once(self, program: Program) -> tuple[Verdict | None, str]:
        """The verdict, or why there is none. Closes a broken sandbox."""
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
            return None, clean(f"the sandbox failed: {error}", 1000)

    def start(self) -> None:
        """Start the supervisor unless it runs. Raises SandboxError with its last message if it cannot start."""
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
        """End the sandbox and all its processes."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin
        assert process.stdout
        with suppress(OSError):
            process.stdin.close()  # the supervisor ends at the end of its input
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
                raise SandboxError(f"the sandbox ended: {clean(said[-1], 300) if said else 'without a message'}")
            parts += part
        return parts


def _known_good(program: Program) -> Program:
    """The program that replaces another to test its sandbox.

    If no known-good program is given, one that defines nothing. Tests that miss a name of it are not at fault.
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
"""Environment of the supervisor. The environment of a program is empty."""


@lru_cache(maxsize=1)
def available() -> tuple[Engine | None, str]:
    """The first engine that works on this machine, found by trying, and why the ones before it do not work."""
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
    """The engine that runs programs.

    Raises:
        SandboxError: no engine can isolate programs here, and `none` was not requested explicitly.
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
