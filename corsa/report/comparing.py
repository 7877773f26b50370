"""Compares two runs: the settings that differ, and each method's metrics in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from corsa.report.findings import headlines, label, shown

Told = tuple[Mapping[str, Any], dict[str, Any]]
"""The resolved configuration and the metrics of a run."""


def compared(first: Told, second: Told) -> dict[str, Any]:
    """Returns {settings: rows {name, first, second} that differ, metrics: rows {scenario, method, metric, label, unit,
    first, second}}. A metric value is an entry of `corsa.evaluation.metrics.compute`; None if the run has none.
    """
    one, other = (dict(_flat(config)) for config, _ in (first, second))
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    settings = [{"name": name, "first": one.get(name), "second": other.get(name)} for name in names]
    mine, theirs = (_values(metrics) for _, metrics in (first, second))
    rows = []
    for key in dict.fromkeys([*mine, *theirs]):
        (scenario, method, metric), known = key, mine.get(key) or theirs[key]
        values = {
            side: found[key][1] if key in found else None for side, found in (("first", mine), ("second", theirs))
        }
        about = {"scenario": scenario, "method": method, "metric": metric, "label": known[0]["label"]}
        rows.append(about | {"unit": known[0]["unit"], **values})
    return {"settings": settings, "metrics": rows}


def metric_table(rows: list[dict[str, Any]], ids: list[str]) -> Table:
    """The metrics from `compared` as a table."""
    table = Table("method", "metric", *ids, "difference", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        cells = [
            " ".join(filter(None, (v, f"({i})" if i else ""))) for v, i in map(_shown, _pair(row), 2 * [row["unit"]])
        ]
        values = [entry and entry["value"] for entry in _pair(row)]
        change = "–"
        if None not in values:
            nats = row["unit"] == "nats"
            change = f"{(values[1] - values[0]) * (1 if nats else 100):+.1f}{' nats' if nats else ' pt'}"
        name = f"{row['scenario']}: " * bool(row["scenario"]) + label(row["method"])
        table.add_row(escape(name), escape(row["label"]), *cells, change)
    return table


def _pair(row: dict[str, Any]) -> list[Any]:
    return [row["first"], row["second"]]


def _shown(entry: dict[str, Any] | None, unit: str) -> tuple[str, str]:
    return shown(entry, unit) if entry else ("–", "")


def _values(metrics: dict[str, Any]) -> dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """(definition, value) of the headline metrics after the last round, by (scenario, method, metric)."""
    several = {"": metrics} if "rows" in metrics else metrics
    return {
        (scenario, row["method"], name): (one["definitions"][name], row["metrics"][name])
        for scenario, one in several.items()
        for row in one["rows"]
        for name in headlines(one)
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
