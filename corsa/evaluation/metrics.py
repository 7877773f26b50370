"""What the numbers of a report are: pure functions of the predictions table.

One `Metric` says which rows count and what is summed over them; `compute` does so for every method and round, with
uncertainty over facts, and compares methods on the probes both were asked. Nothing here depends on how the
predictions were made, so any metric can be recomputed later from the stored table.

Two words: a fact is *standing* after round r if it was learnt in an earlier round and not revised since. A chain is
asked through its latest edit, so these are the rows with learnt < trained. Where the data has an evaluation set
(facts taught once, never revised: the temporal scenario), the standing facts are those of the evaluation set. And the
metrics on *wordings* use the paraphrases; data without any paraphrase falls back to the edit prompts, and the result
says so in `probe_kind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from corsa.evaluation.prepared_predictions import BASE, prepared
from corsa.evaluation.uncertainty import LEVEL, Sums, difference, interval

Counts = tuple[pd.Series, "pd.Series | int", "pd.Series | int"]


@dataclass(frozen=True)
class Metric:
    """One number: `count` maps rows to (which of them count, numerator, denominator); the value is sum / sum."""

    label: str
    text: str
    better: Literal["high", "low"]
    unit: Literal["share", "change", "points", "nats"]
    count: Callable[[pd.DataFrame], Counts]
    of: Literal["edit", "paraphrase", "wordings", "latest", "standing", "multihop", "neighbor"] = "wordings"
    matched: bool = True


METRICS: dict[str, Metric] = {
    "edit_success": Metric(
        "Edit success",
        "edit prompts answered with the new answer, over all facts still valid",
        "high",
        "share",
        lambda rows: (rows.kind == "edit", rows.right, 1),
        of="edit",
    ),
    "generality": Metric(
        "Generality",
        "paraphrases answered with the new answer, over all facts still valid",
        "high",
        "share",
        lambda rows: (rows.kind == "paraphrase", rows.right, 1),
        of="paraphrase",
    ),
    "efficacy": Metric(
        "Update efficacy",
        "wordings of the latest round's facts answered with the new answer",
        "high",
        "share",
        lambda rows: (rows.wordings & (rows.learnt == rows.trained), rows.right, 1),
        of="latest",
    ),
    "forgetting": Metric(
        "Forgetting",
        "of the wordings of standing facts answered right when they were learnt, the share that is wrong now",
        "low",
        "share",
        lambda rows: (rows.standing, rows.then & ~rows.right, rows.then),
        of="standing",
    ),
    "forgetting_relative": Metric(
        "Forgetting, net relative drop",
        "(right when learnt - right now) / right when learnt, on standing facts; later gains offset losses",
        "low",
        "change",
        lambda rows: (rows.standing, rows.then.astype(float) - rows.right, rows.then),
        of="standing",
    ),
    "forgetting_points": Metric(
        "Forgetting, drop in points",
        "share right when learnt minus share right now, on standing facts",
        "low",
        "points",
        lambda rows: (rows.standing, rows.then.astype(float) - rows.right, 1),
        of="standing",
    ),
    "retention": Metric(
        "Old knowledge retained",
        "wordings of all facts still valid that are answered with the old answer",
        "low",
        "share",
        lambda rows: (rows.wordings, rows.old, 1),
    ),
    "activation": Metric(
        "Old knowledge activated",
        "wordings of standing facts that give the old answer after later rounds",
        "low",
        "share",
        lambda rows: (rows.standing, rows.old, 1),
        of="standing",
    ),
    "activation_of_right": Metric(
        "Old knowledge activated, of those once right",
        "the same over the wordings answered right when they were learnt",
        "low",
        "share",
        lambda rows: (rows.standing, rows.then & rows.old, rows.then),
        of="standing",
    ),
    "multihop": Metric(
        "Multi-hop",
        "cases of which any wording of the multi-hop question is answered with the new answer",
        "high",
        "share",
        lambda rows: ((rows.kind == "multihop") & rows.leads, rows.any_right, 1),
        of="multihop",
    ),
    "neighborhood": Metric(
        "Neighborhood",
        "questions about neighbouring facts answered with their true answer",
        "high",
        "share",
        lambda rows: (rows.kind == "neighbor", rows.right, 1),
        of="neighbor",
    ),
    "agreement": Metric(
        "Neighborhood, agreement with base",
        "questions about neighbouring facts answered as the base model answers them (first line, normalised)",
        "high",
        "share",
        lambda rows: ((rows.kind == "neighbor") & rows.compared, rows.agrees, 1),
        of="neighbor",
        matched=False,
    ),
    "margin": Metric(
        "Margin",
        "mean of log p(new answer) - log p(old answer) in nats, over the scored wordings of facts still valid",
        "high",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_new - rows.logp_old, 1),
        matched=False,
    ),
    "logp_new": Metric(
        "log p(new answer)",
        "its first term: mean log-probability of the new answer, in nats",
        "high",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_new, 1),
        matched=False,
    ),
    "logp_old": Metric(
        "log p(old answer)",
        "its second term: mean log-probability of the old answer, in nats",
        "low",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_old, 1),
        matched=False,
    ),
}
"""Every metric by name, in the order of a report."""


def compute(
    predictions: pd.DataFrame, *, rule: str = "contains", protocol: str = "full", compare_with: str | None = None
) -> dict[str, Any]:
    """All metrics of a predictions table as plain JSON values.

    Args:
        predictions: the table described in `corsa.evaluation.predict`, one row per wording asked; the base model's
        rows are optional.
        rule: "contains" or "exact", the match that counts.
        protocol: "full" asks everything; "paper" counts one paraphrase an edit, the first.
        compare_with: the method that every other is compared with; by default each is compared with each.

    Returns:
        `rule`, `protocol`, `level`, `probe_kind` ("paraphrase" | "edit"), `standing` ("evaluation" | "earlier"),
        `rounds`, `methods`, `seeds`, `chains`, `definitions` {metric: {label, text, better, unit}}, `rows` (one per
        method, after the last round), `series` (one per method and round), `matrices` and `comparisons`. A matrix
        {method: rows} has a row for each round trained up to and in it an entry for each round whose facts are asked:
        {value: share of their wordings answered right, edits, probes}, null where none was. A row is {method, round,
        metrics: {name: value}}; a value is {value, low, high, interval, edits, probes, rule, seeds, reason}, with
        nulls and a reason where there is nothing to count. A comparison is {metric, round, a, b, difference, low,
        high, p, distinguishable, better, edits, probes}.

    Raises:
        CorsaError: no rows, missing columns, an unknown rule or protocol.
    """
    rows = prepared(predictions, rule, protocol)
    taught = [name for name in dict.fromkeys(predictions.method.astype(str)) if name != BASE]
    methods = [BASE] * bool((rows.method == BASE).any()) + taught
    rounds = sorted(int(number) for number in rows.trained.unique())
    cells = dict(iter(rows.groupby(["method", "trained"], sort=False)))
    empty = rows.iloc[:0]
    last = rounds[-1]

    def row(method: str, number: int) -> dict[str, Any]:
        cell = cells.get((method, number), empty)
        return {
            "method": method,
            "round": number,
            "metrics": {name: _value(name, cell, method, number, rule) for name in METRICS},
        }

    series = [row(method, number) for method in methods for number in rounds]
    pairs = [
        (a, b)
        for a, b in combinations(taught, 2)
        if (a, last) in cells and (b, last) in cells and compare_with in (None, a, b)
    ]
    compared = [_comparison(name, last, a, b, cells) for a, b in pairs for name in METRICS]
    return {
        "rule": rule,
        "protocol": protocol,
        "level": LEVEL,
        "probe_kind": "paraphrase" if (rows.kind[rows.wordings] == "paraphrase").any() else "edit",
        "standing": "evaluation" if (rows.part == "evaluation").any() else "earlier",
        "rounds": rounds,
        "methods": methods,
        "seeds": sorted({int(seed) for seed in rows.seed[rows.method != BASE]}),
        "chains": int(rows.chain.nunique()),
        "definitions": {
            name: {"label": metric.label, "text": metric.text, "better": metric.better, "unit": metric.unit}
            for name, metric in METRICS.items()
        },
        "rows": [entry for entry in series if entry["round"] == last],
        "series": series,
        "matrices": {
            method: [_by_round_asked(cells.get((method, r), empty), rounds) for r in rounds] for method in methods
        },
        "comparisons": [entry for entry in compared if entry],
    }


def _by_round_asked(cell: pd.DataFrame, rounds: list[int]) -> list[dict[str, Any] | None]:
    """One row of a matrix: of the facts each round taught, the share of wordings answered right."""
    asked = cell[cell.wordings]
    entries = []
    for number in rounds:
        found = asked[asked.learnt == number]
        entry = {"value": float(found.right.mean()), "edits": found.edit.nunique(), "probes": found.item.nunique()}
        entries.append(entry if len(found) else None)
    return entries


def measure(name: str, predictions: pd.DataFrame, *, rule: str, protocol: str) -> float | None:
    """One metric of one method after its last round, without an interval; None where there is nothing to count.

    `predictions` has one method's rows, and the base model's where the metric compares with them.
    """
    rows = prepared(predictions, rule, protocol)
    rows = rows[(rows.method != BASE) & (rows.trained == rows.trained.max())]
    value = _Counted.of(METRICS[name], rows).by_chain().ratio
    return None if math.isnan(value) else value


class _Counted(NamedTuple):
    """The rows a metric counts, as arrays of shape (rows,)."""

    chain: np.ndarray
    seed: np.ndarray
    item: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def of(cls, metric: Metric, cell: pd.DataFrame) -> _Counted:
        which, numerator, denominator = metric.count(cell)
        parts = (cell.chain_code, cell.seed, cell.item, numerator, denominator)
        chosen = which.to_numpy(bool)
        chain, seed, item, above, below = (np.broadcast_to(np.asarray(part), chosen.shape)[chosen] for part in parts)
        return cls(chain, seed, item, above.astype(float), below.astype(float))

    def only(self, chosen: np.ndarray) -> _Counted:
        return _Counted(*(part[chosen] for part in self))

    def by_chain(self) -> Sums:
        """Summed within each fact, in the order of the facts' codes."""
        _, fact = np.unique(self.chain, return_inverse=True)
        above, below = (np.bincount(fact, part).astype(float) for part in (self.numerator, self.denominator))
        return Sums(above, below)


def _value(name: str, cell: pd.DataFrame, method: str, number: int, rule: str) -> dict[str, Any]:
    """One metric of one method after one round, pooled over seeds; the fact stays the unit of the interval."""
    metric = METRICS[name]
    counted = _Counted.of(metric, cell)
    sums = counted.by_chain()
    entry: dict[str, Any] = {
        "value": None,
        "low": None,
        "high": None,
        "interval": None,
        "edits": int((sums.denominator > 0).sum()),
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
        ratios = {str(seed): counted.only(counted.seed == seed).by_chain().ratio for seed in seeds}
        ratios = {seed: ratio for seed, ratio in ratios.items() if not math.isnan(ratio)}
        entry["seeds"] = {
            "values": ratios,
            "spread": float(np.std(list(ratios.values()), ddof=1)) if len(ratios) > 1 else None,
        }
    return entry


def _comparison(name: str, number: int, a: str, b: str, cells: Mapping[Any, pd.DataFrame]) -> dict[str, Any] | None:
    """Metric of `a` minus that of `b` on the probes both were asked after the same round; None where either has no
    value.
    """
    metric = METRICS[name]
    first, second = (_Counted.of(metric, cells[method, number]) for method in (a, b))
    common = np.intersect1d(first.item, second.item)
    ours, theirs = (counted.only(np.isin(counted.item, common)).by_chain() for counted in (first, second))
    if math.isnan(ours.ratio) or math.isnan(theirs.ratio):
        return None
    found = difference(ours, theirs)
    distinguishable = found.p < 1 - LEVEL
    ahead = a if (found.value > 0) == (metric.better == "high") else b
    return {
        "metric": name,
        "round": number,
        "a": a,
        "b": b,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "distinguishable": bool(distinguishable),
        "better": ahead if distinguishable else None,
        "edits": int(((ours.denominator > 0) | (theirs.denominator > 0)).sum()),
        "probes": len(common),
    }


def _reason(name: str, cell: pd.DataFrame, counted: int, method: str, number: int) -> str:
    """Why there is nothing to count."""
    metric = METRICS[name]
    if method == BASE and metric.of == "standing":
        return "the base model is taught nothing"
    if method == BASE and name == "agreement":
        return "this is the base model"
    if cell.empty:
        return f"not asked after round {number}"
    if metric.of == "standing":
        if counted:
            return "none of these wordings was right when it was learnt"
        earlier = bool((cell.learnt < cell.trained).any())
        return (
            "no earlier answers to compare with" if earlier else f"no fact learnt before round {number} is still valid"
        )
    if metric.of in ("edit", "paraphrase", "multihop", "neighbor") and not (cell.kind == metric.of).any():
        return f"no {metric.of} probes in this data"
    if metric.of == "latest":
        return f"no fact was learnt in round {number}"
    return "nothing to compare with: the base model was not asked" if name == "agreement" else "no log-probabilities"
