"""Compares several model sizes: a part of the page, and a terminal table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from corsa.report.figures import against_size
from corsa.report.findings import label, shown

LABELS = {
    "generality": "generality",
    "forgetting": "forgetting",
    "training_s": "training time",
    "worker_hours": "worker hours",
    "peak_memory": "peak memory",
}


def page_of_sizes(scaling: dict[str, Any]) -> dict[str, Any]:
    """Template variables: figures, table rows, sentences on the trends, and missing runs."""
    figures = against_size(scaling)
    return {
        "figures": figures,
        "plots": {
            f"sizes-{figure.id}-{index}": plot for figure in figures for index, (_, plot) in enumerate(figure.plots)
        },
        "columns": list(_columns(scaling)),
        "rows": [_cells(point) for point in _sorted(scaling)],
        "trends": [_sentence(fit) for fit in scaling["fits"]]
        or ["Fewer than three sizes: no trend is drawn, since a line goes through any two points."],
        "missing": scaling["missing"],
    }


def sizes_table(scaling: dict[str, Any]) -> Table:
    """The terminal table."""
    table = Table(*_columns(scaling), box=box.SIMPLE_HEAD, pad_edge=False, title="Against size", title_justify="left")
    for point in _sorted(scaling):
        table.add_row(*_cells(point))
    missing = [f"missing: {name} ({why})" for name, why in scaling["missing"].items()]
    table.caption = "\n".join([*missing, *map(_sentence, scaling["fits"])][:12])
    table.caption_justify, table.caption_style = "left", ""
    return table


def _columns(scaling: dict[str, Any]) -> tuple[str, ...]:
    hours = "GPU hours" if any(point["gpu"] for point in scaling["points"]) else "worker hours"
    return "model", "parameters", "benchmark", "method", "generality", "forgetting", "training", hours, "peak memory"


def _sorted(scaling: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(scaling["points"], key=lambda p: (p["benchmark"], p["parameters"] or 0, p["method"]))


def _cells(point: dict[str, Any]) -> list[str]:
    size, peak = point["parameters"], point["peak_memory"]
    return [
        point["model"],
        "–" if not size else f"{size / 1e9:.3g}B" if size >= 1e8 else f"{size / 1e6:.3g}M",
        point["benchmark"],
        label(point["method"]),
        *(" ".join(shown(point[measure], "share")).strip() for measure in ("generality", "forgetting")),
        f"{point['training_s']:.1f} s",
        f"{point['worker_hours']:.3g}",
        f"{peak / 2**30:.2f} GiB" if peak else "–",
    ]


def _sentence(fit: dict[str, Any]) -> str:
    what = f"{label(fit['method'])} on {fit['benchmark']}: {LABELS[fit['measure']]}"
    if fit["slope"] is None:
        return f"{what} has no trend that could be computed."
    quality = "" if fit["r2"] is None else f", R² = {fit['r2']:.2f}"
    if fit["measure"] in ("generality", "forgetting"):
        change = f"changes by {100 * fit['slope']:+.1f} points for ten times the parameters"
    else:
        change = f"grows as the parameters to the power {fit['slope']:.2f}"
    return f"{what} {change} ({fit['sizes']} sizes{quality})."
