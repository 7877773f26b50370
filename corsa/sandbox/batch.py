"""Runs many programs in several sandboxes at once, each program once, and caches the verdicts."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from queue import SimpleQueue

from corsa.config.sandbox import Limits
from corsa.sandbox.worker import Engine, Program, Sandbox, SandboxError, Verdict

_SURE = ("passed", "failed", "error", "exited", "crashed")
"""Outcomes that another run would repeat. A program that exceeds a time limit may meet it on a faster machine."""


def judge(
    programs: Sequence[Program],
    *,
    engine: Engine,
    limits: Limits | None = None,
    modules: Sequence[str] = (),
    slots: int = 1,
    cache: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """The verdict on each program, in order. Equal programs run once.

    Args:
        programs: programs with their tests.
        engine: see `corsa.sandbox.worker.engine`.
        limits: limits of each program.
        modules: modules that every sandbox loads once.
        slots: number of sandboxes at once.
        cache: a directory with verdicts of other runs. Their key is program, tests, limits, Python, packages and the
            code of the sandbox.
        done: called with the number of programs judged so far.

    A program has the outcome `sandbox` if its sandbox breaks with a known-good program as well.

    Raises:
        SandboxError: no sandbox can be started.
    """
    limits = limits or Limits()
    unique = {program.digest(limits): program for program in programs}
    found: dict[str, Verdict] = {}
    waiting: SimpleQueue[tuple[str, Program]] = SimpleQueue()
    for key, program in unique.items():
        known = cache and _remembered(cache, key)
        if known:
            found[key] = known
        else:
            waiting.put((key, program))
    lock = threading.Lock()

    def work() -> None:
        with Sandbox(engine, modules, limits) as sandbox:
            sandbox.start()
            while not waiting.empty():
                try:
                    key, program = waiting.get_nowait()
                except Exception:  # another thread was faster
                    return
                try:
                    verdict = sandbox.run(program)
                except SandboxError as error:
                    verdict = Verdict("sandbox", str(error))
                if cache and verdict.outcome in _SURE:
                    _remember(cache, key, verdict)
                with lock:
                    found[key] = verdict
                    done(len(found))

    wanted = min(max(1, slots), waiting.qsize())
    if wanted:
        with ThreadPoolExecutor(wanted) as pool:
            for future in [pool.submit(work) for _ in range(wanted)]:
                future.result()
    return [found[program.digest(limits)] for program in programs]


@lru_cache(maxsize=1)
def _versions() -> str:
    """A hash of what verdicts depend on apart from programs: Python, importable packages, the sandbox's code."""
    packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions())
    own = [sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return sha256("\n".join([platform.python_version(), *packages, *own]).encode()).hexdigest()[:16]


def _place(cache: Path, key: str) -> Path:
    return cache / _versions() / key[:2] / f"{key}.json"


def _remembered(cache: Path, key: str) -> Verdict | None:
    try:
        return Verdict(**json.loads(_place(cache, key).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(cache: Path, key: str, verdict: Verdict) -> None:
    place = _place(cache, key)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    aside.write_text(json.dumps(asdict(verdict)))
    aside.replace(place)
