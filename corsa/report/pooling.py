"""Several runs as one: their answers in one table, and the metrics of all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import mean
from typing import Any

import pandas as pd

from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.evaluation.prepared_predictions import BASE
from corsa.report.findings import label
from corsa.report.page import Scenario

_ALIKE = ("rule", "protocol", "kinds")
_QUESTION = ["edit", "kind", "probe", "wording", "draw"]


def pooled(runs: Mapping[str, Scenario]) -> Scenario:
    """The runs as one scenario.

    Runs of the same method with other seeds become several seeds of this method. If two runs have the same method and
    seed, they are two methods, named with the start of the run's id.

    Args:
        runs: {id: run}, two or more.

    Raises:
        CorsaError: the runs were asked or judged differently, or are of different base models.
    """
    first = next(iter(runs.values()))
    for id_, run in runs.items():
        for name in _ALIKE:
            if (mine := run.metrics.get(name)) != (theirs := first.metrics.get(name)):
                raise CorsaError(f"run {id_} has the {name} {mine!r}, the first run {theirs!r}: they cannot be pooled")
        if _model(run) != _model(first):
            raise CorsaError(
                f"run {id_} is of model {_model(run)}, the first of {_model(first)}: they cannot be pooled"
            )
    owners = Counter(pair for run in runs.values() for pair in _adapters(run))
    twice = {method for (method, _), count in owners.items() if count > 1}
    predictions = pd.concat([_named(run.predictions, id_, twice) for id_, run in runs.items()], ignore_index=True)
    base = predictions.method == BASE
    once = predictions[base].drop_duplicates(_QUESTION)  # the same model was asked in every run
    predictions = pd.concat([once, predictions[~base]], ignore_index=True)
    curves = [_named(run.curves, id_, twice) for id_, run in runs.items() if not run.curves.empty]
    known = first.metrics
    metrics = compute(
        predictions,
        rule=known["rule"],
        protocol=known["protocol"],
        kinds=known["kinds"],
        taught_questions=bool(known.get("forgotten")),
        primary=[name for name in known.get("primary", ()) if name in known["definitions"]],
    )
    metrics |= {"headlines": known["headlines"]} if "headlines" in known else {}
    metrics["looks_back"] = [
        f"{method} {id_}" if method in twice else method
        for id_, run in runs.items()
        for method in run.metrics.get("looks_back", ())
    ]
    metrics["cost"] = _cost(runs, twice)
    return Scenario(
        metrics, predictions, pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(), _about(runs)
    )


def _model(run: Scenario) -> Any:
    return ((run.run.get("config") or {}).get("model") or {}).get("name")


def _adapters(run: Scenario) -> set[tuple[str, int]]:
    edited = run.predictions[run.predictions.method != BASE]
    return {(str(method), int(seed)) for method, seed in zip(edited.method, edited.seed, strict=True)}


def _cost(runs: Mapping[str, Scenario], twice: set[str]) -> dict[str, float]:
    """Each method's training time, as a mean over the seeds of all runs."""
    times: dict[str, list[float]] = {}
    for id_, run in runs.items():
        for method, seconds in (run.metrics.get("cost") or {}).items():
            seeds = sum(name == method for name, _ in _adapters(run))
            times.setdefault(f"{method} {id_}" if method in twice else method, []).extend([seconds] * seeds)
    return {method: mean(own) for method, own in times.items() if own}


def _named(rows: pd.DataFrame, id_: str, twice: set[str]) -> pd.DataFrame:
    names = rows.method.astype(str)
    return rows.assign(method=names.where(~names.isin(twice), names + f" {id_}"))


def _about(runs: Mapping[str, Scenario]) -> dict[str, Any]:
    """What the page says of the runs (`corsa.report.page.write_report`)."""
    about = [run.run for run in runs.values()]
    titles = list(dict.fromkeys(str(one.get("title", "")) for one in about))
    notes = [
        f"Run {id_}: {_listed(_adapters(run))}, {run.run.get('title', '')}, {str(run.run.get('created', ''))[:16]} UTC."
        for id_, run in runs.items()
    ]
    return {
        "title": f"{len(runs)} runs pooled: {'; '.join(titles)}",
        "seconds": sum(one.get("seconds") or 0 for one in about),
        "command": "\n".join(str(one.get("command", "")) for one in about),
        "skipped": [entry for one in about[:1] for entry in one.get("skipped") or []],
        "versions": about[0].get("versions"),
        "hardware": about[0].get("hardware"),
        "notes": notes,
    }


def _listed(adapters: set[tuple[str, int]]) -> str:
    seeds: dict[str, list[int]] = {}
    for method, seed in sorted(adapters):
        seeds.setdefault(method, []).append(seed)
    return ", ".join(f"{label(m)} (seed{'s' * (len(s) > 1)} {', '.join(map(str, s))})" for m, s in seeds.items())
