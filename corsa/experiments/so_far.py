"""The report of what a run has finished so far, marked as partial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from corsa.config.steps import JoinedConfig, ReportConfig
from corsa.errors import CorsaError
from corsa.flow import Step, Store


def so_far(report: Step, store: Store) -> Step:
    """The report with those of its answers that are done. Its title says how many of them are missing.

    Raises:
        CorsaError: there is nothing to report yet.
    """
    found = _finished(report, store)
    if found is None:
        raise CorsaError(
            f"{report.name} has nothing to report yet: it needs the answers of the unedited model and of a method"
        )
    return found


def _finished(report: Step, store: Store) -> Step | None:
    from corsa.evaluation.prepared_predictions import BASE  # imports pandas: only for a report

    config = report.config
    if type(config) is JoinedConfig:
        parts = {name: part for name, step in report.inputs.items() if (part := _finished(step, store))}
        whole = sum(part is report.inputs[name] for name, part in parts.items())
        return _partial(report, parts, {}, whole, len(report.inputs), "scenarios")
    if not isinstance(config, ReportConfig):
        return report if store.find(report) else None
    inputs = {name: step for name, step in report.inputs.items() if store.find(step)}
    shown = tuple(one for one in config.shown if one.answers in inputs)
    if BASE not in {one.method for one in shown} or {one.method for one in shown} == {BASE}:
        return None
    parts = {
        name: tuple(one for one in getattr(config, name) if one.answers in inputs)
        for name in ("shown", "specificity", "everyday")
    }
    count, total = sum(map(len, parts.values())), sum(len(getattr(config, name)) for name in parts)
    return _partial(report, inputs, parts, count, total, "sets of answers")


def _partial(
    report: Step, inputs: dict[str, Step], change: Mapping[str, object], count: int, total: int, what: str
) -> Step | None:
    if not inputs:
        return None
    if count == total:
        return report
    assert isinstance(report.config, ReportConfig | JoinedConfig)
    title = f"{report.config.title} (partial: {count} of {total} {what})"
    return replace(report, inputs=inputs, config=report.config.model_copy(update={"title": title, **change}))
