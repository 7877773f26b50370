"""Leases: two drivers on one store never run the same step at the same time.

A lease is a small file that names its holder and whose age is the holder's last heartbeat. It is created exclusively.
On a store without exclusive creation (S3, GCS) it is advisory: two drivers that start in the same moment may both run
the step, which wastes time but harms nothing, as the first record wins.

Besides its leases a driver keeps one file, `unfinished/<targets>.json`, that lists all steps its run needs. Garbage
collection keeps those (`corsa.flow.garbage_collection`). The file is removed when the run has its result; after an
interrupted run it stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from corsa.errors import CorsaError
from corsa.flow.files import Files
from corsa.flow.step import Step
from corsa.flow.store import Store

HEARTBEAT = 5.0  # seconds
STALE = 30.0  # seconds without a heartbeat after which a holder counts as gone
_POLL = 0.5  # seconds between looks at somebody else's lease


@dataclass(frozen=True)
class Holder:
    """A process that runs a step."""

    host: str
    machine: str  # boot and process namespace: where `pid` means something
    pid: Annotated[int, Field(strict=True, ge=0)]
    started: str  # start time of the process in clock ticks; a pid alone may have been reused
    token: str  # one for each lease taken

    @staticmethod
    def this_process() -> Holder:
        return Holder(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), uuid4().hex)

    def gone(self) -> bool:
        """Whether the process is known to have ended: only its own machine can tell."""
        return self.machine == _machine() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """Start time of a living process, "" if there is none (a zombie has ended)."""
    try:
        # The second field, the command in parentheses, may contain anything; state and the rest follow it.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    try:  # no /proc: macOS
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


class Leases:
    """The leases of this driver on one store, renewed by a thread until they are released or the process ends."""

    def __init__(self, store: Store) -> None:
        self._store, self._files = store, store.files
        self._hasty = store.files.hasty()  # for a heartbeat, which the next follows, and at the end
        self._held: dict[str, Holder] = {}  # path -> as whom
        self._released: dict[str, Holder] = {}  # the same, while the file is still to be removed
        self._run: tuple[str, bytes] | None = None  # path and content of the file of what this run needs
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="leases", daemon=True).start()

    def protect(self, targets: Sequence[Step], needed: Sequence[Step]) -> None:
        """Protect what the targets need from garbage collection until `finished`, or for a time after the end."""
        fingerprints = sorted(step.fingerprint for step in targets)
        name = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
        text = json.dumps({"name": targets[-1].name, "steps": [step.fingerprint[:16] for step in needed]})
        run = f"unfinished/{name}.json", text.encode()
        self._files.replace(*run)
        with self._lock:
            self._run = run

    def finished(self) -> None:
        """Remove the protection: the run has its result, which protects what it needs from now on."""
        with self._lock:
            run, self._run = self._run, None
        if run:
            with suppress(CorsaError):
                self._hasty.remove(run[0])

    @contextmanager
    def unfinished(self, steps: Sequence[Step], say: Callable[[str], object]) -> Iterator[list[Step]]:
        """Leases the steps without a result and yields them. Waits, and reports it, while another driver runs one."""
        said = None
        try:
            missing = self._pending(steps)
            while other := self._take_all(missing):
                if other != said:
                    say(f"waiting  {other}")
                    said = other
                if self._closed.wait(_POLL):
                    raise CorsaError("the run was interrupted")
                missing = self._pending(missing)
            yield self._pending(missing)  # looked up again: one may have been finished just before it was leased
        finally:
            self._give_back(steps)

    def _pending(self, steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if self._store.find(step, checksums=True) is None]

    def _take_all(self, steps: Sequence[Step]) -> str | None:
        """Lease all of the steps or none, so that drivers with overlapping lists cannot block each other.

        Returns what prevents it, or None. Every driver begins with the same step, so that one of them gets all.
        """
        for step in sorted(steps, key=lambda step: step.fingerprint):
            if holder := self._take(step):
                self._give_back(steps)
                return f"{step.name} is being run by {holder}"
        return None

    def close(self) -> None:
        """Release all leases and take no more."""
        self._closed.set()
        with self._lock:
            paths = list(self._held)
        self._release(paths)

    def _take(self, step: Step) -> Holder | None:
        """Lease a step; returns the holder if somebody else has it."""
        path = _path(step)
        with self._alone():
            holder = self._holder(path)
            if holder and not holder.gone() and self._age(path) <= STALE:
                return holder
            if holder:
                self._files.remove(path)
            me = Holder.this_process()
            if not self._files.publish(path, json.dumps(asdict(me)).encode()):
                other = self._holder(path)
                if other != me:
                    return other or _UNKNOWN
            with self._lock:
                self._held[path] = me
        if self._closed.is_set():
            self._release([path])
            raise CorsaError("the run was interrupted")
        return None

    def _give_back(self, steps: Sequence[Step]) -> None:
        self._release([_path(step) for step in steps])

    def _release(self, paths: Sequence[str]) -> None:
        with self._lock:
            self._released |= {path: self._held.pop(path) for path in paths if path in self._held}
        self._remove_released()

    def _remove_released(self) -> None:
        """Remove the files of released leases. What fails is left to the next heartbeat."""
        with self._lock:
            released = list(self._released.items())
        for path, me in released:
            with suppress(CorsaError, OSError):
                with self._alone():
                    if me == self._holder(path, self._hasty):
                        self._hasty.remove(path)
                with self._lock:
                    if self._released.get(path) == me:
                        del self._released[path]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one process in at a time, if the file system has locks: the body reads first and then writes."""
        if not self._files.local:
            yield
            return
        path = Path(self._files.inside("leases/.lock"))
        with self._files.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        with file:
            with suppress(OSError):  # some cluster file systems have none; exclusive creation still holds there
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _holder(self, path: str, files: Files | None = None) -> Holder | None:
        content = (files or self._files).read(path)
        try:
            return _HOLDER.validate_json(content) if content is not None else None
        except ValidationError:  # not written by us: nobody is known to run it, so only its age counts
            return _UNKNOWN

    def _age(self, path: str) -> float:
        modified = self._files.info([path])[0].mtime
        return time.time() - modified.timestamp() if modified else 0.0

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            self._remove_released()
            with self._lock:
                if self._run:
                    with suppress(CorsaError, OSError):
                        self._hasty.replace(*self._run)
                for path, me in self._held.items():
                    with suppress(CorsaError, OSError):  # a storage that fails for a while must not end the heartbeat
                        if me != self._holder(path, self._hasty):
                            continue  # taken over while this process was suspended
                        if self._files.local:
                            os.utime(self._files.inside(path))
                        else:
                            self._hasty.replace(path, json.dumps(asdict(me)).encode())


def _path(step: Step) -> str:
    return f"leases/{step.fingerprint[:16]}.json"


_HOLDER = TypeAdapter(Holder)
_UNKNOWN = Holder("an unknown host", "", 0, "", "")
