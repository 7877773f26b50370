"""The uncertainty of a number when both the facts and the training runs (seeds) are random.

Every number here is a ratio of two sums over a table of facts x seeds. Its error comes from the influence of each cell
on the ratio (linearisation: Cochran, Sampling Techniques, 1977, section 6.3), with crossed random effects:

    cell = value + fact + seed + rest,    Var(value) = fact / F + seed / S + rest / (F S)

The mean squares of the two-way table estimate this variance. As in studies of several readers and cases (Obuchowski and
Rockette 1995; Hillis 2007), the contribution of facts is at least zero. Hillis's degrees of freedom are (S - 1) / w^2,
where w is the share of seeds in the estimate. With three seeds they give up to 7.8 % false positives at a level of 5 %
if facts and seeds contribute equally. (S - 1) / w gives at most 5.8 % and is used here.
`tests/test_uncertainty.py` simulates error rates and coverage.

With one seed the error covers only the facts: it is the uncertainty of this adapter, not of the method.

If some facts were drawn at random from a list whose other facts were not asked, `sample_interval` gives the interval of
the number that asking all would give, for this adapter (Cochran 1977, sections 2.5 to 2.8 and 6.4).

A comparison takes the difference of influences cell by cell. This is valid whether or not two runs with the same seed
are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, stdtr, stdtrit
from scipy.stats import binom, binomtest, chi2, hypergeom, nct

LEVEL = 0.95
POWER = 0.8
_FLOOR = 0.02
"""Minimum of the seeds' mean square, as a share of the rest's. With few facts, all seeds may agree by chance."""
_STEPS = 240
"""Points of the integral over the variance between seeds."""

Array = NDArray[np.float64]


class Sums(NamedTuple):
    """Numerator and denominator of a ratio, summed per cell. Each has shape (..., facts, seeds), or (facts,) for one
    seed.
    """

    numerator: Array
    denominator: Array

    @property
    def ratio(self) -> float:
        """The ratio over the whole table; NaN if the denominator is 0."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else float("nan")

    @property
    def counted(self) -> Sums:
        """The facts and seeds that have something to count."""
        if self.denominator.ndim == 1:
            return Sums(*(part[:, None] for part in self)).counted
        some = self.denominator > 0
        return Sums(*(part[some.any(1)][:, some.any(0)] for part in self))


class Spread(NamedTuple):
    """Variances of a cell, for a number or a difference: between facts, between seeds, and the rest."""

    fact: Any
    seed: Any
    rest: Any


class Estimate(NamedTuple):
    """A number with its standard error and the error's degrees of freedom; arrays of shape (...) for many tables."""

    value: Any
    error: Any
    df: Any
    share: Any  # of the squared error, from seeds
    seeds: int
    spread: Spread

    def limits(self) -> tuple[Any, Any]:
        """Ends of the 95 % interval from Student's t."""
        half = stdtrit(self.df, (1 + LEVEL) / 2) * self.error
        return self.value - half, self.value + half

    def share_limits(self) -> tuple[Any, Any]:
        """The same for a share strictly between 0 and 1: Wilson's interval at the effective sample size
        value (1 - value) / error^2 (Korn and Graubard 1998), with Student's t instead of the normal quantile.
        """
        effective = self.value * (1 - self.value) / self.error**2
        c = stdtrit(self.df, (1 + LEVEL) / 2) ** 2 / effective
        middle = (self.value + c / 2) / (1 + c)
        half = np.sqrt(c * (self.value * (1 - self.value) + c / 4)) / (1 + c)
        return middle - half, middle + half

    def p(self) -> Any:
        """Two-sided p of "the true value is 0", by Student's t: the p that matches `limits`."""
        return 2 * stdtr(self.df, -np.abs(self.value / self.error))

    def cautious_p(self) -> Any:
        """The same by the Behrens-Fisher solution (Fisher 1935), which averages over possible variances between seeds.
        A correction for many tests needs very small p. There Student's t with few, estimated degrees of freedom gives
        too many false positives; this solution keeps its level.
        """
        return _behrens_fisher(np.abs(self.value / self.error), self.share, self.seeds)


class Interval(NamedTuple):
    """A 95 % interval and what it treats as random; `exact`: the binomial interval over facts; `sample`: which facts
    were asked. Both ends are None if the facts give no interval.
    """

    low: float | None
    high: float | None
    source: Literal["facts and seeds", "facts", "exact", "sample"] | None


class Difference(NamedTuple):
    """The value of a minus that of b on the same probes, its interval, and both p (None with one seed)."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    cautious_p: float | None
    estimate: Estimate


def estimate(sums: Sums) -> Estimate:
    """The ratio of each table, with its error. Needs two or more facts."""
    return _estimate(_ratio(sums), _influence(sums))


def contrast(a: Sums, b: Sums) -> Estimate:
    """The ratio of a minus that of b, fact by fact and seed by seed. One of them may have a single seed: the unedited
    model does not depend on the seed.
    """
    return _estimate(_ratio(a) - _ratio(b), _influence(a) - _influence(b))


def interval(sums: Sums, *, share: bool) -> Interval:
    """95 % interval of `sums.ratio`.

    If all facts agree, there is no spread: 8 of 8 right would give 1.0 to 1.0. Then a `share` of 0 or 1 gets the exact
    binomial (Clopper-Pearson) interval over facts, and any other value gets none.
    """
    counted = sums.counted
    facts, seeds = counted.denominator.shape
    if not facts:
        return Interval(None, None, None)
    if _alike(counted):
        value = counted.ratio
        if share and value in (0.0, 1.0):
            proportion = binomtest(round(value * facts), facts).proportion_ci(LEVEL, method="exact")
            return Interval(float(proportion.low), float(proportion.high), "exact")
        return Interval(None, None, None)
    if facts == 1:
        return Interval(None, None, None)
    found = estimate(counted)
    low, high = found.share_limits() if share and 0 < found.value < 1 else found.limits()
    return Interval(float(low), float(high), "facts and seeds" if seeds > 1 else "facts")


def sample_interval(asked: Sums, drawn: Sums, weight: float, *, share: bool) -> Interval:
    """95 % interval of the ratio that asking all facts would give, if some of them are a simple random sample.

    Only the drawn facts err, and the less the larger their part of all is: the variance of their mean is multiplied by
    1 - 1 / weight (the finite population correction). If all drawn facts agree, the exact hypergeometric bound says how
    many of the others can differ; values other than shares then get no interval. The denominators of the facts that
    were not asked are taken as those of the drawn ones on average.

    Args:
        asked: facts that were asked without a draw.
        drawn: facts of the sample; both ends of the ratio are multiplied by `weight`.
        weight: facts that each of the sample stands for.
        share: whether the ratio is a share.
    """
    counted = drawn.counted
    facts = len(counted.denominator)
    if not facts:
        return Interval(None, None, None)
    if _alike(counted):
        if not share:
            return Interval(None, None, None)
        differ = _most_unseen(facts, round(weight * facts))
        low, high = counted.ratio * (1 - differ), counted.ratio + differ * (1 - counted.ratio)
    else:
        found = estimate(counted)
        found = found._replace(error=found.error * (1 - 1 / weight) ** 0.5)
        low, high = found.share_limits() if share and 0 < found.value < 1 else found.limits()
    above, below, rest = asked.numerator.sum(), asked.denominator.sum(), drawn.denominator.sum()
    low, high = (float((above + end * rest) / (below + rest)) for end in (low, high))
    return Interval(low, high, "sample")


def _most_unseen(drawn: int, of: int) -> float:
    """The largest share of `of` facts that may differ if none of `drawn` does: the end of the exact 95 % interval."""
    differing = np.arange(of - drawn + 1)
    none = hypergeom.pmf(0, of, differing, drawn)
    return float(differing[none >= (1 - LEVEL) / 2].max()) / of


def difference(a: Sums, b: Sums, *, share: bool = False) -> Difference:
    """Paired comparison: `a` and `b` hold the same facts in the same order, and the same seeds (or one has a single
    seed).

    With one seed on both sides, two adapters are compared, not two methods, so there is no p. If all facts have the
    same difference, p is that of a sign test over facts; two shares get bounds from the exact binomial interval for the
    share of facts with another difference.
    """
    a, b = (Sums(*(part.reshape(len(part), -1) for part in sums)) for sums in (a, b))
    present = (a.denominator > 0).any(1) | (b.denominator > 0).any(1)
    a, b = (Sums(*(part[present] for part in sums)) for sums in (a, b))
    facts, seeds = int(present.sum()), max(a.denominator.shape[1], b.denominator.shape[1])
    found = contrast(a, b)
    value, low, high = float(found.value), None, None
    if facts > 1 and found.error > 1e-12:
        low, high = (float(end) for end in found.limits())
        p = float(found.p())
        cautious = float(found.cautious_p()) if seeds > 1 else p
    else:
        p = cautious = 1.0 if abs(value) < 1e-12 else min(1.0, 2 * 0.5**facts)
        if share and any(abs(value - whole) < 1e-12 for whole in (-1, 0, 1)):
            bound = (1 - ((1 - LEVEL) / 2) ** (1 / facts)) * (1 + abs(value))
            low, high = value - bound, value + bound
    if share and low is not None and high is not None:
        low, high = max(low, -1.0), min(high, 1.0)
    return Difference(value, low, high, *((p, cautious) if seeds > 1 else (None, None)), found)


def holm(ps: Sequence[float]) -> list[float]:
    """P values corrected for multiple tests by Holm's step-down method (1979). It keeps the chance of any false verdict
    below the level under any dependence.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def detectable(found: Estimate, tests: int = 1) -> float:
    """The smallest true difference that a run with this error detects with a power of 80 %, as one of `tests` verdicts
    at a total level of 5 %, in the unit of the error. `found` has two or more seeds.
    """
    level = (1 - LEVEL) / tests
    share, seeds, df = float(found.share), found.seeds, float(found.df)
    if tests == 1:
        critical = float(stdtrit(df, 1 - level / 2))
    else:
        critical = _root(lambda t: level - float(_behrens_fisher(np.asarray(t), share, seeds)))
    return float(found.error) * _root(lambda shift: float(nct.sf(critical, df, shift)) - POWER)


def detectable_where_alike(facts: int, tests: int = 1) -> float | None:
    """The same for shares if all facts agree, so that there is no error: the share of facts that must differ, all in
    one direction, for a sign test to detect it. None if there are too few facts.
    """
    needed = int(np.ceil(np.log2(2 * tests / (1 - LEVEL))))  # facts with 2 * 0.5^needed below the level
    if needed > facts:
        return None
    return float(brentq(lambda share: binom.sf(needed - 1, facts, share) - POWER, 0.0, 1.0))  # type: ignore[arg-type]


def designed(spread: Spread, facts: int, seeds: int) -> Estimate:
    """The expected error of a run of this size, around a difference of 0. `seeds` is 2 or more."""
    by_seed = spread.seed / seeds + spread.rest / (facts * seeds)
    variance = by_seed + spread.fact / facts
    share = by_seed / variance
    return Estimate(0.0, variance**0.5, _df(share, facts, seeds), share, seeds, spread)


def _behrens_fisher(t: Any, share: Any, seeds: int) -> Any:
    """Mean over q, uniform in (0, 1), of the two-sided normal p at variance 1 - share + share (S - 1) / chi2(q)."""
    ratio, weight = _between_seeds(seeds)
    t, share = np.asarray(t)[..., None], np.asarray(share)[..., None]
    return (2 * ndtr(-t / np.sqrt(1 - share + share * ratio)) * weight).mean(-1)


@lru_cache(maxsize=32)
def _between_seeds(seeds: int) -> tuple[Array, Array]:
    """(S - 1) / chi2 at points that are densest where the ratio is largest, and their weights."""
    steps = (np.arange(_STEPS) + 0.5) / _STEPS
    return (seeds - 1) / chi2.ppf(steps**3, seeds - 1), 3 * steps**2


def _root(rising: Callable[[float], float]) -> float:
    """The zero, above 0, of an increasing function."""
    top = 4.0
    while rising(top) < 0:
        top *= 2
    return float(brentq(rising, 0.0, top))  # type: ignore[arg-type]


def _ratio(sums: Sums) -> Any:
    return sums.numerator.sum((-1, -2)) / sums.denominator.sum((-1, -2))


def _influence(sums: Sums) -> Array:
    """How far each cell moves the ratio, scaled so that the mean over cells is the error of the ratio."""
    ratio = np.asarray(_ratio(sums))[..., None, None]
    size = sums.denominator.mean((-1, -2), keepdims=True)
    return (sums.numerator - ratio * sums.denominator) / size


def _estimate(value: Any, influence: Array) -> Estimate:
    facts, seeds = influence.shape[-2:]
    if facts < 2:
        nothing = np.full(np.shape(value), np.nan)
        return Estimate(value, nothing, nothing, nothing, seeds, Spread(nothing, nothing, nothing))
    by_fact, by_seed = influence.mean(-1), influence.mean(-2)
    facts_square = seeds * by_fact.var(-1, ddof=1)
    if seeds == 1:
        zero = np.zeros_like(facts_square)
        spread = Spread(facts_square, zero, zero)
        return Estimate(value, np.sqrt(facts_square / facts), np.full(np.shape(value), facts - 1.0), zero, 1, spread)
    seeds_square = facts * by_seed.var(-1, ddof=1)
    rest = influence - by_fact[..., None] - by_seed[..., None, :] + influence.mean((-1, -2), keepdims=True)
    rest_square = (rest**2).sum((-1, -2)) / ((facts - 1) * (seeds - 1))
    by_seeds = np.maximum(seeds_square, _FLOOR * rest_square)
    beyond = np.maximum(facts_square - rest_square, 0.0)
    total = by_seeds + beyond
    share = np.divide(by_seeds, total, out=np.ones_like(total), where=total > 0)
    spread = Spread(beyond / seeds, np.maximum(seeds_square - rest_square, 0.0) / facts, rest_square)
    return Estimate(value, np.sqrt(total / (facts * seeds)), _df(share, facts, seeds), share, seeds, spread)


def _df(share: Any, facts: int, seeds: int) -> Any:
    """Degrees of freedom of a variance with this share from seeds and the rest from facts."""
    return 1 / (share / (seeds - 1) + (1 - share) / (facts - 1))


def _alike(counted: Sums) -> bool:
    some = counted.denominator > 0
    return bool(np.ptp(counted.numerator[some] / counted.denominator[some]) < 1e-12)
