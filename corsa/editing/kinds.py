"""The kinds of steps of an update, besides those of the pipelines (`corsa.experiments.kinds`)."""

from __future__ import annotations

from corsa.flow import Kind, StepFunction


def _import_line() -> StepFunction:
    from corsa.editing.steps import import_line

    return import_line


def _read_facts() -> StepFunction:
    from corsa.editing.steps import read_facts

    return read_facts


def _ask_old_answers() -> StepFunction:
    from corsa.editing.old_answers import complete

    return complete


def _take_standing() -> StepFunction:
    from corsa.editing.steps import take_standing

    return take_standing


def _take_back() -> StepFunction:
    from corsa.editing.steps import take_back

    return take_back


def _ask_server() -> StepFunction:
    from corsa.editing.served import answer

    return answer


def _run_harness() -> StepFunction:
    from corsa.editing.harness import run_tasks

    return run_tasks


def _take_few() -> StepFunction:
    from corsa.editing.tuning_steps import take_few

    return take_few


def _choose() -> StepFunction:
    from corsa.editing.tuning_steps import choose

    return choose


LINE = Kind("line", _import_line, version=1)
FACTS = Kind("edits", _read_facts, version=4)
ASKED_FACTS = Kind("edits", _ask_old_answers, version=4, on_cluster=True)
STANDING = Kind("edits", _take_standing, version=1)
TAKEN_BACK = Kind("edits", _take_back, version=1)
FEW_FACTS = Kind("edits", _take_few, version=1)
CHOICE = Kind("choice", _choose, version=1)
HARNESS = Kind("harness", _run_harness, version=1, on_cluster=True)
SERVED = Kind("served", _ask_server, version=1)
