"""Code updates (Table 6): the model learns an API update; programs that need the update test it.

    python pipelines/code_update.py --data arena.jsonl --humaneval HumanEval.jsonl.gz --allow-code-execution

Training uses the first problem of each update, with the unit tests in its prompt; the other problems are asked.
UPass@k: programs that pass with the update and fail without it. SPass@k: HumanEval, which no update should change.
docs/sandbox.md describes how programs are run.
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.experiments.code.base import CodeExperiment, code_report
from corsa.experiments.planner import Planner
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("upass_1", "spass_1")
"""The metric that an update should raise, and the one it should not change (if HumanEval is given)."""


def code_update(planner: Planner[CodeExperiment]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    return code_report(planner, primary=PRIMARY, published=("Table 6",))


def main() -> int:
    """Run the scenario from the command line."""
    return start(code_update, CodeExperiment(), program="pipelines/code_update.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
