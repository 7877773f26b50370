"""Judging the programs in a model's answers, as Ray tasks: each with a sandbox on its node, for a share of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.steps import JudgingConfig
from corsa.data.benchmarks.programs import Problem, program_in
from corsa.errors import CorsaError
from corsa.flow.cluster import cluster_resources
from corsa.flow.task import Task
from corsa.sandbox.worker import Limits, Program, SandboxError, Verdict

VERDICTS = pa.schema(
    [
        ("problem", pa.string()),
        ("sample", pa.int32()),
        ("updated", pa.bool_()),
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("loaded", pa.bool_()),  # it ran as far as its tests
        ("seconds", pa.float64()),
    ]
)
"""One row a program and way of running it: with the update installed, and of updates also without."""

PER_TASK = 32
"""Programs of one Ray task at most: a sandbox loads the packages once for all of them."""


def compute(task: Task) -> dict[str, Any]:
    """Step function: problems.parquet and answers.parquet -> verdicts.parquet (`VERDICTS`).

    Raises:
        CorsaError: no program may be run, or nothing here can isolate one.
    """
    config: JudgingConfig = task.config
    if not task.placement.allow_code_execution:
        raise CorsaError(
            "this step runs programs that a model wrote: read docs/sandbox.md, then say so with --allow-code-execution"
        )
    problems = {p.id: p for p in problems_of(pq.read_table(task.inputs["problems"].local("problems.parquet")))}
    answers = pq.read_table(task.inputs["answers"].local("answers.parquet")).to_pylist()
    keys, programs = [], []
    for answer in answers:
        problem = problems[answer["problem"]]
        text = program_in(answer["output"], problem.lead)
        for updated in (True, False) if problem.update else (True,):
            keys.append({"problem": problem.id, "sample": answer["sample"], "updated": updated})
            programs.append(problem.program(text, updated=updated))
    modules = tuple(sorted({module for problem in problems.values() for module in problem.modules}))
    verdicts = _on_cluster(programs, config, modules, task.placement.sandbox)
    rows = [
        {**key, "outcome": v.outcome, "detail": v.detail[:500], "loaded": bool(v.tests), "seconds": v.seconds}
        for key, v in zip(keys, verdicts, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICTS), task.output / "verdicts.parquet")
    broken = sum(row["outcome"] == "sandbox" for row in rows)
    return {"programs": len(rows), "passed": sum(row["outcome"] == "passed" for row in rows), "not_judged": broken}


def problems_of(table: pa.Table) -> list[Problem]:
    """The problems of a table."""
    names = list(Problem.model_fields)
    return [Problem.model_validate(row) for row in table.select(names).to_pylist()]


def _on_cluster(
    programs: list[Program], config: JudgingConfig, modules: tuple[str, ...], sandbox: Any
) -> list[Verdict]:
    import ray
    import ray.exceptions

    unique = list(dict.fromkeys(programs))
    cpus = cluster_resources()["CPU"]
    size = max(1, min(PER_TASK, -(-len(unique) // max(1, int(cpus)))))
    # A task that is lost with its node is run again elsewhere; a whole CPU each, so that time limits mean something.
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
    from corsa.models.embedded import cache_directory
    from corsa.sandbox.batch import judge
    from corsa.sandbox.worker import engine

    chosen = engine(sandbox)
    # What an unprotected program did may have been to the verdicts themselves.
    cache = None if chosen == "none" else Path(cache_directory()) / "verdicts"
    return judge(programs, engine=chosen, limits=limits, modules=modules, cache=cache)
