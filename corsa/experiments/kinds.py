"""The kinds of steps that scenarios are made of. Each imports its function when the first step of the kind is run.

Raise a `version` when the results of the function change: results of the old version are then not used.
"""

from __future__ import annotations

from corsa.flow import Kind, StepFunction


def _read_edits() -> StepFunction:
    from corsa.experiments.steps import read_edits

    return read_edits


def _take_part() -> StepFunction:
    from corsa.experiments.steps import take_part

    return take_part


def _reference() -> StepFunction:
    from corsa.training.reference import compute

    return compute


def _assign_rounds() -> StepFunction:
    from corsa.experiments.steps import assign_rounds

    return assign_rounds


def _read_questions() -> StepFunction:
    from corsa.experiments.steps import read_questions

    return read_questions


def _run_rounds() -> StepFunction:
    from corsa.training.rounds import run

    return run


def _merge_adapters() -> StepFunction:
    from corsa.experiments.steps import merge_adapters

    return merge_adapters


def _make_report() -> StepFunction:
    from corsa.experiments.steps import make_report

    return make_report


def _join_reports() -> StepFunction:
    from corsa.experiments.steps import join_reports

    return join_reports


def _join_sizes() -> StepFunction:
    from corsa.experiments.scaling import join_sizes

    return join_sizes


EDITS = Kind("edits", _read_edits, version=4)
PART = Kind("part", _take_part, version=1)
REFERENCE = Kind("reference", _reference, version=2, on_cluster=True)
SCHEDULE = Kind("schedule", _assign_rounds, version=1)
QUESTIONS = Kind("questions", _read_questions, version=1)
ROUND = Kind("round", _run_rounds, version=2, on_cluster=True, together=True)
MERGE = Kind("merge", _merge_adapters, version=1)
REPORT = Kind("report", _make_report, version=5)
PAPER = Kind("report", _join_reports, version=3)
SCALING = Kind("report", _join_sizes, version=2)
