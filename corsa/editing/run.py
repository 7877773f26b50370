"""Carrying a planned update or evaluation out: steps, gates, and the directory that is left."""

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
from corsa.editing.thresholds import Verdict, judged
from corsa.errors import StepsFailedError
from corsa.experiments.runner import bring_about, lasting
from corsa.experiments.trackers import track_run
from corsa.flow import Store
from corsa.flow.store import Artifact


@dataclass(frozen=True)
class Result:
    """What an update or an evaluation found.

    Attributes:
        metrics: as `corsa.evaluation.metrics.compute` gives them, with `controls`, the everyday questions.
        predictions: one row per wording asked (`corsa.evaluation.predict`).
        report: the page.
        verdicts: the gates that were set.
        out: the directory of the new adapter; None for an evaluation.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    report: Path
    verdicts: list[Verdict] = field(default_factory=list)
    out: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def values(self) -> dict[str, float | None]:
        """The main metrics, {name: value}; shares from 0 to 1, None where there is nothing to measure."""
        return {name: entry["value"] for name, entry in headline(self.metrics).items()}


def teach(options: Teaching, plan: Plan, console: Console) -> Result:
    """Run what is not done yet of an update, and write its directory.

    Raises:
        StepsFailedError: a step failed; which, and why, has been said on the console.
        CorsaError: the store or the directory cannot be written to, or the cluster cannot be had.
    """
    store = Store(lasting(options.storage))
    page = _finished(bring_about(plan.report, store, console))
    out = write(options, plan, page, store)
    return _result(page, options, out, console)


def evaluate(options: EvaluateOptions, console: Console) -> Result:
    """Run what is not done yet of an evaluation.

    Raises: as `teach`, and CorsaError for what is wrong with the options.
    """
    _, report = plan_evaluation(options)
    page = bring_about(report, Store(lasting(options.storage)), console)
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
    return Result(metrics, predictions, report, judged(options.gates, metrics), out)
