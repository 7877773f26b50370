"""Which comparisons of a report get a verdict.

A scenario names its few primary metrics before it runs. Only these get verdicts, for the planned pairs of methods, and
Holm's correction covers all metrics and pairs. So if the methods do not differ, at most 5 % of reports claim a
difference. Every other comparison is exploratory: the report shows its difference and interval, and concludes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from corsa.errors import unknown_name
from corsa.evaluation.uncertainty import LEVEL, Difference, detectable, detectable_where_alike, holm

FOCUS = "corsa"


def planned_pairs(methods: Sequence[str], compare_with: str | None = None) -> list[tuple[str, str]]:
    """The planned pairs of a report, in the order of the methods: each method with `compare_with`. Without it, CoRSA
    with every other method at the same setting (the text after the method's name). Without such pairs, all pairs.
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
    """A comparison as a report stores it, without a verdict. `edits`: number of units the interval resamples."""
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
    """The comparisons, with verdicts on the primary ones. `corrected` is Holm's p over all primary ones. `better` is
    the better method if that p is below 5 %. `detectable` is the smallest difference that the run could have shown.

    With one seed nothing can be said about methods, so there is no verdict.

    Args:
        comparisons: entries of `comparison`, each with its `Difference`.
        primary: names of the primary metrics.
        pairs: the pairs of methods that get verdicts.
        better: metric -> "high" or "low".

    Raises:
        CorsaError: an unknown primary metric.
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
    one = len(tested) == 1  # one test needs no correction: use the p that matches the interval
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
