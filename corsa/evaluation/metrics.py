"""The metrics of a report: pure functions of the predictions table.

A `Metric` defines which rows count and what is summed over them. `compute` evaluates it for every method and round,
with uncertainty over facts and seeds, and compares methods on the probes that both were asked. Nothing here depends on
how the predictions were made, so any metric can be recomputed later from the stored table.

The random unit of an interval is the fact (a chain of updates counts as one), or the case if several facts are asked
together (MQuAKE: column `case`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from corsa.config.evaluation import ProbeKind
from corsa.evaluation.metric_definitions import METRICS, Columns, Metric
from corsa.evaluation.prepared_predictions import BASE, prepared
from corsa.evaluation.uncertainty import LEVEL, Difference, Sums, difference, interval
from corsa.evaluation.verdicts import comparison, judged, planned_pairs


def compute(
    predictions: pd.DataFrame,
    *,
    rule: str = "contains",
    protocol: str = "full",
    compare_with: str | None = None,
    taught_questions: bool = False,
    kinds: Sequence[str] | None = None,
    primary: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics of a predictions table as plain JSON values.

    Args:
        predictions: the table described in `corsa.evaluation.predict`, one row per wording and draw. Rows of the base
            model are optional.
        rule: the match rule: "words", "contains" or "exact".
        protocol: "full" counts everything; "paper" and "authors" count only the first paraphrase of each edit.
        compare_with: compare every other method with this one; by default all pairs are compared.
        taught_questions: forgetting and activation count both the questions as taught and the other wordings (an update
            of `corsa edit`); by default only wordings (the paper's scenarios).
        kinds: the kinds of probes that were asked; by default all kinds in the data.
        primary: the metrics that get verdicts (`corsa.evaluation.verdicts`); all others are exploratory.

    Returns:
        `rule`, `protocol`, `kinds`, `level`, `probe_kind` ("paraphrase" | "edit": the metrics on wordings count edit
        prompts only), `fallback` (benchmarks without paraphrases), `standing` ("evaluation" | "earlier"), `over`
        ("facts" | "cases": what is resampled besides seeds), `primary`, `forgotten` ({method: see the function}; empty
        without `taught_questions`), `rounds`, `methods`, `seeds`, `chains`, `draws`, `definitions` {metric: {label,
        text, better, unit}}, `rows` (one per method, after the last round), `series` (one per method and round),
        `matrices` and `comparisons`. `matrices` is
        {method: rows}: one row per trained round, with one entry per round whose facts are asked:
        {value: share of their wordings answered right, edits, probes}, null if none was asked. A row is {method, round,
        metrics: {name: value}}; a value is {value, low, high, interval, edits, probes, rule, seeds, reason}, with
        nulls and a reason if there is nothing to count; in `rows` a share also has `exact`, the same by the rule
        "exact". `interval` is "facts and seeds", "facts" (one seed) or
        "exact". A comparison is described in `corsa.evaluation.verdicts`.

    Raises:
        CorsaError: no rows, missing columns, an unknown rule, protocol or primary metric.
    """
    rows = prepared(predictions, rule, protocol, taught_questions=taught_questions)
    taught = [name for name in dict.fromkeys(predictions.method.astype(str)) if name != BASE]
    methods = [BASE] * bool((rows.method == BASE).any()) + taught
    rounds = sorted(int(number) for number in rows.trained.unique())
    cells = dict(iter(rows.groupby(["method", "trained"], sort=False)))
    columns = {key: Columns(cell) for key, cell in cells.items()}
    empty = rows.iloc[:0]
    last = rounds[-1]

    def row(method: str, number: int) -> dict[str, Any]:
        cell = columns.get((method, number), Columns(empty))
        return {
            "method": method,
            "round": number,
            "metrics": {name: _value(name, cell, method, number, rule) for name in METRICS},
        }

    series = [row(method, number) for method in methods for number in rounds]
    _say_what_was_not_asked(series, kinds)
    result = [entry for entry in series if entry["round"] == last]
    if rule != "exact":
        strict = prepared(predictions, "exact", protocol, taught_questions=taught_questions)
        _add_exact(result, dict(iter(strict.groupby(["method", "trained"], sort=False))))
    pairs = [
        (a, b)
        for a, b in combinations(taught, 2)
        if (a, last) in cells and (b, last) in cells and compare_with in (None, a, b)
    ]
    compared = [_comparison(name, last, a, b, columns) for a, b in pairs for name in METRICS]
    comparisons = judged(
        [found for found in compared if found],
        primary=primary,
        pairs=planned_pairs(taught, compare_with),
        better={name: metric.better for name, metric in METRICS.items()},
    )
    return {
        "rule": rule,
        "protocol": protocol,
        "kinds": None if kinds is None else list(kinds),
        "level": LEVEL,
        "probe_kind": "paraphrase" if (rows.kind[rows.wordings] == "paraphrase").any() else "edit",
        "fallback": sorted(rows.benchmark[rows.wordings & (rows.kind == "edit")].unique()),
        "forgotten": {
            method: forgotten(cells[method, last]) for method in taught if taught_questions and (method, last) in cells
        },
        "standing": "evaluation" if (rows.part == "evaluation").any() else "earlier",
        "over": "cases" if rows.case.nunique() < rows.chain.nunique() else "facts",
        "primary": list(primary),
        "rounds": rounds,
        "methods": methods,
        "seeds": sorted({int(seed) for seed in rows.seed[rows.method != BASE]}),
        "chains": int(rows.chain.nunique()),
        "draws": int(rows.draw.max()) + 1,
        "definitions": {
            name: {
                "label": metric.label,
                "text": _text(metric, taught_questions),
                "better": metric.better,
                "unit": metric.unit,
            }
            for name, metric in METRICS.items()
        },
        "rows": result,
        "series": series,
        "matrices": {
            method: [_by_round_asked(cells.get((method, r), empty), rounds) for r in rounds] for method in methods
        },
        "comparisons": comparisons,
    }


def forgotten(cell: pd.DataFrame) -> dict[str, Any]:
    """The counts behind `forgetting`, for standing facts: {facts, taught: {right, lost}, other: {right, lost}}.
    `taught`: the questions as taught; `other`: other wordings; `right`: right when learnt; `lost`: of these, wrong now.
    `cell`: the rows of one method after one round.
    """
    learnt = cell[cell.standing & cell.then]
    parts = {"taught": learnt[learnt.kind == "edit"], "other": learnt[learnt.kind != "edit"]}
    counts = {name: {"right": len(part), "lost": int((~part.right).sum())} for name, part in parts.items()}
    return {"facts": int(learnt.chain.nunique()), **counts}


def _text(metric: Metric, taught_questions: bool) -> str:
    if taught_questions and metric.of == "standing":
        return f"{metric.text}; wordings: the questions as taught, and other wordings"
    return metric.text


def _say_what_was_not_asked(series: list[dict[str, Any]], kinds: Sequence[str] | None) -> None:
    """Set the reason of values that are missing because their probes were not asked."""
    for row in series:
        for name, entry in row["metrics"].items():
            kind = METRICS[name].of
            if kinds is not None and entry["value"] is None and kind in get_args(ProbeKind) and kind not in kinds:
                entry["reason"] = f"{kind} probes were not asked (see --evaluation.protocol and --evaluation.probes)"


def _add_exact(rows: list[dict[str, Any]], cells: Mapping[Any, pd.DataFrame]) -> None:
    """Adds to each share that depends on the rule its value by the rule "exact"."""
    for row in rows:
        cell = cells.get((row["method"], row["round"]))
        for name, entry in row["metrics"].items():
            metric = METRICS[name]
            if cell is None or not metric.matched or metric.unit != "share" or entry["value"] is None:
                continue
            ratio = _Counted.of(metric, Columns(cell)).sums().ratio
            entry["exact"] = None if math.isnan(ratio) else ratio


def _by_round_asked(cell: pd.DataFrame, rounds: list[int]) -> list[dict[str, Any] | None]:
    """One row of a matrix: for the facts of each round, the share of wordings answered right."""
    asked = cell.loc[cell.wordings, ["learnt", "right", "edit", "item"]]
    entries = []
    for number in rounds:
        found = asked[asked.learnt == number]
        entry = {"value": float(found.right.mean()), "edits": found.edit.nunique(), "probes": found.item.nunique()}
        entries.append(entry if len(found) else None)
    return entries


def measure(name: str, predictions: pd.DataFrame, *, rule: str, protocol: str) -> float | None:
    """One metric of one method after its last round, without an interval; None if there is nothing to count.

    `predictions` has the rows of one method, and those of the base model if the metric compares with them.
    """
    rows = prepared(predictions, rule, protocol)
    rows = rows[(rows.method != BASE) & (rows.trained == rows.trained.max())]
    value = _Counted.of(METRICS[name], Columns(rows)).sums().ratio
    return None if math.isnan(value) else value


class _Counted(NamedTuple):
    """The rows a metric counts, as arrays of shape (rows,); `unit` is the fact or case they belong to."""

    unit: np.ndarray
    seed: np.ndarray
    item: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def of(cls, metric: Metric, cell: Columns) -> _Counted:
        chosen, numerator, denominator = metric.count(cell)
        parts = (cell.unit_code, cell.seed, cell.item, numerator, denominator)
        unit, seed, item, above, below = (np.broadcast_to(part, chosen.shape)[chosen] for part in parts)
        return cls(unit, seed, item, above.astype(float), below.astype(float))

    def only(self, chosen: np.ndarray) -> _Counted:
        return _Counted(*(part[chosen] for part in self))

    def sums(self, units: np.ndarray | None = None) -> Sums:
        """Sums per unit and seed, in the order of `units` (by default the counted units) and of the seeds."""
        units = np.unique(self.unit) if units is None else units
        seeds, column = np.unique(self.seed, return_inverse=True)
        cell = np.searchsorted(units, self.unit) * len(seeds) + column
        size = len(units) * len(seeds)
        parts = (np.bincount(cell, part, minlength=size) for part in (self.numerator, self.denominator))
        return Sums(*(part.astype(float).reshape(len(units), len(seeds)) for part in parts))


def _value(name: str, cell: Columns, method: str, number: int, rule: str) -> dict[str, Any]:
    """One metric of one method after one round, over all its seeds."""
    metric = METRICS[name]
    counted = _Counted.of(metric, cell)
    sums = counted.sums()
    entry: dict[str, Any] = {
        "value": None,
        "low": None,
        "high": None,
        "interval": None,
        "edits": int((sums.denominator > 0).any(1).sum()),
        "probes": len(np.unique(counted.item[counted.denominator > 0])),
        "rule": rule if metric.matched else None,
        "seeds": None,
        "reason": None,
    }
    if math.isnan(sums.ratio) or (method == BASE and name == "agreement"):
        return entry | {"edits": 0, "probes": 0, "reason": _reason(name, cell, len(counted.item), method, number)}
    low, high, source = interval(sums, share=metric.unit == "share")
    entry |= {"value": sums.ratio, "low": low, "high": high, "interval": source}
    if source is None:
        entry["reason"] = "no interval: one fact only, or all facts alike"
    seeds = np.unique(counted.seed)
    if len(seeds) > 1:
        ratios = {str(seed): counted.only(counted.seed == seed).sums().ratio for seed in seeds}
        ratios = {seed: ratio for seed, ratio in ratios.items() if not math.isnan(ratio)}
        entry["seeds"] = {
            "values": ratios,
            "spread": float(np.std(list(ratios.values()), ddof=1)) if len(ratios) > 1 else None,
        }
    return entry


def _comparison(
    name: str, number: int, a: str, b: str, cells: Mapping[Any, Columns]
) -> tuple[dict[str, Any], Difference] | None:
    """The metric of `a` minus that of `b`, on the probes and seeds common to both, after the same round. None if either
    has no value.
    """
    metric = METRICS[name]
    both = [_Counted.of(metric, cells[method, number]) for method in (a, b)]
    items = np.intersect1d(both[0].item, both[1].item)
    both = [counted.only(np.isin(counted.item, items)) for counted in both]
    seeds = np.intersect1d(both[0].seed[both[0].denominator > 0], both[1].seed[both[1].denominator > 0])
    both = [counted.only(np.isin(counted.seed, seeds)) for counted in both]
    units = np.union1d(both[0].unit, both[1].unit)
    ours, theirs = (counted.sums(units) for counted in both)
    if math.isnan(ours.ratio) or math.isnan(theirs.ratio):
        return None
    found = difference(ours, theirs, share=metric.unit == "share")
    edits = int(((ours.denominator > 0) | (theirs.denominator > 0)).any(1).sum())
    return comparison(name, number, a, b, found, seeds=len(seeds), edits=edits, probes=len(items)), found


def _reason(name: str, cell: Columns, counted: int, method: str, number: int) -> str:
    """Why there is nothing to count."""
    metric = METRICS[name]
    if method == BASE and metric.of in ("standing", "displaced"):
        return "the base model is taught nothing"
    if method == BASE and name == "agreement":
        return "this is the base model"
    if not len(cell.seed):
        return f"not asked after round {number}"
    if metric.of == "standing":
        if counted:
            return "none of these wordings was right when it was learnt"
        earlier = bool((cell.learnt < cell.trained).any())
        return (
            "no earlier answers to compare with" if earlier else f"no fact learnt before round {number} is still valid"
        )
    if metric.of == "displaced":
        if counted:
            return "of none of these wordings the model had given the answer that counts"
        return f"no old answer had been displaced by round {number}"
    if metric.of in get_args(ProbeKind) and not (cell.kind == metric.of).any():
        return f"no {metric.of} probes in this data"
    if metric.of == "latest":
        return f"no fact was learnt in round {number}"
    return "nothing to compare with: the base model was not asked" if name == "agreement" else "no log-probabilities"
