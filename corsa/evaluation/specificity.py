"""Specificity: the share of general questions that an edited model answers right, next to the unedited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corsa.evaluation import sanity_questions


def share(right: Any, before: Any = None) -> dict[str, Any]:
    """The share of right answers, over seeds, and its difference from the unedited model's.

    Args:
        right: 1.0 or 0.0 per answer, shape (questions, seeds).
        before: the same of the unedited model, shape (questions, 1). None: no difference is computed.

    Returns:
        {value, low, high, questions, spread, difference}: `spread` is the standard deviation between seeds (None for
        one), `difference` {value, low, high} is paired with the unedited model, question by question. Intervals: 95 %,
        over questions and seeds (`corsa.evaluation.uncertainty`).
    """
    import numpy as np

    from corsa.evaluation.uncertainty import Sums, difference, interval  # scipy: not needed to plan a run

    counted = Sums(right, np.ones_like(right))
    low, high, _ = interval(counted, share=True)
    several = right.shape[1] > 1
    entry = {
        "value": counted.ratio if len(right) else None,
        "low": low,
        "high": high,
        "questions": len(right),
        "spread": float(np.std(right.mean(0), ddof=1)) if several and len(right) else None,
        "difference": None,
    }
    if before is not None and len(right):
        found = difference(counted, Sums(before, np.ones_like(before)), share=True)
        entry["difference"] = {"value": found.value, "low": found.low, "high": found.high}
    return entry


def everyday(
    runs: Mapping[int, Sequence[dict[str, Any]]], base: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The share of everyday questions answered right, and of those answered as before or still right.

    Args:
        runs: {seed: rows of `sanity_questions.judged`}. Every seed has answered the same questions.
        base: the unedited model's rows. None: `runs` are that model's own.

    Returns:
        {right, kept}, each as `share` returns it. `kept` is None without `base`.
    """
    import numpy as np

    right = np.array([[row["right"] for row in rows] for rows in runs.values()], dtype=float).T
    if base is None:
        return {"right": share(right), "kept": None}
    kept = np.array([sanity_questions.kept(base, rows) for rows in runs.values()], dtype=float).T
    before = np.array([[row["right"]] for row in base], dtype=float)
    return {"right": share(right, before), "kept": share(kept)}
