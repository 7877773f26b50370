"""Runs a planned update or evaluation: its steps, its gates, and the output directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from corsa.editing.export import headline, write
from corsa.editing.options import EvaluateOptions, Teaching
from corsa.editing.plan import Plan, plan_evaluation
from corsa.editing.served import Comparison, last_compared
from corsa.editing.thresholds import Verdict, judged
from corsa.errors import StepsFailedError
from corsa.experiments.runner import lasting, produce
from corsa.experiments.trackers import track_run
from corsa.flow import Store
from corsa.flow.store import Artifact


@dataclass(frozen=True)
class Result:
    """The result of an update or an evaluation.

    Attributes:
        metrics: from `corsa.evaluation.metrics.compute`, with `controls`, the everyday questions.
        predictions: one row per wording asked (`corsa.evaluation.predict`).
        report: path of the HTML report.
        verdicts: result of each gate that was set.
        out: the directory of the new adapter; None for an evaluation.
        as_base: a server's answers compared with the base model's; else None.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    report: Path
    verdicts: list[Verdict] = field(default_factory=list)
    out: Path | None = None
    as_base: Comparison | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate was passed, and a server has its adapter applied."""
        return (self.as_base is None or self.as_base.applied) and all(verdict.passed for verdict in self.verdicts)

    @property
    def values(self) -> dict[str, float | None]:
        """The main metrics, {name: value}; shares from 0 to 1, None if there is nothing to measure."""
        return {name: entry["value"] for name, entry in headline(self.metrics).items()}


def teach(options: Teaching, plan: Plan, console: Console) -> Result:
    """Runs the unfinished steps of an update, and writes its directory.

    Raises:
        StepsFailedError: a step failed; the console shows which, and why.
        CorsaError: the store or the directory cannot be written, or no cluster is available.
    """
    store = Store(lasting(options.storage))
    page = _finished(produce(plan.report, store, console, options.quiet))
    out = write(options, plan, page, store)
    return _result(page, options, out, console)


def evaluate(options: EvaluateOptions, console: Console) -> Result:
    """Runs the unfinished steps of an evaluation.

    Raises: as `teach`, and CorsaError if an option is wrong.
    """
    _, report = plan_evaluation(options)
    page = produce(report, Store(lasting(options.storage)), console, options.quiet)
    return _result(_finished(page), options, None, console)


def _finished(page: Artifact | None) -> Artifact:
    if page is None:
        raise StepsFailedError("a step failed; its cause is above")
    return page


def _result(page: Artifact, options: Teaching | EvaluateOptions, out: Path | None, console: Console) -> Result:
    for place in track_run(options.track, page):
        console.print(f"tracked in {place}", markup=False, highlight=False, soft_wrap=True)
    metrics = json.loads(page.read("metrics.json"))
    predictions = pd.read_parquet(page.local("predictions.parquet"))
    report = out / "report.html" if out else page.local("report.html")
    endpoint = options.endpoint if isinstance(options, EvaluateOptions) else None
    as_base = last_compared(predictions) if endpoint else None
    return Result(metrics, predictions, report, judged(options.gates, metrics), out, as_base)
