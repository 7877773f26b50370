"""Measures how fast programs are judged, and checks that a benchmark's reference solutions pass."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from corsa.config.sandbox import Limits
from corsa.data.benchmarks.programs import kind_of, read_problems
from corsa.sandbox.batch import judge
from corsa.sandbox.worker import engine


def measure_sandbox(
    path: str,
    *,
    sandbox: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto",
    limit: int | None = None,
    slots: int | None = None,
    wall_s: float = 10.0,
    memory_gib: float = 2.0,
    done: Callable[[str, int, int], None] = lambda what, count, of: None,
) -> dict[str, Any]:
    """Run every reference solution of a file with its tests, and again with its body replaced by `pass`. For updates,
    also run it without the update.

    Returns {file, benchmark, engine, slots, problems, programs, canonical_passed, blanked_passed,
    programs_per_second (all programs over their total time, including the start of the sandboxes), seconds,
    cannot_pass: [{id, outcome, reason}]} and, for updates, canonical_passed_without_update and its share.
    """
    kind, problems = kind_of(path), read_problems(path, limit=limit)
    chosen, count = engine(sandbox), slots or len(os.sched_getaffinity(0))
    sets = {
        "canonical": [p.program(p.solution, updated=True) for p in problems],
        "blanked": [p.program(p.blanked, updated=True) for p in problems],
    }
    if kind == "updates":
        sets["without the update"] = [p.program(p.solution, updated=False) for p in problems]
    modules = sorted({module for problem in problems for module in problem.modules})
    limits = Limits(wall_s=wall_s, cpu_s=round(wall_s) + 1, memory=int(memory_gib * 2**30))
    verdicts, began = {}, time.monotonic()
    for name, programs in sets.items():
        told = lambda n, name=name: done(name, n, len(problems))  # noqa: E731
        verdicts[name] = judge(programs, engine=chosen, limits=limits, modules=modules, slots=count, done=told)
    seconds = time.monotonic() - began
    run = sum(len({p.digest(limits) for p in programs}) for programs in sets.values())
    passed = {name: sum(v.passed for v in found) for name, found in verdicts.items()}
    found = {
        "file": path,
        "benchmark": kind,
        "engine": chosen,
        "slots": count,
        "problems": len(problems),
        "programs": run,
        "canonical_passed": passed["canonical"],
        "blanked_passed": passed["blanked"],
        "programs_per_second": round(run / seconds, 2),
        "seconds": round(seconds, 2),
        "outcomes": {name: dict(Counter(v.outcome for v in found)) for name, found in verdicts.items()},
        "cannot_pass": [
            {"id": p.id, "outcome": v.outcome, "reason": v.detail[:300]}
            for p, v in zip(problems, verdicts["canonical"], strict=True)
            if not v.passed
        ],
        "blanked_that_pass": [p.id for p, v in zip(problems, verdicts["blanked"], strict=True) if v.passed],
    }
    if kind == "updates":
        without = passed["without the update"]
        found |= {"canonical_passed_without_update": without, "share_without_update": without / len(problems)}
    return found
