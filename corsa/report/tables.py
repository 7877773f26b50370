"""The terminal table of a run."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from corsa.report.findings import LOOKS_BACK, drawn, findings, headlines, marked, shown

_LINES = 12
_ARROWS = {"high": "↑", "low": "↓"}


def summary_table(metrics: dict[str, Any]) -> Table:
    """Methods against the headline metrics after the last round, with intervals. The caption states which differences
    are significant.

    Args:
        metrics: the result of `corsa.evaluation.metrics.compute`.
    """
    last, definitions, chosen = metrics["rounds"][-1], metrics["definitions"], headlines(metrics)
    title = (
        metrics.get("title")
        or f"After round {last}: {metrics['chains']} facts, rule {metrics['rule']!r}, protocol {metrics['protocol']!r}"
    )
    table = Table(
        title=escape(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method", overflow="fold")  # a long name makes room for the numbers
    for name, heading in chosen.items():
        table.add_column(f"{heading} {_ARROWS[definitions[name]['better']]}", justify="right", min_width=10)
    specific = metrics.get("specificity") or {}
    if specific:
        table.add_column("specificity ↑", justify="right", min_width=10)
    for row in metrics["rows"]:
        cells = [_cell(row["metrics"][name], definitions[name]["unit"]) for name in chosen]
        if specific:
            cells.append(shown(specific[row["method"]]["overall"], "share") if row["method"] in specific else ("–", ""))
        words = (f"{value}\n[dim]{ends}[/dim]" if ends else value for value, ends in cells)
        table.add_row(escape(marked(row["method"], metrics)), *words)
    key = f"{_ARROWS['high']} higher is better, {_ARROWS['low']} lower is better"
    sentences = findings(metrics)
    if len(sentences) > _LINES:
        sentences = [f"{len(sentences)} sentences on what can and cannot be told apart are in the report."]
    intervals = f"{100 * metrics['level']:.0f} % intervals over {drawn(metrics)}. {key}."
    back = [LOOKS_BACK] if metrics.get("looks_back") else []
    table.caption = escape("\n".join([intervals, *back, *_everyday(metrics), *sentences]))
    table.caption_style = ""
    return table


def _everyday(metrics: dict[str, Any]) -> list[str]:
    """A sentence: there is no room for two more columns on 80."""
    found = metrics.get("everyday") or {}
    told = [
        f"{marked(method, metrics)} {shown(one['right'], 'share')[0]}"
        + (f" ({shown(one['kept'], 'share')[0]})" if one["kept"] else "")
        for method, one in found.items()
    ]
    return [f"Everyday questions right (as before or still right): {', '.join(told)}."] if told else []


def _cell(entry: dict[str, Any], unit: str) -> tuple[str, str]:
    """A value, and below it its interval and its value by the rule "exact"."""
    value, ends = shown(entry, unit)
    exact = "" if entry.get("exact") is None else f"exact {100 * entry['exact']:.1f} %"
    return value, "\n".join(filter(None, (ends, exact)))


def summary_tables(metrics: dict[str, Any]) -> list[Table]:
    """The table of a run, or one table per scenario of a joined report."""
    several = {} if "rows" in metrics else metrics
    tables = [summary_table(one) for one in several.values()] if several else [summary_table(metrics)]
    for name, table in zip(several, tables, strict=False):
        table.title = f"{name.capitalize()}. {table.title}"
    return tables
