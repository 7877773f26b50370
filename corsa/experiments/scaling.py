"""Editing against model size (Fig. 4): what each size learnt and forgot, its cost, and the trend."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from scipy.stats import linregress

from corsa.config.steps import ReportConfig, ScalingConfig
from corsa.experiments.steps import about
from corsa.flow.task import Task
from corsa.report.page import Scenario, write_paper
from corsa.report.sizes import page_of_sizes

MEASURES = {
    "generality": "share",
    "forgetting": "share",
    "training_s": "s",
    "worker_hours": "h",
    "peak_memory": "bytes",
}
"""Measures plotted against size, with units. training_s: sum over all rounds; worker_hours: hours of all rounds,
evaluation included, times the number of workers (GPU hours if each has a GPU); peak_memory: maximum of one worker over
all rounds."""

SIZES = 3
"""Minimum number of sizes for a trend: a line fits any two points."""


def join_sizes(task: Task) -> dict[str, Any]:
    """Step function: the reports of several models -> one page, scaling.json, and their metrics by report."""
    config: ScalingConfig = task.config
    points: list[dict[str, Any]] = []
    scenarios, metrics = {}, {}
    for name, artifact in task.inputs.items():
        run, found = json.loads(artifact.read("run.json")), json.loads(artifact.read("metrics.json"))
        metrics[name] = found
        answers, curves = (pd.read_parquet(artifact.local(f"{table}.parquet")) for table in ("predictions", "curves"))
        scenarios[run["title"]] = Scenario(found, answers, curves, run)
        points += _points(task, name, found)
    scaling = {"points": points, "fits": fits(points), "missing": config.missing}
    run = about(task, config)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (task.output / "scaling.json").write_text(json.dumps(scaling, indent=1, allow_nan=False))
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_paper(task.output, scenarios, run, page_of_sizes(scaling))
    return {"points": len(points), "missing": len(config.missing)}


def _points(task: Task, name: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One point per method of a report."""
    config: ScalingConfig = task.config
    report = task.step.inputs[name]
    assert isinstance(report.config, ReportConfig)
    rows = {row["method"]: row["metrics"] for row in metrics["rows"]}
    points = []
    for method in dict.fromkeys(shown.method for shown in report.config.shown if shown.method != "base"):
        steps = [report.inputs[shown.answers] for shown in report.config.shown if shown.method == method]
        records = [task.store.artifact(step.fingerprint).record for step in steps]
        seeds = len(metrics["seeds"]) or 1
        taken = [record.metrics for record in records]
        point = {"model": config.models[name], "benchmark": config.benchmarks[name], "method": method}
        point |= {"parameters": max((t["parameters"] for t in taken if t.get("parameters")), default=None)}
        point |= {measure: rows[method][measure] for measure in ("generality", "forgetting")}
        point["training_s"] = metrics["cost"].get(method, 0.0)
        point["worker_hours"] = sum(r.seconds * r.metrics.get("workers", 1) for r in records) / 3600 / seeds
        point["peak_memory"] = max((t["peak_memory"] for t in taken if t.get("peak_memory")), default=None)
        points.append(point | {"gpu": any(t.get("gpu") for t in taken)})
    return points


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Linear fits of each measure of a method against log10 of the parameters, if there are enough sizes.

    Shares are fitted directly: `slope` is the change for ten times the parameters. Time and memory are fitted as
    log10: `slope` is the exponent of a power law. `p` tests slope 0 (two-sided, `scipy.stats.linregress`).
    """
    found = []
    for benchmark, method in dict.fromkeys((p["benchmark"], p["method"]) for p in points):
        own = [p for p in points if (p["benchmark"], p["method"]) == (benchmark, method)]
        for measure, unit in MEASURES.items():
            pairs = list(_pairs(own, measure, unit))
            if len({x for x, _ in pairs}) < SIZES:
                continue
            line: Any = linregress([x for x, _ in pairs], [y for _, y in pairs])
            about_line = {"slope": line.slope, "intercept": line.intercept, "r2": line.rvalue**2, "p": line.pvalue}
            found.append(
                {"benchmark": benchmark, "method": method, "measure": measure, "sizes": len(pairs)}
                | {name: float(v) if math.isfinite(v) else None for name, v in about_line.items()}
            )
    return found


def _pairs(points: Iterable[dict[str, Any]], measure: str, unit: str) -> Iterable[tuple[float, float]]:
    for point in points:
        value = point[measure]["value"] if unit == "share" else point[measure]
        if point["parameters"] and value is not None and (unit == "share" or value > 0):
            yield math.log10(point["parameters"]), value if unit == "share" else math.log10(value)
