"""Every answer of a run, encoded for the page's searchable table: distinct texts, and indices into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from corsa.evaluation.matching import normalise
from corsa.evaluation.prepared_predictions import BASE, RULES
from corsa.report.findings import label

SHOWN = 100_000
"""Answers on a page, about: a page of all answers of a large run is larger than a browser can open."""

OUTCOMES = ("took", "failed", "reverted", "changed", "unchanged")
"""Outcome of an answer: it gives the expected answer; neither that nor the old one; the old one. For a neighbor: it
differs from the base model's answer; it is the same.
"""

_GIVES = np.array(["neither", "new", "old", "both"])


def gives(rows: pd.DataFrame, rule: str) -> pd.Series:
    """What each answer of a predictions table gives under a rule: "new", "old", "both" or "neither"."""
    new, old = RULES[rule]
    found = rows[new].eq(True).to_numpy(int) + 2 * rows[old].eq(True).to_numpy(int)  # a null match is no match
    return pd.Series(_GIVES[found], index=rows.index)


def sampled(predictions: pd.DataFrame, most: int = SHOWN) -> pd.DataFrame:
    """All rows, or those of facts at even distances, about `most` in all. Columns of categories become text."""
    if len(predictions) > most:
        numbers, chains = pd.factorize(predictions.chain)
        chosen = np.zeros(len(chains), dtype=bool)
        chosen[np.linspace(0, len(chains) - 1, max(1, len(chains) * most // len(predictions))).astype(int)] = True
        predictions = predictions[chosen[numbers]]
    return text(predictions)


def text(predictions: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns of categories as text."""
    return predictions.astype({name: "str" for name, kind in predictions.dtypes.items() if kind == "category"})


def folded_answers(scenarios: Mapping[str, tuple[pd.DataFrame, str]]) -> dict[str, Any]:
    """All answers of scenarios {title: (predictions, rule)}.

    Returns:
        `rows`: the number of answers, `of`: of how many they are a sample (`sampled`). `columns`: {name: {"values":
        distinct values, "codes": one index per row}} for scenario, method, seed, trained, learnt, kind, question,
        expected, old, output, base (the unedited model's output, null if it was not asked), outcome (one of
        `OUTCOMES`), forgotten (right when learnt, wrong now).
        The base model's own rows are listed only if no other method was asked.
    """
    parts = [_answers(sampled(rows), rule).assign(scenario=title) for title, (rows, rule) in scenarios.items()]
    table = pd.concat(parts, ignore_index=True)
    of = sum(_shown(predictions) for predictions, _ in scenarios.values())
    columns = {}
    for name in table.columns:
        codes, values = pd.factorize(table[name], use_na_sentinel=False)
        columns[name] = {"values": [_plain(value) for value in values], "codes": codes.tolist()}
    return {"rows": len(table), "of": of, "columns": columns}


def _shown(predictions: pd.DataFrame) -> int:
    """How many rows a page of all answers has."""
    edited = int((predictions.method != BASE).sum())
    return edited or len(predictions)


def _answers(predictions: pd.DataFrame, rule: str) -> pd.DataFrame:
    asked = ["edit", "kind", "probe", "wording"]
    rows = predictions.assign(right=gives(predictions, rule).isin(["new", "both"]), gives=gives(predictions, rule))
    rows["said"] = rows.output.fillna("").map(normalise)
    base = rows[rows.method == BASE].drop_duplicates(asked)
    if (rows.method != BASE).any():
        rows = rows[rows.method != BASE]
    base = base[[*asked, "output", "said"]].rename(columns={"output": "base", "said": "base_said"})
    run = ["method", "seed", *asked, "draw"]
    then = rows[rows.trained == rows.learnt].drop_duplicates(run)[[*run, "right"]].rename(columns={"right": "then"})
    rows = rows.merge(base, on=asked, how="left").merge(then, on=run, how="left")
    # If the base model was not asked, a neighbor's true answer replaces its output.
    same = rows.said.eq(rows.base_said).where(rows.base_said.notna(), rows.right)
    of_fact = rows.gives.map({"new": "took", "both": "took", "old": "reverted", "neither": "failed"})
    neighbor = rows.kind == "neighbor"
    of_neighbor = same.map({True: "unchanged", False: "changed"})
    outcome = of_fact.where(~neighbor, of_neighbor)
    return pd.DataFrame(
        {
            "scenario": "",
            "method": rows.method.map(lambda name: label(str(name))),
            "seed": rows.seed,
            "trained": rows.trained,
            "learnt": rows.learnt,
            "kind": rows.kind,
            "question": rows.prompt,
            "expected": rows.answer,
            "old": rows.target_old.fillna(""),
            "output": rows.output.fillna(""),
            "base": rows.base,
            "outcome": outcome,
            "forgotten": rows.then.eq(True) & ~rows.right & ~neighbor,
        }
    )


def _plain(value: Any) -> Any:
    """Converts a value to a type that JSON supports."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
