"""Whether a model can do less after an edit: measures before and after, paired item by item.

An item is an everyday question, a passage of the neutral text, or a document of a task of the evaluation harness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from corsa.evaluation.uncertainty import Sums, difference

PERPLEXITY = "perplexity of the neutral text"
EVERYDAY = "everyday questions"

MEASURED = pa.schema(
    [
        ("measure", pa.string()),
        ("item", pa.string()),
        ("numerator", pa.float64()),  # score; for the perplexity -log p in nats
        ("denominator", pa.float64()),  # 1; for the perplexity tokens
        ("higher_is_better", pa.bool_()),
    ]
)
"""What the steps write that measure a model: one row per measure and item."""


def everyday(rows: Iterable[Mapping[str, Any]], right: str) -> list[dict[str, Any]]:
    """The everyday questions of a report (`controls.asked`) as rows of `MEASURED`. `right`: right_before or right."""
    return [
        {"measure": EVERYDAY, "item": row["question"], "numerator": float(row[right]), "denominator": 1.0}
        | {"higher_is_better": True}
        for row in rows
    ]


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How each measure changed, over the items that both have.

    Returns:
        One {measure, items, before, now, loss, low, high} per measure. `loss` is how much worse it is now, with its
        95 % interval over items: before - now of a mean score, from -1 to 1 for a share of right answers; for the
        perplexity and scores that are better if lower, the relative rise (0.1: ten percent higher). Both ends are None
        if the items give no interval.
    """
    found = []
    for measure in dict.fromkeys(row["measure"] for row in before):
        old, new = ({r["item"]: r for r in rows if r["measure"] == measure} for rows in (before, now))
        items = [item for item in old if item in new]
        if not items:
            continue
        sums = [
            Sums(*(np.array([side[i][part] for i in items], dtype=float) for part in ("numerator", "denominator")))
            for side in (old, new)
        ]
        high_is_good = bool(old[items[0]]["higher_is_better"])
        found.append({"measure": measure, "items": len(items), **_loss(measure, sums[0], sums[1], high_is_good)})
    return found


def _loss(measure: str, before: Sums, now: Sums, high_is_good: bool) -> dict[str, Any]:
    first, last = before.ratio, now.ratio
    if high_is_good:
        share = bool(np.isin(np.concatenate([before.numerator, now.numerator]), (0.0, 1.0)).all())
        change = difference(before, now, share=share)
        return {"before": first, "now": last, "loss": change.value, "low": change.low, "high": change.high}
    change = difference(now, before)
    ends = [change.value, change.low, change.high]
    if measure == PERPLEXITY:  # a difference of mean -log p is the logarithm of the ratio of the perplexities
        loss = [None if end is None else math.expm1(end) for end in ends]
        first, last = math.exp(first), math.exp(last)
    else:
        loss = [None if end is None else end / abs(first) if first else math.inf for end in ends]
    return {"before": first, "now": last} | dict(zip(("loss", "low", "high"), loss, strict=True))


def told(change: Mapping[str, Any]) -> str:
    """A change as text: before and now, how much worse, its interval, and the number of items."""
    ends = "" if change["low"] is None else f", {_percent(change['low'])} to {_percent(change['high'])}"
    return (
        f"{change['before']:.3g} before, {change['now']:.3g} now: {_percent(change['loss'])} worse{ends} "
        f"({change['items']} items)"
    )


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.1f} %"
