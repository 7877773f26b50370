"""Intervals, tests and verdicts, compared with simulations of known truth and with other implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

from corsa.errors import CorsaError
from corsa.evaluation import verdicts
from corsa.evaluation.uncertainty import (
    Estimate,
    Spread,
    Sums,
    contrast,
    designed,
    detectable,
    detectable_where_alike,
    difference,
    estimate,
    holm,
    interval,
)
from corsa.evaluation.verdicts import comparison, judged, planned_pairs
from corsa.planning.power import assumed, needs
from corsa.report.findings import findings

# Simulated runs: a wording is right if the sum of a fact's level, a run's level and noise is above 0.

LEVEL, FACT, CELL = 0.3, 1.0, 0.5
"""Mean level, its standard deviation over facts, and that of one fact in one run."""


@cache
def between_runs(points: float, variance: float) -> float:
    """The standard deviation of a run's level that varies its share of right answers by the given points (SD)."""
    nodes, weights = hermegauss(40)
    weights = weights / weights.sum()

    def missing(sd: float) -> float:
        shares = ndtr((LEVEL + sd * nodes) / np.sqrt(1 + variance))
        return float(np.sqrt(weights @ (shares - weights @ shares) ** 2)) - points / 100

    return brentq(missing, 0, 5) if points else 0.0  # type: ignore[return-value]


@dataclass(frozen=True)
class Simulated:
    """right, asked: shape (times, methods, facts, seeds). truth: the share of right answers over all facts and runs."""

    right: np.ndarray
    asked: np.ndarray
    truth: float

    def of(self, method: int) -> Sums:
        return Sums(self.right[:, method], self.asked[:, method])

    def forgotten(self, random: np.random.Generator) -> list[Sums]:
        """A share of the right answers is lost: a ratio with a random denominator."""
        lost = random.binomial(self.right.astype(int), ndtr(random.normal(-1, 0.3, self.right.shape)))
        return [Sums(lost[:, method].astype(float), self.right[:, method]) for method in range(lost.shape[1])]


def simulated(
    random: np.random.Generator,
    times: int,
    *,
    facts: int,
    seeds: int,
    points: float,
    methods: int = 2,
    alike: float = 0.0,
    own: float = 0.0,
) -> Simulated:
    """Equal methods whose runs differ by `points` (SD). `alike`: share of that variance that methods with the same seed
    have in common. `own`: SD over facts of a method's own level. Facts have one to three wordings.
    """

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    variance = FACT**2 + own**2 + CELL**2
    sd = between_runs(points, variance)
    run = np.sqrt(1 - alike) * normal(times, methods, 1, seeds) + np.sqrt(alike) * normal(times, 1, 1, seeds)
    level = LEVEL + FACT * normal(times, 1, facts, 1) + CELL * normal(times, methods, facts, seeds) + sd * run
    if own:
        level += own * normal(times, methods, facts, 1)
    asked = np.broadcast_to(random.integers(1, 4, size=(times, 1, facts, 1)), level.shape)
    right = np.zeros(level.shape, dtype=np.float32)
    chance = ndtr(level)
    for wording in range(3):
        right += (random.random(level.shape, dtype=np.float32) < chance) & (asked > wording)
    return Simulated(right.astype(float), asked.astype(float), float(ndtr(LEVEL / np.sqrt(1 + variance + sd**2))))


TIMES = {60: 3000, 200: 1500, 1000: 700}
RUNS = [(facts, seeds, points) for facts in TIMES for seeds in (3, 5) for points in (0, 2, 5)]


@pytest.mark.parametrize(("facts", "seeds", "points"), RUNS)
def test_equal_methods_differ_in_5_percent_and_intervals_cover_in_95(facts: int, seeds: int, points: int) -> None:
    random = np.random.default_rng([facts, seeds, points])
    runs = simulated(random, TIMES[facts], facts=facts, seeds=seeds, points=points, alike=0.7 * (points == 2))
    found = contrast(runs.of(0), runs.of(1))
    assert 0.03 <= np.mean(found.p() < 0.05) <= 0.07
    low, high = found.limits()
    assert 0.92 <= np.mean((low < 0) & (high > 0)) <= 0.97
    covered = []
    for method in (0, 1):
        low, high = estimate(runs.of(method)).share_limits()
        covered.append((low < runs.truth) & (runs.truth < high))
    assert 0.92 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("points", [0, 2, 5])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_ratio_over_what_was_learnt_holds_its_level(seeds: int, points: int) -> None:
    """Forgetting, for methods that also differ from fact to fact."""
    random = np.random.default_rng([seeds, points])
    a, b = simulated(random, 2000, facts=100, seeds=seeds, points=points, own=0.4).forgotten(random)
    assert 0.03 <= np.mean(contrast(a, b).p() < 0.05) <= 0.07


def test_facts_alone_would_not_do() -> None:
    """The error to avoid: pooling seeds within a fact, and treating facts as the only source of variance."""
    runs = simulated(np.random.default_rng(1), 400, facts=1000, seeds=3, points=5)
    pooled = [Sums(*(part.sum(-1, keepdims=True) for part in runs.of(method))) for method in (0, 1)]
    assert np.mean(contrast(*pooled).p() < 0.05) > 0.4


def test_the_variance_is_that_of_the_two_way_table() -> None:
    """Compared with the mean squares written out, and for one seed with scipy's t tests."""
    random = np.random.default_rng(2)
    table = random.normal(size=(9, 4)) + random.normal(size=(9, 1)) + random.normal(size=4)
    facts, seeds = table.shape
    grand, by_fact, by_seed = table.mean(), table.mean(1), table.mean(0)
    fact = seeds * sum((m - grand) ** 2 for m in by_fact) / (facts - 1)
    seed = facts * sum((m - grand) ** 2 for m in by_seed) / (seeds - 1)
    rest = sum((table[f, s] - by_fact[f] - by_seed[s] + grand) ** 2 for f in range(facts) for s in range(seeds)) / (
        (facts - 1) * (seeds - 1)
    )
    found = estimate(Sums(table, np.ones_like(table)))
    assert found.value == pytest.approx(grand)
    assert found.error**2 * facts * seeds == pytest.approx(fact + seed - rest)
    assert found.spread == pytest.approx(((fact - rest) / seeds, (seed - rest) / facts, rest))
    share = seed / (fact + seed - rest)
    assert 1 / found.df == pytest.approx(share / (seeds - 1) + (1 - share) / (facts - 1))

    a, b = random.normal(0.3, 1, 40), random.normal(0, 1, 40)
    ones = np.ones((40, 1))
    one = contrast(Sums(a[:, None], ones), Sums(b[:, None], ones))
    theirs = stats.ttest_rel(a, b)
    assert one.p() == pytest.approx(theirs.pvalue)
    assert one.limits() == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_seeds_alone_give_students_t_over_seeds() -> None:
    """If only runs vary, three runs are three numbers: both p values are Student's."""
    run = np.array([0.1, 0.3, 0.2])
    table = np.tile(run, (50, 1))
    found = estimate(Sums(table, np.ones_like(table)))
    theirs = stats.ttest_1samp(run, 0)
    assert found.p() == pytest.approx(theirs.pvalue)
    assert found.cautious_p() == pytest.approx(theirs.pvalue, rel=1e-4)


def test_a_base_without_seeds_is_compared_with_every_seed() -> None:
    random = np.random.default_rng(3)
    base = random.binomial(1, 0.5, (80, 1)).astype(float)
    right = random.binomial(1, 0.6, (80, 3)).astype(float)
    ones = np.ones_like(right)
    found = difference(Sums(right, ones), Sums(base, ones[:, :1]), share=True)
    repeated = difference(Sums(right, ones), Sums(np.repeat(base, 3, axis=1), ones), share=True)
    assert found[:4] == pytest.approx(repeated[:4])


def test_with_one_seed_there_is_an_interval_over_facts_and_no_p() -> None:
    random = np.random.default_rng(5)
    a, b = (Sums(random.binomial(1, 0.5, (50, 1)).astype(float), np.ones((50, 1))) for _ in range(2))
    found = difference(a, b, share=True)
    assert (found.p, found.cautious_p) == (None, None)
    assert found.low is not None
    assert interval(a, share=True).source == "facts"


def all_alike(facts: int, seeds: int, value: float) -> Sums:
    return Sums(np.full((facts, seeds), 2 * value), np.full((facts, seeds), 2.0))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_where_all_facts_are_alike_the_difference_still_has_an_interval(a: float, b: float) -> None:
    found = difference(all_alike(8, 3, a), all_alike(8, 3, b), share=True)
    bound = 1 - 0.025 ** (1 / 8)  # the share of facts that may behave differently, after none of eight did
    assert found.value == a - b
    expected = (a - b - bound * (1 + abs(a - b)), a - b + bound * (1 + abs(a - b)))
    assert (found.low, found.high) == pytest.approx((max(-1, expected[0]), min(1, expected[1])))
    assert found.p == (1.0 if a == b else pytest.approx(stats.binomtest(8, 8).pvalue))


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_near_0_and_1_an_interval_of_a_share_stays_within_and_covers(share: float) -> None:
    random = np.random.default_rng(6)
    covered = []
    for _ in range(1500):
        right = random.binomial(1, share, (100, 3)).astype(float)
        low, high, _ = interval(Sums(right, np.ones_like(right)), share=True)
        assert low is not None
        assert high is not None
        assert low >= 0
        assert high <= 1
        covered.append(low <= share <= high)
    assert 0.92 <= np.mean(covered) <= 0.985  # answers are counted in whole numbers: the level cannot be met exactly


def test_seeds_that_agree_by_coincidence_are_no_proof() -> None:
    """Each of three runs wins one more fact than it loses: no spread between seeds, and a small difference."""
    gains = np.zeros((6, 3))
    gains[[0, 1, 2], [0, 1, 2]] = 1.0
    found = difference(Sums(gains, np.ones((6, 3))), Sums(np.zeros((6, 3)), np.ones((6, 3))), share=True)
    assert found.p is not None
    assert found.p > 0.001


# Verdicts

METHODS = ("corsa", "lora", "memit", "f-learning", "corsa-no-sam", "corsa-no-dpo")
PRIMARY = ("efficacy", "forgetting")


class Report(NamedTuple):
    """The part of a report that `findings` reads."""

    metrics: dict[str, Any]
    entries: list[dict[str, Any]]


def report(numbers: dict[str, Sequence[Sums]], primary: Sequence[str] = PRIMARY) -> Report:
    """A report on methods, made with the functions that `corsa.evaluation.metrics` uses."""
    pairs = planned_pairs(METHODS)
    made = []
    for a, b in pairs:
        for name, of in numbers.items():
            found = difference(of[METHODS.index(a)], of[METHODS.index(b)], share=True)
            made.append((comparison(name, 1, a, b, found, seeds=3, edits=60, probes=60), found))
    entries = judged(
        made, primary=primary, pairs=pairs, better={"efficacy": "high", "forgetting": "low", "other": "low"}
    )
    value = {"value": 0.5, "low": None, "high": None}
    rows = [{"method": method, "metrics": dict.fromkeys(numbers, value)} for method in METHODS]
    definitions = {name: {"label": name, "unit": "share"} for name in numbers}
    return Report(
        {"comparisons": entries, "rows": rows, "definitions": definitions, "probe_kind": "paraphrase", "seeds": [0, 1]},
        entries,
    )


@pytest.mark.parametrize(("facts", "seeds", "points"), [(60, 3, 0), (60, 3, 5), (60, 5, 2), (200, 3, 2)])
def test_a_report_on_six_equal_methods_claims_something_in_at_most_5_percent(
    monkeypatch: pytest.MonkeyPatch, facts: int, seeds: int, points: int
) -> None:
    monkeypatch.setattr(verdicts, "detectable", lambda found, tests: None)  # most of the time, without a verdict
    random = np.random.default_rng([facts, seeds, points])
    times, claims = 300, 0
    runs = simulated(random, times, facts=facts, seeds=seeds, points=points, methods=6, own=0.3)
    lost = runs.forgotten(random)
    for time in range(times):
        efficacy = [Sums(runs.right[time, method], runs.asked[time, method]) for method in range(6)]
        forgetting = [Sums(*(part[time] for part in one)) for one in lost]
        made = report({"efficacy": efficacy, "forgetting": forgetting})
        said = " ".join(findings(made.metrics))
        claims += "better than" in said or "worse on" in said
        assert ("better than" in said or "worse on" in said) == any(entry["better"] for entry in made.entries)
    assert claims / times <= 0.05


def test_a_real_difference_among_six_methods_is_found_and_no_other() -> None:
    random = np.random.default_rng(8)
    runs = simulated(random, 1, facts=300, seeds=5, points=1, methods=6)
    efficacy = [Sums(runs.right[0, method], runs.asked[0, method]) for method in range(6)]
    efficacy[1] = Sums(efficacy[1].numerator * (random.random((300, 5)) < 0.6), efficacy[1].denominator)
    made = report({"efficacy": efficacy, "other": efficacy}, primary=("efficacy",))
    better = {(entry["metric"], entry["b"]): entry["better"] for entry in made.entries if entry["distinguishable"]}
    assert better == {("efficacy", "lora"): "corsa"}
    assert findings(made.metrics)[0].startswith("CoRSA is better than LoRA on update efficacy (")


def test_holm_is_the_step_down_method() -> None:
    """Compared with the rule as published: reject the smallest while p <= level / (tests left)."""
    random = np.random.default_rng(9)
    for _ in range(50):
        ps = random.random(7) ** 3
        order, rejected = np.argsort(ps), set()
        for rank, place in enumerate(order):
            if ps[place] > 0.05 / (7 - rank):
                break
            rejected.add(int(place))
        assert {i for i, p in enumerate(holm(list(ps))) if p <= 0.05} == rejected


def test_the_pairs_a_report_is_about() -> None:
    assert planned_pairs(["lora", "corsa", "memit"]) == [("lora", "corsa"), ("corsa", "memit")]
    assert planned_pairs(["lora", "memit"]) == [("lora", "memit")]
    assert planned_pairs(["corsa", "lora", "memit"], "lora") == [("corsa", "lora"), ("lora", "memit")]
    settings = ["lora sum", "corsa sum", "lora ties", "corsa ties"]
    assert planned_pairs(settings) == [("lora sum", "corsa sum"), ("lora ties", "corsa ties")]


# What a run could have detected


def shifted(random: np.random.Generator, spread: Spread, facts: int, seeds: int, by: float) -> Estimate:
    """2,000 simulated differences of methods that differ by `by`."""
    shape = (2000, facts, seeds)
    table = by + np.sqrt(spread.rest) * random.standard_normal(shape)
    table += np.sqrt(spread.fact) * random.standard_normal((2000, facts, 1))
    table += np.sqrt(spread.seed) * random.standard_normal((2000, 1, seeds))
    return estimate(Sums(table, np.ones(shape)))


@pytest.mark.parametrize(("facts", "seeds", "tests"), [(40, 3, 1), (100, 5, 1), (40, 5, 8)])
def test_the_smallest_difference_that_shows_does_so_in_80_percent(facts: int, seeds: int, tests: int) -> None:
    spread = Spread(0.02, 0.0006, 0.16)
    least = detectable(designed(spread, facts, seeds), tests)
    found = shifted(np.random.default_rng(facts), spread, facts, seeds, least)
    p = found.p() if tests == 1 else found.cautious_p()
    assert 0.72 <= np.mean(p < 0.05 / tests) <= 0.88


def test_where_all_facts_are_alike_a_sign_test_says_what_would_have_shown() -> None:
    share = detectable_where_alike(40)
    assert share is not None
    differ = np.random.default_rng(0).binomial(40, share, 20_000)
    shown = np.array([stats.binomtest(k, k).pvalue < 0.05 if k else False for k in range(41)])
    assert np.mean(shown[differ]) == pytest.approx(0.8, abs=0.02)
    assert detectable_where_alike(5) is None  # 2 * 0.5^5 is above 0.05
    assert detectable_where_alike(40, tests=10) > share  # type: ignore[operator]
    found = difference(all_alike(40, 3, 1.0), all_alike(40, 3, 1.0), share=True)
    made = [(comparison("efficacy", 1, "a", "b", found, seeds=3, edits=40, probes=40), found)]
    (entry,) = judged(made, primary=["efficacy"], pairs=[("a", "b")], better={"efficacy": "high"})
    assert entry["detectable"] == share


def facts_needed(points: float, spread: Spread, tests: int = 1) -> dict[int, int]:
    """Facts needed, by number of seeds; without entries that no number of facts can satisfy."""
    return {need.seeds: need.facts for need in needs(points, spread, tests) if need.facts is not None}


def test_facts_and_seeds_for_a_difference() -> None:
    spread = assumed(0.02).spread
    found = facts_needed(5, spread)
    assert set(found) == {5, 8, 10}  # two points SD between runs: with three seeds no number of facts is enough
    assert found[10] < found[8] < found[5]
    for seeds, facts in found.items():
        assert detectable(designed(spread, facts, seeds)) <= 0.05
        assert detectable(designed(spread, facts - 1, seeds)) > 0.05
    assert facts_needed(5, assumed(0.0).spread)[5] < found[5]
    assert facts_needed(5, spread, tests=10)[10] > found[10]
    with pytest.raises(CorsaError, match="in points"):
        needs(0, spread, 1)
