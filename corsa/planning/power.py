"""The number of facts and seeds that a run needs to show a difference between two methods (`corsa plan --detect`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from corsa.errors import CorsaError
from corsa.evaluation.uncertainty import LEVEL, POWER, Spread, designed, detectable

SEEDS = (2, 3, 4, 5, 8, 10)
FACTS = 100_000
"""Maximum number of facts that is proposed."""

INTERACTION = 0.15
"""Standard deviation over facts of the difference between two methods on a fact, as a share."""
CELL = 0.4
"""Residual standard deviation of one fact with one seed: one in six answers differs between two runs."""


@dataclass(frozen=True)
class Assumed:
    """Variances of the difference of two methods (shares squared), and a text on their source."""

    spread: Spread
    source: str


@dataclass(frozen=True)
class Need:
    """Facts needed with this number of seeds; None: more than 100,000. `least`: smallest difference that 100,000 facts
    would show, as a share.
    """

    seeds: int
    facts: int | None
    least: float


def assumed(run_sd: float) -> Assumed:
    """Variance components if no run is available. `run_sd`: standard deviation of a method's value between runs, as a
    share.
    """
    words = (
        f"assumed: a method's value varies by {100 * run_sd:g} points from run to run (SD), the difference of two "
        f"methods by {100 * INTERACTION:g} points from fact to fact, and by {100 * CELL:g} points more of a fact in "
        "one run"
    )
    return Assumed(Spread(INTERACTION**2, 2 * run_sd**2, CELL**2), words)


def measured(path: Path, metric: str | None) -> Assumed:
    """Variance components from a stored run's comparison of `metric`; default: the primary metric that varies most.

    Raises:
        CorsaError: the file does not exist, has no metrics of a report, or has no comparison over at least two seeds.
    """
    file = path / "metrics.json" if path.is_dir() else path
    try:
        found: Any = json.loads(file.read_text())
        entries = [entry for entry in found["comparisons"] if entry["seeds"] > 1 and entry["spread"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorsaError(
            f"{file} holds no comparison of methods: give the metrics.json of a report of one scenario"
        ) from error
    chosen = [e for e in entries if (e["metric"] == metric if metric else e["primary"])]
    chosen = [e for e in chosen if found["definitions"][e["metric"]]["unit"] != "nats"]
    if not chosen:
        names = ", ".join(sorted({e["metric"] for e in entries})) or "none"
        raise CorsaError(
            f"{file} has no comparison{f' of {metric}' if metric else ' of a primary metric'} over two seeds or more "
            f"(it has: {names}); run it with --seeds 0,1,2, or leave --like out"
        )
    entry = max(chosen, key=lambda e: designed(Spread(**e["spread"]), 200, 3).error)
    pair = f"{entry['a']} and {entry['b']}"
    return Assumed(Spread(**entry["spread"]), f"as between {pair} on {entry['metric']} in {file}")


def needs(points: float, spread: Spread, tests: int, seeds: Sequence[int] = SEEDS) -> list[Need]:
    """For each number of seeds, the fewest facts that show a true difference of `points` with 80 % power, as one of
    `tests` verdicts.

    Raises:
        CorsaError: `points` is not above 0 and at most 100, or `tests` is below 1.
    """
    if not 0 < points <= 100:
        raise CorsaError(f"--detect {points:g}: give the difference in points, above 0 and at most 100")
    if tests < 1:
        raise CorsaError(f"--tests {tests}: give 1 or more")

    def shown(facts: int, runs: int) -> float:
        return detectable(designed(spread, facts, runs), tests)

    found = []
    for runs in seeds:
        least, low, high = shown(FACTS, runs), 2, FACTS
        if least > points / 100:
            found.append(Need(runs, None, least))
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if shown(middle, runs) <= points / 100 else (middle + 1, high)
        found.append(Need(runs, low, least))
    return found


def power_table(points: float, found: Sequence[Need], about: Assumed, tests: int) -> Group:
    """The result as a terminal table between texts, which have the width of the terminal."""
    title = f"Facts and seeds to show a difference of {points:g} points"
    table = Table("seeds", "facts", box=box.SIMPLE_HEAD, pad_edge=False)
    for need in found:
        never = f"none is enough: {FACTS:,} facts show {100 * need.least:.1f} points"
        table.add_row(str(need.seeds), never if need.facts is None else f"{need.facts:,}")
    level = 100 * (1 - LEVEL)
    many = f", one of {tests} verdicts corrected together" if tests > 1 else ""
    said = (
        f"Each method is trained once per seed and asked about all the facts. Power {100 * POWER:.0f} %, level "
        f"{level:.0f} %, two-sided{many}.\nVariances {about.source}."
    )
    return Group(Text(title), table, Text(said))
