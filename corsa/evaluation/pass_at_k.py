"""Pass rates of programs: UPass@k of CodeUpdateArena, SPass@k on HumanEval, from one table of verdicts.

A sample of a problem about an update is right if it passes with the update installed and fails without it: a program
that never uses the update would pass both. (A row without the update also covers a mutant of the update that gives
wrong results, see `corsa.training.running_tests`.) With c right ones among n samples, the unbiased estimate of pass@k
is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021). `single` is the share of right first samples. If the sandbox broke on a
sample, or the tests of a problem cannot run, the problem counts for no method. So methods stay paired, and none gains
from programs that could not be judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from corsa.evaluation.uncertainty import Difference, Sums, difference, interval
from corsa.evaluation.verdicts import comparison


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples drawn from n is right, if c of the n are right.

    >>> pass_at(5, 1, 1), pass_at(5, 1, 5), pass_at(5, 0, 5)
    (0.2, 1.0, 0.0)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n} samples")
    return 1.0 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True)
class Tried:
    """One problem under one seed: which of its samples are right, in order. `group`: the random unit of an interval,
    besides the seed.
    """

    problem: str
    group: str
    right: tuple[bool, ...]
    seed: int = 0


def unjudged(verdicts: Iterable[Mapping[str, Any]]) -> set[str]:
    """The problems in a table of verdicts with a sample that could not be judged."""
    return {row["problem"] for row in verdicts if row["outcome"] == "sandbox"}


def tried(
    verdicts: Iterable[Mapping[str, Any]], groups: Mapping[str, str], *, updates: bool, seed: int = 0
) -> list[Tried]:
    """The problems of a table of verdicts {problem, sample, updated, outcome}, in the order of `groups`, which maps
    each problem to its update (or itself). `updates`: right means passing with the update and not without it. `seed`:
    the seed of the edited model and of the samples.
    """
    known: dict[tuple[str, int], dict[bool, str]] = {}
    for row in verdicts:
        known.setdefault((row["problem"], row["sample"]), {})[row["updated"]] = row["outcome"]
    right: dict[str, list[bool]] = {problem: [] for problem in groups}
    for (problem, _), outcomes in sorted(known.items()):
        if problem in right:
            passes = outcomes[True] == "passed"
            right[problem].append(passes and outcomes[False] != "passed" if updates else passes)
    return [Tried(problem, groups[problem], tuple(found), seed) for problem, found in right.items() if found]


def measure(name: str, found: Sequence[Tried], k: int | None) -> tuple[dict[str, Any], Sums]:
    """A rate over problems with its 95 % interval over groups and seeds, and its sums (numerator, denominator), each
    (groups, seeds).

    `k`: pass@k; None: the share of right first samples. Problems with fewer than k samples are left out. The rate
    covers all seeds; `seeds` holds each seed's value and the spread.
    """
    usable = [t for t in found if k is None or len(t.right) >= k]
    row = {group: i for i, group in enumerate(dict.fromkeys(t.group for t in found))}
    column = {seed: i for i, seed in enumerate(sorted({t.seed for t in found}))}
    above, below = np.zeros((len(row), len(column))), np.zeros((len(row), len(column)))
    for t in usable:
        above[row[t.group], column[t.seed]] += _rate(t, k)
        below[row[t.group], column[t.seed]] += 1
    sums = Sums(above, below)
    if not usable:
        reason = f"no problem has {k} samples" if k else "no problem has a sample"
        return _entry(None, None, None, 0, 0, reason), sums
    low, high, source = interval(sums, share=True)
    reason = None if source else "no interval: all groups alike, or one only"
    entry = _entry(sums.ratio, low, high, len(row), len({t.problem for t in usable}), reason)
    return entry | {"interval": source, "seeds": _seeds(usable, k)}, sums


def _rate(t: Tried, k: int | None) -> float:
    return float(t.right[0]) if k is None else pass_at(len(t.right), sum(t.right), k)


def _seeds(usable: Sequence[Tried], k: int | None) -> dict[str, Any] | None:
    """The value of each seed and their standard deviation; None for one seed."""
    rates: dict[int, list[float]] = {}
    for t in usable:
        rates.setdefault(t.seed, []).append(_rate(t, k))
    if len(rates) < 2:
        return None
    values = {str(seed): float(np.mean(own)) for seed, own in sorted(rates.items())}
    return {"values": values, "spread": float(np.std(list(values.values()), ddof=1))}


def _entry(
    value: float | None, low: float | None, high: float | None, groups: int, problems: int, reason: str | None
) -> dict[str, Any]:
    counts = {"edits": groups, "probes": problems}
    return {"value": value, "low": low, "high": high, "interval": None, **counts, "rule": None, "seeds": None} | {
        "reason": reason
    }


def compared(
    name: str, a: str, b: str, ours: Sums, theirs: Sums, problems: int
) -> tuple[dict[str, Any], Difference] | None:
    """Method a minus method b on the same groups and seeds, as `corsa.evaluation.metrics` compares methods."""
    if ours.denominator.shape != theirs.denominator.shape or not ours.denominator.sum() or not theirs.denominator.sum():
        return None
    found = difference(ours, theirs, share=True)
    edits, seeds = int((ours.denominator > 0).any(1).sum()), ours.denominator.shape[1]
    return comparison(name, 1, a, b, found, seeds=seeds, edits=edits, probes=problems), found
