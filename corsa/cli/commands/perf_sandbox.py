"""`corsa perf sandbox`: whether and how fast the sandbox judges programs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

from tyro.conf import arg

from corsa.cli.commands.perf import perf
from corsa.errors import CorsaError
from corsa.terminal import visible


@perf.command(name="sandbox")
def perf_sandbox(
    data: Annotated[str, arg(metavar="FILE", help="HumanEval.jsonl(.gz), arena.jsonl, or a file of the same record")],
    allow_code_execution: Annotated[bool, arg(help="allow running programs; nothing runs without this")] = False,
    sandbox: Annotated[
        Literal["auto", "bubblewrap", "namespaces", "none"],
        arg(help="how programs are isolated; none: no isolation, they run with all your rights"),
    ] = "auto",
    limit: Annotated[int | None, arg(metavar="N", help="records of the file; all by default")] = None,
    slots: Annotated[int | None, arg(metavar="N", help="programs run in parallel; default: one per core")] = None,
    wall_s: Annotated[float, arg(metavar="S", help="time limit of a program, seconds")] = 10.0,
    memory_gib: Annotated[float, arg(metavar="GIB", help="memory limit of a program")] = 2.0,
    as_json: Annotated[bool, arg(name="json", help="print one JSON object")] = False,
) -> None:
    """Run every reference solution of a benchmark of programs, and again with its body replaced by `pass`.

    Example: corsa perf sandbox --data HumanEval.jsonl.gz --allow-code-execution --json
    """
    if not allow_code_execution:
        raise CorsaError(
            "this runs the programs of a file: read docs/sandbox.md, then say so with --allow-code-execution"
        )
    from corsa.perf.sandbox import measure_sandbox

    def told(what: str, count: int, of: int) -> None:
        if sys.stderr.isatty():
            print("\r", visible(f"{what}: {count} of {of} "), sep="", end="", file=sys.stderr, flush=True)

    found = measure_sandbox(
        data, sandbox=sandbox, limit=limit, slots=slots, wall_s=wall_s, memory_gib=memory_gib, done=told
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if not isinstance(value, list):
            print(visible(f"{name.replace('_', ' ')}: {value}"))
    for entry in found["cannot_pass"]:
        print(visible(f"cannot pass: {entry['id']}: {entry['outcome']}: {entry['reason']}"))
