"""Judges the programs in a model's answers. Each Ray task runs a share of the programs in a sandbox on its node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.code_steps import VerdictsConfig
from corsa.config.sandbox import Limits
from corsa.data.benchmarks.mutants import disguised, mutants
from corsa.data.benchmarks.programs import Problem, program_in
from corsa.errors import CorsaError
from corsa.flow.cluster import cluster_resources
from corsa.flow.task import Task
from corsa.sandbox.verdicts import Verdict
from corsa.sandbox.worker import Program, SandboxError

VERDICTS = pa.schema(
    [
        ("problem", pa.string()),
        ("sample", pa.int32()),
        ("updated", pa.bool_()),
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("loaded", pa.bool_()),  # the program got as far as its tests
        ("seconds", pa.float64()),
    ]
)
"""One row per run of a program: with the update installed and, for updates, also without it (`updated` false).

A program that passes only with the update may just check whether the update is there. So it runs `TRIALS` times more,
half of them with the update and half with a mutant of it, under which the reference solution fails. If it ever passes
with the mutant, or fails with the update, its row without the update says `passed`: it does not need the results of the
update. The order is random, and so is how each result is written (`mutants.disguised`): a program that knows the
update's code, or finds out that it has run before, does not know which of the two it has.
"""
UNUSED = "does not depend on what the update returns"
TRIALS = 12
_RANDOM = SystemRandom()

PER_TASK = 32
"""Most programs per Ray task. A sandbox loads the packages once for all of them."""


def compute(task: Task) -> dict[str, Any]:
    """Step function: problems.parquet and answers.parquet -> verdicts.parquet (`VERDICTS`).

    Raises:
        CorsaError: running programs is not allowed, or no sandbox is available here.
    """
    config: VerdictsConfig = task.config
    if not task.placement.allow_code_execution:
        raise CorsaError(
            "this step runs programs that a model wrote: read docs/sandbox.md, then say so with --allow-code-execution"
        )
    problems = {p.id: p for p in problems_of(pq.read_table(task.inputs["problems"].local("problems.parquet")))}
    answers = pq.read_table(task.inputs["answers"].local("answers.parquet")).to_pylist()
    modules = tuple(sorted({module for problem in problems.values() for module in problem.modules}))

    def run(programs: list[Program]) -> list[Verdict]:
        return _on_cluster(programs, config, modules, task.placement.sandbox) if programs else []

    asked = [(problems[a["problem"]], a["sample"], a["output"]) for a in answers]
    rows = judged([(problem, sample, program_in(output, problem.lead)) for problem, sample, output in asked], run)
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICTS), task.output / "verdicts.parquet")
    counts = Counter(row["outcome"] for row in rows)
    unused = sum(row["detail"] == UNUSED for row in rows)
    return {"programs": len(rows), "passed": counts["passed"], "not_judged": counts["sandbox"], "unused": unused}


def judged(
    answers: Sequence[tuple[Problem, int, str]], run: Callable[[list[Program]], list[Verdict]]
) -> list[dict[str, Any]]:
    """The rows of `VERDICTS` for answers (problem, sample number, program). `run` runs programs."""
    ways = [(p, n, text, way) for p, n, text in answers for way in ((True, False) if p.update else (True,))]
    verdicts = run([problem.program(text, updated=updated) for problem, _, text, updated in ways])
    rows = [
        {
            "problem": problem.id,
            "sample": number,
            "updated": updated,
            "outcome": verdict.outcome,
            "detail": verdict.detail[:500],
            "loaded": bool(verdict.tests),
            "seconds": verdict.seconds,
        }
        for (problem, number, _, updated), verdict in zip(ways, verdicts, strict=True)
    ]
    # The rows with and without the update are adjacent.
    pairs = [(w, without) for w, with_, without in zip(ways, rows, rows[1:], strict=False) if _needs(with_, without)]
    unused = _do_not_use([(problem, text) for (problem, _, text, _), _ in pairs], run)
    for (_, row), without in zip(pairs, unused, strict=True):
        if without:
            row.update(outcome="passed", detail=UNUSED)
    return rows


def _needs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether these two rows show that a program passes only with the update."""
    return one["updated"] and not other["updated"] and one["outcome"] == "passed" != other["outcome"]


def _do_not_use(programs: Sequence[tuple[Problem, str]], run: Callable[[list[Program]], list[Verdict]]) -> list[bool]:
    """Whether each program passes with a mutant of its update under which the reference solution fails a test, or fails
    with the update itself.

    False if there is no such mutant: then nothing can be concluded.
    """
    problems = {problem.id: problem for problem, _ in programs}
    tried = [(problem, mutant) for problem in problems.values() for mutant in mutants(problem.before)]
    verdicts = run([problem.program(problem.solution, updated=True, before=mutant) for problem, mutant in tried])
    chosen: dict[str, str] = {}
    # Prefer a wrong result: a program could detect an exception.
    for outcomes in (("failed",), ("error", "timeout", "cpu", "memory")):
        for (problem, mutant), verdict in zip(tried, verdicts, strict=True):
            if verdict.tests and verdict.outcome in outcomes:
                chosen.setdefault(problem.id, mutant)
    trials: list[tuple[int, bool, Program]] = []
    for i, (problem, text) in enumerate(programs):
        if problem.id in chosen:
            for right in _RANDOM.sample([True, False] * (TRIALS // 2), TRIALS):
                before = disguised(problem.before if right else chosen[problem.id], f"{_RANDOM.getrandbits(64):x}")
                trials.append((i, right, problem.program(text, updated=True, before=before)))
    verdicts = run([program for *_, program in trials])
    known = [(i, right, verdict) for (i, right, _), verdict in zip(trials, verdicts, strict=True)]
    found = {i for i, right, verdict in known if verdict.outcome != "sandbox" and verdict.passed != right}
    return [i in found for i in range(len(programs))]


def problems_of(table: pa.Table) -> list[Problem]:
    """The problems of a table."""
    names = list(Problem.model_fields)
    return [Problem.model_validate(row) for row in table.select(names).to_pylist()]


def _on_cluster(
    programs: list[Program], config: VerdictsConfig, modules: tuple[str, ...], sandbox: Any
) -> list[Verdict]:
    import ray
    import ray.exceptions

    unique = list(dict.fromkeys(programs))
    cpus = cluster_resources()["CPU"]
    size = max(1, min(PER_TASK, -(-len(unique) // max(1, int(cpus)))))
    # A task lost with its node runs again elsewhere. Each has a whole CPU, so that time limits are meaningful.
    remote = ray.remote(num_cpus=min(1.0, cpus), max_retries=3)(_judge)
    shares = [unique[i : i + size] for i in range(0, len(unique), size)]
    waiting = [remote.remote(share, config.limits, modules, sandbox) for share in shares]
    found: dict[Program, Verdict] = {}
    for share, reference in zip(shares, waiting, strict=True):
        try:
            found |= dict(zip(share, ray.get(reference), strict=True))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CorsaError):
                raise SandboxError(str(error.cause)) from error
            raise
    return [found[program] for program in programs]


def _judge(programs: list[Program], limits: Limits, modules: tuple[str, ...], sandbox: Any) -> list[Verdict]:
    from corsa.models.gguf_file import cache_directory
    from corsa.sandbox.batch import judge
    from corsa.sandbox.worker import engine

    chosen = engine(sandbox)
    # An unprotected program may have changed the stored verdicts, so they are not used.
    cache = None if chosen == "none" else Path(cache_directory()) / "verdicts"
    return judge(programs, engine=chosen, limits=limits, modules=modules, cache=cache)
