"""What the metrics count in a table of predictions, summed for each fact and seed.

A table of any length is counted part by part: only the sums of all parts are kept. Values and intervals follow from
the sums (`corsa.evaluation.metrics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corsa.evaluation.metric_definitions import METRICS, Columns, Metric
from corsa.evaluation.prepared_predictions import Whole, parts, prepared
from corsa.evaluation.uncertainty import Sums

UNITS = 4096
"""Facts (or cases) that are counted at a time."""

Cell = tuple[str, int]
"""A method, and the round after which it was asked."""


class Tally(NamedTuple):
    """The sums of a metric, one for each unit and seed that has rows: arrays of shape (sums,), in the order of both.

    numerator, denominator: times the weight. weight: how many units the unit stands for; more than 1 if it was drawn at
    random among others. probes: wordings with something to count. rows: rows that count.
    """

    unit: np.ndarray
    seed: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray
    weight: np.ndarray
    probes: int
    rows: int

    @classmethod
    def joined(cls, tallies: Sequence[Tally]) -> Tally:
        """The tally of all parts."""
        arrays = zip(*(tally[:5] for tally in tallies), strict=True)
        joined = (np.concatenate(parts) for parts in arrays)
        return cls(*joined, probes=sum(t.probes for t in tallies), rows=sum(t.rows for t in tallies))

    def of_seeds(self, seeds: np.ndarray) -> Tally:
        """The sums of these seeds."""
        return self.only(np.isin(self.seed, seeds))

    def only(self, chosen: np.ndarray) -> Tally:
        """These sums; `chosen` is (sums,) bool."""
        return self._replace(**{name: getattr(self, name)[chosen] for name in self._fields[:5]})

    def sums(self, units: np.ndarray | None = None) -> Sums:
        """Sums per unit and seed, in the order of `units` (by default the counted units) and of the seeds."""
        units = np.unique(self.unit) if units is None else units
        seeds, column = np.unique(self.seed, return_inverse=True)
        shape = (len(units), len(seeds))
        at = np.searchsorted(units, self.unit), column
        above, below = np.zeros(shape), np.zeros(shape)
        above[at], below[at] = self.numerator, self.denominator
        return Sums(above, below)


NOTHING = Tally(*(np.empty(0, dtype=kind) for kind in ("int64", "int64", *["float64"] * 3)), probes=0, rows=0)


class Counted(NamedTuple):
    """The rows a metric counts, as arrays of shape (rows,); `unit` is the fact or case they belong to."""

    unit: np.ndarray
    seed: np.ndarray
    item: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, metric: Metric, cell: Columns) -> Counted:
        """The rows of a cell."""
        chosen, numerator, denominator = metric.count(cell)
        parts = (cell.unit_code, cell.seed, cell.item, numerator, denominator, cell.weight)
        unit, seed, item, above, below, weight = (np.broadcast_to(part, chosen.shape)[chosen] for part in parts)
        return cls(unit, seed, item, above * weight, below * weight, weight)

    def of_items(self, items: np.ndarray) -> Counted:
        """The rows of these wordings."""
        chosen = np.isin(self.item, items)
        return Counted(*(part[chosen] for part in self))

    def tally(self, before: int = 0) -> Tally:
        """The sums of the rows. `before`: the units of earlier parts."""
        units, row = np.unique(self.unit, return_inverse=True)
        seeds, column = np.unique(self.seed, return_inverse=True)
        cell, size = row * len(seeds) + column, len(units) * len(seeds)
        some = np.flatnonzero(np.bincount(cell, minlength=size))
        parts = (self.numerator, self.denominator, self.weight)
        above, below, weight = (np.bincount(cell, part, minlength=size)[some].astype(float) for part in parts)
        return Tally(
            units[some // max(1, len(seeds))] + before,
            seeds[some % max(1, len(seeds))],
            above,
            below,
            weight / np.bincount(cell, minlength=size)[some],
            len(np.unique(self.item[self.denominator > 0])),
            len(self.unit),
        )


@dataclass
class Asked:
    """What a cell holds besides its tallies: rows, kinds of probes, and whether a fact of an earlier round is asked.

    by_round: {round that teaches a fact: [right answers, wordings, edits, probes]}. learnt: the counts of
    `corsa.evaluation.metrics.forgotten`, or none.
    """

    rows: int = 0
    kinds: set[str] = field(default_factory=set)
    earlier: bool = False
    by_round: dict[int, np.ndarray] = field(default_factory=dict)
    learnt: np.ndarray = field(default_factory=lambda: np.zeros(5, dtype=np.int64))

    def add(self, cell: pd.DataFrame) -> None:
        """Count the rows of a part."""
        self.rows += len(cell)
        self.kinds |= set(cell.kind.unique())
        self.earlier |= bool((cell.learnt < cell.trained).any())
        for number, found in cell.loc[cell.wordings, ["learnt", "right", "edit", "item"]].groupby("learnt"):
            counts = [int(found.right.sum()), len(found), found.edit.nunique(), found.item.nunique()]
            self.by_round[int(number)] = self.by_round.get(int(number), 0) + np.array(counts)  # type: ignore[arg-type]
        learnt = cell[cell.standing & cell.then]
        taught, other = learnt[learnt.kind == "edit"], learnt[learnt.kind != "edit"]
        counted = [n for rows in (taught, other) for n in (len(rows), int((~rows.right).sum()))]
        self.learnt = self.learnt + np.array([learnt.chain.nunique(), *counted])


@dataclass
class Tallies:
    """The tallies of a table: {cell: {metric: its parts}}; `exact`: the same by the rule "exact", after the last round;
    `pairs`: {(a, b): {metric: parts of both}}, on the wordings that both were asked; `common`: the numbers of these.
    """

    cells: dict[Cell, dict[str, list[Tally]]] = field(default_factory=dict)
    asked: dict[Cell, Asked] = field(default_factory=dict)
    exact: dict[Cell, dict[str, list[Tally]]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, list[tuple[Tally, Tally, int]]]] = field(default_factory=dict)
    units: int = 0
    cases: int = 0
    chains: int = 0
    draws: int = 0
    paraphrases: bool = False
    fallback: set[str] = field(default_factory=set)
    seeds: set[int] = field(default_factory=set)


def tallies(
    predictions: pd.DataFrame,
    how: dict[str, Any],
    pairs: Iterable[tuple[str, str]],
    last: int,
    base: str,
) -> Tallies:
    """Counts all metrics in parts of `UNITS` units.

    Args:
        predictions: the table.
        how: `rule`, `protocol` and `taught_questions` of `corsa.evaluation.prepared_predictions.prepared`.
        pairs: methods that are compared.
        last: the last round.
        base: the name of the unedited model.
    """
    whole, found = Whole.of(predictions), Tallies()
    for part in parts(predictions, UNITS):
        rows = prepared(part, **how, whole=whole)
        groups: Any = rows.groupby(["method", "trained"], sort=False)
        cells = {(str(m), int(t)): cell for (m, t), cell in groups}
        columns = {key: Columns(cell) for key, cell in cells.items()}
        counted = {key: {n: Counted.of(metric, c) for n, metric in METRICS.items()} for key, c in columns.items()}
        for key, metrics in counted.items():
            mine = found.cells.setdefault(key, {name: [] for name in METRICS})
            for name, rows_of in metrics.items():
                mine[name].append(rows_of.tally(found.units))
            found.asked.setdefault(key, Asked()).add(cells[key])
        nothing = {name: Counted.of(metric, Columns(rows.iloc[:0])) for name, metric in METRICS.items()}
        for a, b in pairs:
            ours, theirs = (counted.get((method, last), nothing) for method in (a, b))
            mine_of = found.pairs.setdefault((a, b), {name: [] for name in METRICS})
            for name in METRICS:
                items = np.intersect1d(ours[name].item, theirs[name].item)
                both = [one[name].of_items(items).tally(found.units) for one in (ours, theirs)]
                mine_of[name].append((both[0], both[1], len(items)))
        if how["rule"] != "exact":
            strict = prepared(part, **{**how, "rule": "exact"}, whole=whole)
            for method, cell in strict[strict.trained == last].groupby("method", sort=False):
                kept = found.exact.setdefault((str(method), last), {name: [] for name in METRICS})
                for name, metric in METRICS.items():
                    kept[name].append(Counted.of(metric, Columns(cell)).tally(found.units))
        found.units += int(rows.unit_code.max()) + 1 if len(rows) else 0
        found.cases += rows.case.nunique()
        found.chains += rows.chain.nunique()
        found.draws = max(found.draws, int(rows.draw.max()) + 1 if len(rows) else 0)
        found.paraphrases |= bool((rows.kind[rows.wordings] == "paraphrase").any())
        found.fallback |= set(rows.benchmark[rows.wordings & (rows.kind == "edit")].unique())
        found.seeds |= {int(seed) for seed in rows.seed[rows.method != base].unique()}
    return found
