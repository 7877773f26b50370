"""Code updates (Table 6): an update of an API is learnt as weights, and programs that need it show whether it was.

    python pipelines/code_update.py --data arena.jsonl --humaneval HumanEval.jsonl.gz --allow-code-execution

The first problem of each update is taught with the unit tests in its prompt; the others are asked. UPass@k: programs
that pass with the update and not without it. SPass@k: HumanEval, which no update should touch. docs/sandbox.md says
how programs are run.
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.experiments.code.base import CodeExperiment, code_report
from corsa.experiments.runner import start
from corsa.flow import Step


def code_update(experiment: CodeExperiment, command: str) -> Step:
    """The report of a run, and through its inputs every step of it."""
    return code_report(experiment, command, published=("Table 6",))


def main() -> int:
    """Run the scenario from the command line."""
    return start(code_update, CodeExperiment(), program="pipelines/code_update.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
