"""The forecast of a run on a cluster as tables for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from corsa.planning.cluster import Durations, Forecast

_LONGEST = 12
"""Steps of the critical path that the terminal shows."""


def cluster_tables(found: Sequence[Forecast]) -> Iterator[Table | str]:
    """The sizes of groups side by side, then the fastest one's critical path, and the rates."""
    spec, best = found[0].spec, found[0]
    sizes = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("workers a group", "groups", "sharding", "hours", f"cost, {spec.currency}", "idle", "longest path"):
        sizes.add_column(name, justify="left" if name == "sharding" else "right")
    for one in found:
        sizes.add_row(
            str(one.workers),
            str(one.schedule.lanes),
            ", ".join(dict.fromkeys(_sharding(one))),
            f"{one.hours:.2f}",
            f"{one.cost:,.0f}",
            f"{100 * one.schedule.idle:.0f} %",
            f"{one.path_s / 3600:.2f} h",
        )
    yield sizes
    yield (
        f"fastest: {best.schedule.lanes} group{'s' * (best.schedule.lanes != 1)} of {best.workers} "
        f"worker{'s' * (best.workers != 1)} side by side, {len(best.schedule.spans)} steps, {best.hours:.2f} h"
    )
    ends = {span.step.fingerprint: span for span in best.schedule.spans}
    path = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("longest chain of steps", "starts, h", "takes, h"):
        path.add_column(name, justify="left" if name.startswith("longest") else "right")
    for step in best.path[-_LONGEST:]:
        span = ends[step.fingerprint]
        path.add_row(step.name, f"{span.start / 3600:.2f}", f"{(span.end - span.start) / 3600:.2f}")
    yield path
    rates = Table("rate", "value", "source", box=box.SIMPLE_HEAD, pad_edge=False)
    for source in Durations(spec, best.workers, {}, best.plans).sources():
        rates.add_row(*source)
    yield rates
    if best.unknown:
        shown = ", ".join(best.unknown[:4]) + (f" and {len(best.unknown) - 4} more" if len(best.unknown) > 4 else "")
        yield f"no estimate, counted as 0 s: {shown}"


def cluster_json(found: Sequence[Forecast]) -> dict[str, Any]:
    """The same as JSON data, in seconds."""
    best = found[0]
    return {
        "cluster": best.spec.canonical(),
        "groups": [
            {
                "workers": one.workers,
                "side_by_side": one.schedule.lanes,
                "sharding": dict(zip(one.plans, _sharding(one), strict=True)),
                "seconds": one.schedule.seconds,
                "cost": one.cost,
                "idle": one.schedule.idle,
                "critical_path_s": one.path_s,
            }
            for one in found
        ],
        "critical_path": [step.name for step in best.path],
        "schedule": [
            {"step": s.step.name, "start": s.start, "end": s.end, "group": s.lane} for s in best.schedule.spans
        ],
        "rates": [source._asdict() for source in Durations(best.spec, best.workers, {}, best.plans).sources()],
        "unknown": best.unknown,
    }


def _sharding(one: Forecast) -> list[str]:
    chosen = [plan.recommended for plan in one.plans.values()]
    return [choice.holding.name for choice in chosen if choice]
