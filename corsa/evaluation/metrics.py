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
from typing import Any, get_args

import numpy as np
import pandas as pd

from corsa.config.evaluation import ProbeKind
from corsa.evaluation.metric_definitions import METRICS, Columns, Metric
from corsa.evaluation.prepared_predictions import BASE, check, prepared
from corsa.evaluation.tallies import NOTHING, Asked, Cell, Counted, Tally, tallies
from corsa.evaluation.uncertainty import LEVEL, Difference, difference, interval, sample_interval
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
        "exact". `interval` is "facts and seeds", "facts" (one seed), "exact" or "sample" (a sample of the earlier facts
        was asked: the value is an estimate of that over all facts, and the interval is the error of this estimate). A
        comparison is described in `corsa.evaluation.verdicts`. `recheck` is {asked, of}: earlier facts asked after the
        last round, and all earlier facts; None if all were asked.

    Raises:
        CorsaError: no rows, missing columns, an unknown rule, protocol or primary metric.
    """
    check(predictions, rule, protocol)
    taught = [name for name in dict.fromkeys(predictions.method.unique().astype(str)) if name != BASE]
    methods = [BASE] * bool((predictions.method == BASE).any()) + taught
    edited = predictions[predictions.method != BASE]
    last = int(edited.trained.max()) if len(edited) else int(predictions.learnt.max())
    asked_last = set(edited.method[edited.trained == last].unique())
    pairs = [
        (a, b)
        for a, b in combinations(taught, 2)
        if a in asked_last and b in asked_last and compare_with in (None, a, b)
    ]
    how = {"rule": rule, "protocol": protocol, "taught_questions": taught_questions}
    found = tallies(predictions, how, pairs, last, BASE)
    rounds = sorted({number for _, number in found.cells})
    cells = {
        key: {name: Tally.joined(parts) for name, parts in metrics.items()} for key, metrics in found.cells.items()
    }

    def row(method: str, number: int) -> dict[str, Any]:
        key = method, number
        asked = found.asked.get(key, Asked())
        return {
            "method": method,
            "round": number,
            "metrics": {
                name: _value(name, cells[key][name] if key in cells else NOTHING, asked, key, rule) for name in METRICS
            },
        }

    series = [row(method, number) for method in methods for number in rounds]
    _say_what_was_not_asked(series, kinds)
    result = [entry for entry in series if entry["round"] == last]
    if rule != "exact":
        _add_exact(result, found.exact)
    compared = [_comparison(name, last, a, b, found.pairs[a, b][name]) for a, b in pairs for name in METRICS]
    comparisons = judged(
        [one for one in compared if one],
        primary=primary,
        pairs=planned_pairs(taught, compare_with),
        better={name: metric.better for name, metric in METRICS.items()},
    )
    return {
        "rule": rule,
        "protocol": protocol,
        "kinds": None if kinds is None else list(kinds),
        "level": LEVEL,
        "probe_kind": "paraphrase" if found.paraphrases else "edit",
        "fallback": sorted(found.fallback),
        "forgotten": {
            method: forgotten(found.asked[method, last])
            for method in taught
            if taught_questions and (method, last) in cells
        },
        "recheck": _recheck(edited[edited.trained == last]),
        "standing": "evaluation" if (predictions.part == "evaluation").any() else "earlier",
        "over": "cases" if found.cases < found.chains else "facts",
        "primary": list(primary),
        "rounds": rounds,
        "methods": methods,
        "seeds": sorted(found.seeds),
        "chains": found.chains,
        "draws": found.draws,
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
            method: [_by_round_asked(found.asked.get((method, r), Asked()), rounds) for r in rounds]
            for method in methods
        },
        "comparisons": comparisons,
    }


def _recheck(rows: pd.DataFrame) -> dict[str, int] | None:
    """How many earlier facts were asked, of how many; None if all were. `rows`: of the last round."""
    if "weight" not in rows.columns:
        return None
    drawn = rows[rows.weight > 1].drop_duplicates("chain")
    return {"asked": len(drawn), "of": round(float(drawn.weight.sum()))} if len(drawn) else None


def forgotten(asked: Asked) -> dict[str, Any]:
    """The counts behind `forgetting`, for standing facts: {facts, taught: {right, lost}, other: {right, lost}}.
    `taught`: the questions as taught; `other`: other wordings; `right`: right when learnt; `lost`: of these, wrong now.
    """
    facts, right, lost, other_right, other_lost = (int(count) for count in asked.learnt)
    return {
        "facts": facts,
        "taught": {"right": right, "lost": lost},
        "other": {"right": other_right, "lost": other_lost},
    }


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


def _add_exact(rows: list[dict[str, Any]], cells: Mapping[Cell, Mapping[str, Sequence[Tally]]]) -> None:
    """Adds to each share that depends on the rule its value by the rule "exact"."""
    for row in rows:
        cell = cells.get((row["method"], row["round"]))
        for name, entry in row["metrics"].items():
            metric = METRICS[name]
            if cell is None or not metric.matched or metric.unit != "share" or entry["value"] is None:
                continue
            ratio = Tally.joined(cell[name]).sums().ratio
            entry["exact"] = None if math.isnan(ratio) else ratio


def _by_round_asked(asked: Asked, rounds: list[int]) -> list[dict[str, Any] | None]:
    """One row of a matrix: for the facts of each round, the share of wordings answered right."""
    entries: list[dict[str, Any] | None] = []
    for number in rounds:
        if number not in asked.by_round:
            entries.append(None)
            continue
        right, wordings, edits, probes = (int(count) for count in asked.by_round[number])
        entries.append({"value": right / wordings, "edits": edits, "probes": probes})
    return entries


def measure(name: str, predictions: pd.DataFrame, *, rule: str, protocol: str) -> float | None:
    """One metric of one method after its last round, without an interval; None if there is nothing to count.

    `predictions` has the rows of one method, and those of the base model if the metric compares with them.
    """
    rows = prepared(predictions, rule, protocol)
    rows = rows[(rows.method != BASE) & (rows.trained == rows.trained.max())]
    value = Counted.of(METRICS[name], Columns(rows)).tally().sums().ratio
    return None if math.isnan(value) else value


def _value(name: str, tally: Tally, asked: Asked, cell: Cell, rule: str) -> dict[str, Any]:
    """One metric of one method after one round, over all its seeds."""
    metric, (method, _) = METRICS[name], cell
    sums = tally.sums()
    entry: dict[str, Any] = {
        "value": None,
        "low": None,
        "high": None,
        "interval": None,
        "edits": int((sums.denominator > 0).any(1).sum()),
        "probes": tally.probes,
        "rule": rule if metric.matched else None,
        "seeds": None,
        "reason": None,
    }
    if math.isnan(sums.ratio) or (method == BASE and name == "agreement"):
        return entry | {"edits": 0, "probes": 0, "reason": _reason(name, asked, tally.rows, cell)}
    share, drawn = metric.unit == "share", tally.weight > 1
    if drawn.any():
        parts = (tally.only(chosen).sums() for chosen in (~drawn, drawn))
        low, high, source = sample_interval(*parts, weight=float(tally.weight[drawn][0]), share=share)
    else:
        low, high, source = interval(sums, share=share)
    entry |= {"value": sums.ratio, "low": low, "high": high, "interval": source}
    if source is None:
        entry["reason"] = "no interval: one fact only, or all facts alike"
    seeds = np.unique(tally.seed)
    if len(seeds) > 1:
        ratios = {str(seed): tally.of_seeds(seed).sums().ratio for seed in seeds}
        ratios = {seed: ratio for seed, ratio in ratios.items() if not math.isnan(ratio)}
        entry["seeds"] = {
            "values": ratios,
            "spread": float(np.std(list(ratios.values()), ddof=1)) if len(ratios) > 1 else None,
        }
    return entry


def _comparison(
    name: str, number: int, a: str, b: str, parts: Sequence[tuple[Tally, Tally, int]]
) -> tuple[dict[str, Any], Difference] | None:
    """The metric of `a` minus that of `b`, on the probes and seeds common to both, after the same round. None if either
    has no value.
    """
    ours, theirs = Tally.joined([part[0] for part in parts]), Tally.joined([part[1] for part in parts])
    seeds = np.intersect1d(ours.seed[ours.denominator > 0], theirs.seed[theirs.denominator > 0])
    ours, theirs = ours.of_seeds(seeds), theirs.of_seeds(seeds)
    units = np.union1d(ours.unit, theirs.unit)
    mine, other = ours.sums(units), theirs.sums(units)
    if math.isnan(mine.ratio) or math.isnan(other.ratio):
        return None
    found = difference(mine, other, share=METRICS[name].unit == "share")
    edits = int(((mine.denominator > 0) | (other.denominator > 0)).any(1).sum())
    probes = sum(part[2] for part in parts)
    return comparison(name, number, a, b, found, seeds=len(seeds), edits=edits, probes=probes), found


def _reason(name: str, asked: Asked, counted: int, cell: Cell) -> str:
    """Why there is nothing to count. `counted`: rows that the metric counts."""
    metric, (method, number) = METRICS[name], cell
    if method == BASE and metric.of in ("standing", "displaced"):
        return "the base model is taught nothing"
    if method == BASE and name == "agreement":
        return "this is the base model"
    if not asked.rows:
        return f"not asked after round {number}"
    if metric.of == "standing":
        if counted:
            return "none of these wordings was right when it was learnt"
        return (
            "no earlier answers to compare with"
            if asked.earlier
            else f"no fact learnt before round {number} is still valid"
        )
    if metric.of == "displaced":
        if counted:
            return "of none of these wordings the model had given the answer that counts"
        return f"no old answer had been displaced by round {number}"
    if metric.of in get_args(ProbeKind) and metric.of not in asked.kinds:
        return f"no {metric.of} probes in this data"
    if metric.of == "latest":
        return f"no fact was learnt in round {number}"
    return "nothing to compare with: the base model was not asked" if name == "agreement" else "no log-probabilities"
