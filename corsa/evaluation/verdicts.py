"""Which comparisons of a report get a verdict.

A scenario names its few primary metrics before it is run. Verdicts are given on them alone, between the pairs of
methods that the scenario is about, and corrected over both (Holm), so that a report on methods that are alike says
otherwise in at most 5 % of runs. Every other comparison is exploratory: its difference and interval are shown, and
nothing is concluded from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from corsa.errors import unknown_name
from corsa.evaluation.uncertainty import LEVEL, Difference, detectable, detectable_where_alike, holm

FOCUS = "corsa"


def planned_pairs(methods: Sequence[str], compare_with: str | None = None) -> list[tuple[str, str]]:
    """The pairs a report is about, in the order of the methods: each method with `compare_with`; without one, CoRSA
    with every other method at the same setting (what follows a method's name); where there is no CoRSA, all.
    """

    def about(pair: tuple[str, str]) -> bool:
        names, settings = zip(*(name.partition(" ")[::2] for name in pair), strict=True)
        return FOCUS in names and settings[0] == settings[1]

    pairs = list(combinations(methods, 2))
    chosen = [pair for pair in pairs if (compare_with in pair if compare_with else about(pair))]
    return chosen or ([] if compare_with else pairs)


def comparison(
    metric: str, round_: int, a: str, b: str, found: Difference, *, seeds: int, edits: int, probes: int
) -> dict[str, Any]:
    """A comparison as a report stores it, without a verdict; `edits`: how many units the interval resamples."""
    spread = found.estimate.spread
    return {
        "metric": metric,
        "round": round_,
        "a": a,
        "b": b,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "seeds": seeds,
        "p": found.p,
        "primary": False,
        "corrected": None,
        "distinguishable": False,
        "better": None,
        "detectable": None,
        "spread": {name: float(part) for name, part in spread._asdict().items()} if edits > 1 else None,
        "edits": edits,
        "probes": probes,
    }


def judged(
    comparisons: Sequence[tuple[dict[str, Any], Difference]],
    *,
    primary: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    better: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The comparisons, with verdicts on the primary ones: `corrected` is Holm's p over all of them, `better` the method
    that is ahead where that is below 5 %, and `detectable` the smallest difference that the run could have shown.

    With one seed nothing is said of methods, so there is no verdict.

    Args:
        comparisons: entries of `comparison` with what they were made from.
        primary: names of the primary metrics.
        pairs: those that verdicts are given on.
        better: metric -> "high" or "low".

    Raises:
        CorsaError: a primary metric that is not one.
    """
    for name in primary:
        if name not in better:
            raise unknown_name("primary metric", name, list(better))
    chosen = [
        (entry, found)
        for entry, found in comparisons
        if entry["metric"] in primary and (entry["a"], entry["b"]) in pairs
    ]
    for entry, _ in chosen:
        entry["primary"] = True
    tested = [(entry, found) for entry, found in chosen if found.p is not None]
    one = len(tested) == 1  # then the p that belongs to the interval needs no correction
    ps = [float(found.p if one else found.cautious_p) for _, found in tested]  # type: ignore[arg-type]
    for (entry, found), corrected in zip(tested, holm(ps), strict=True):
        entry["corrected"] = corrected
        entry["distinguishable"] = corrected < 1 - LEVEL
        if entry["distinguishable"]:
            ahead = (found.value > 0) == (better[entry["metric"]] == "high")
            entry["better"] = entry["a"] if ahead else entry["b"]
        if found.estimate.error > 1e-12:
            entry["detectable"] = detectable(found.estimate, len(tested))
        elif found.low is not None:
            entry["detectable"] = detectable_where_alike(entry["edits"], len(tested))
    return [entry for entry, _ in comparisons]
