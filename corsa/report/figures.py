"""The figures of the report, each with a caption. The page sets the colours of text and grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from corsa.methods import METHODS
from corsa.report.findings import drawn, label, shown

# Mid tones with a contrast of at least 3 to 1 on the page's light and dark backgrounds.
_SPARE = ("#c9506b", "#8a8a2f", "#3a93a8", "#9a6b4f")
_SPARE_SYMBOLS = ("octagon", "hexagon", "star-square", "hourglass", "bowtie", "diamond-tall", "star")


def _looks() -> dict[str, tuple[str, str]]:
    """Colour and symbol of every method: its own, else the next spare ones, so that no two look the same."""
    spare = zip(cycle(_SPARE), cycle(_SPARE_SYMBOLS))
    own = {name: (method.colour, method.symbol) for name, method in METHODS.items()}
    found = {name: (colour, symbol) if colour and symbol else next(spare) for name, (colour, symbol) in own.items()}
    return {"base": ("#7d8590", "x"), **found}


LOOKS = _looks()
"""Colour and symbol of every method, by plotly's names."""

_LINES = 8
"""Maximum number of distinguishable curves in one plot."""


@dataclass(frozen=True)
class Figure:
    """Plots side by side under one caption. `note` replaces them if there is nothing to draw."""

    id: str
    title: str
    caption: str
    plots: list[tuple[str, go.Figure]] = field(default_factory=list)  # heading, plot
    note: str = ""


def figures(metrics: dict[str, Any], curves: pd.DataFrame) -> list[Figure]:
    """All figures of a run, in page order."""
    if len(metrics["methods"]) > _LINES and not curves.empty:  # one method with many settings: show only its own curve
        curves = curves[~curves.method.str.contains(" ")]
    settings = [_against_setting(metrics, axis) for axis in metrics.get("axes", ())]
    rounds = [_learnt_against_forgotten(metrics), _per_round(metrics)] if len(metrics["rounds"]) > 1 else []
    return [*settings, _learning(curves), *rounds, _diagnostics(curves)]


def _what_bars_are(metrics: dict[str, Any]) -> str:
    return f"Bars are 95 % intervals over {drawn(metrics)}."


def _against_setting(metrics: dict[str, Any], axis: dict[str, Any]) -> Figure:
    """Figures 3 and 5 of the paper: metrics against a setting, one line per method."""
    name = axis["name"]
    figure = Figure(
        "against-" + name.replace(" ", "-"),
        f"Against {name}",
        f"Each point is a run of its own at its {name}. {_what_bars_are(metrics)}",
    )
    rows = {row["method"]: row["metrics"] for row in metrics["rows"]}
    for metric in axis["metrics"]:
        definition = metrics["definitions"][metric]
        plot = _plot(name, "%")
        plot.update_xaxes(type="log" if axis["logarithmic"] else "linear")
        plot.update_yaxes(range=[-4, 104])
        for line in dict.fromkeys(line for line, _ in axis["points"].values()):
            entries = [
                (value, rows[shown_as][metric])
                for shown_as, (own, value) in axis["points"].items()
                if own == line and shown_as in rows and rows[shown_as][metric]["value"] is not None
            ]
            if entries:
                plot.add_scatter(
                    x=[value for value, _ in entries],
                    y=[100 * entry["value"] for _, entry in entries],
                    error_y=_bars([entry for _, entry in entries]),
                    text=[" ".join(shown(entry, definition["unit"])) for _, entry in entries],
                    hovertemplate="%{text} at %{x}",
                    **_line(line),
                )
        if plot.data:
            figure.plots.append((f"{definition['label']}: {definition['better']} is good", plot))
    return figure if figure.plots else _without(figure, "None of these runs has a value.")


def _learning(curves: pd.DataFrame) -> Figure:
    """Figure 2 of the paper: log-probabilities of both answers during training."""
    caption = (
        "Mean log-probability (nats) of the new and of the old answer on the edits being taught, {unit}, "
        "averaged over seeds. Dotted lines separate the rounds: each teaches new answers, so the new answer's curve "
        "starts low again."
    )
    figure = Figure("learning", "What training does to both answers", caption.format(unit=_unit(curves)))
    for column, heading in (
        ("logp_new", "log p(new answer): should rise"),
        ("logp_old", "log p(old answer): should fall"),
    ):
        if plot := _through_training(curves, column, "nats"):
            figure.plots.append((heading, plot))
    return figure if figure.plots else _without(figure, "No training curves were recorded.")


def _learnt_against_forgotten(metrics: dict[str, Any]) -> Figure:
    figure = Figure(
        "tradeoff",
        "What is learnt against what is forgotten",
        f"After round {metrics['rounds'][-1]}, a point for each method. The best corner is top left: takes what is "
        f"new, keeps what was learnt. {_what_bars_are(metrics)}",
    )
    cost = metrics.get("cost") or {}
    if cost:
        figure = replace(figure, caption=f"{figure.caption} The area of a point is the time that training took.")
    for learnt in ("efficacy", "generality"):
        title = metrics["definitions"][learnt]["label"].lower()
        plot = _plot("forgetting (%)", f"{title} (%)")
        for row in metrics["rows"]:
            _add_point(plot, row, "forgetting", learnt, cost)
        if plot.data:
            plot.update_xaxes(range=[-4, 104])
            plot.update_yaxes(range=[-4, 104])
            figure.plots.append((f"{title} against forgetting", plot))
    if figure.plots:
        return figure
    return _without(
        figure, "Forgetting needs a fact learnt in an earlier round and still valid: there is none in this run."
    )


_POINT = 12
"""Width of a point in pixels, without a cost."""
_COSTLIEST = 26
"""Width of the point of the method with the largest cost."""


def _add_point(plot: go.Figure, row: dict[str, Any], x: str, y: str, cost: Mapping[str, float]) -> None:
    """A method's point with its intervals, if it has both metrics. Its area is proportional to the method's cost."""
    across, up = row["metrics"][x], row["metrics"][y]
    if across["value"] is None or up["value"] is None:
        return
    text = "<br>".join(
        f"{name}: {value} ({ends})" if ends else f"{name}: {value}"
        for name, (value, ends) in ((y, shown(up, "share")), (x, shown(across, "share")))
    )
    seconds = cost.get(row["method"])
    if seconds is not None:
        text += f"<br>training: {seconds:.3g} s"
    plot.add_scatter(
        x=[100 * across["value"]],
        y=[100 * up["value"]],
        error_x=_bars([across]),
        error_y=_bars([up]),
        mode="markers",
        name=label(row["method"]),
        marker={
            "size": _COSTLIEST * math.sqrt(seconds / max(cost.values())) if seconds else _POINT,
            "color": _look(row["method"])[0],
            "symbol": _look(row["method"])[1],
        },
        hovertemplate=f"{text}<extra>{label(row['method'])}</extra>",
    )


def _per_round(metrics: dict[str, Any]) -> Figure:
    figure = Figure(
        "rounds",
        "Round after round",
        "Update efficacy (facts of that round), generality (all facts still valid) and forgetting "
        f"(facts learnt earlier and not revised since) after every round. {_what_bars_are(metrics)}",
    )
    for name in ("efficacy", "generality", "forgetting"):
        definition = metrics["definitions"][name]
        plot = _plot("round", "%")
        plot.update_xaxes(
            tickmode="array",
            tickvals=metrics["rounds"],
            range=[metrics["rounds"][0] - 0.4, metrics["rounds"][-1] + 0.4],
        )
        plot.update_yaxes(range=[-4, 104])
        methods = metrics["methods"]
        for index, method in enumerate(methods):
            rows = [
                row
                for row in metrics["series"]
                if row["method"] == method and row["metrics"][name]["value"] is not None
            ]
            entries = [row["metrics"][name] for row in rows]
            shift = 0.06 * (index - (len(methods) - 1) / 2)  # keeps the error bars of two methods apart
            if rows:
                plot.add_scatter(
                    x=[row["round"] + shift for row in rows],
                    y=[100 * entry["value"] for entry in entries],
                    error_y=_bars(entries),
                    text=[" ".join(f"{part}" for part in shown(entry, definition["unit"])) for entry in entries],
                    hovertemplate="%{text}",
                    **_line(method),
                )
        if plot.data:
            figure.plots.append((f"{definition['label']}: {definition['better']} is good", plot))
    return figure if figure.plots else _without(figure, "There is nothing to show per round.")


def _diagnostics(curves: pd.DataFrame) -> Figure:
    figure = Figure(
        "diagnostics",
        "Inside the step",
        "Cosine between the gradients of two objectives, the smallest of all pairs (CoRSA: L_SFT and L_DPO; below 0 "
        "they conflict and are projected); sharpness: how far the loss rises at the worst nearby point, "
        "L(phi + e) - L(phi); and how much the gradient changes there, as a part of its length. "
        f"{_conflict(curves)}{_unit(curves).capitalize()}.",
    )
    shown = {
        "cosine": ("Smallest cosine of two gradients", "cosine"),
        "sharpness": ("Sharpness", "nats"),
        "gradient_change": ("Change of the gradient", "|g(phi + e) - g(phi)| / |g(phi)|"),
    }
    for column, (heading, title) in shown.items():
        if column in curves and (plot := _through_training(curves, column, title)):
            figure.plots.append((heading, plot))
    return figure if figure.plots else _without(figure, "Plain LoRA computes neither gradient cosine nor sharpness.")


def _through_training(curves: pd.DataFrame, column: str, title: str) -> go.Figure | None:
    """One column of the curves: one line per method, with the rounds in sequence."""
    plot = _plot("epochs, over all rounds" if _by_epoch(curves) else "optimizer steps, over all rounds", title)
    ends: list[float] = []
    longest = 0.0
    for method, points in _points(curves, column):
        longest = max(longest, float(points.x.max()))
        gaps = points.groupby("round", as_index=False).tail(1).assign(y=None)  # no line between rounds
        points = pd.concat([points, gaps]).sort_values("round", kind="stable")
        plot.add_scatter(
            x=points.x,
            y=points.y,
            customdata=points[["round"]],
            hovertemplate="%{y:.3g} at %{x} (round %{customdata[0]})",
            **_line(method, markers=len(points) < 40),
        )
        ends = ends or [float(x) + 0.5 for x in points.groupby("round").x.max()][:-1]
    if not plot.data:
        return None
    plot.update_xaxes(range=[0.5, longest + 0.5])
    for end in ends:
        plot.add_vline(x=end, line={"width": 1, "dash": "dot", "color": "#7d8590"})
    return plot


def _points(curves: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """For each method, the means of a column: x (continues over the rounds), y, round."""
    if curves.empty or column not in curves:
        return
    unit = "epoch" if _by_epoch(curves) else "step"
    rows = curves[["method", "round", unit]].assign(y=pd.to_numeric(curves[column], errors="coerce"))
    moments = rows[["round", unit]].drop_duplicates().sort_values(["round", unit])
    moments["x"] = range(1, len(moments) + 1)
    for method in dict.fromkeys(rows.method):
        means = rows[rows.method == method].groupby(["round", unit], as_index=False).y.mean().dropna()
        if len(means):
            yield str(method), means.merge(moments, on=["round", unit])


def _by_epoch(curves: pd.DataFrame) -> bool:
    """Whether to plot one point per epoch. Every epoch mean covers the same edits. Runs of one or two epochs are
    plotted by optimizer step.
    """
    return not curves.empty and curves.epoch.nunique() > 2


def _unit(curves: pd.DataFrame) -> str:
    return "one point an epoch, the mean over every edit" if _by_epoch(curves) else "one point an optimizer step"


def _conflict(curves: pd.DataFrame) -> str:
    if curves.empty or "cosine" not in curves:
        return ""
    measured = curves[pd.to_numeric(curves.cosine, errors="coerce").notna()]
    shares = measured.conflict.eq(True).groupby(measured.method).mean()
    return "".join(
        f"In conflict under {label(str(method))}: {100 * share:.0f} % of the steps. "
        for method, share in shares.items()
    )


def _plot(x: str, y: str) -> go.Figure:
    return go.Figure(
        layout={
            "template": None,
            "autosize": True,
            "height": 320,
            "margin": {"l": 56, "r": 12, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": {"title": {"text": x}, "fixedrange": True, "zeroline": False, "automargin": True},
            "yaxis": {"title": {"text": y}, "fixedrange": True, "zeroline": False, "automargin": True},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "showlegend": True,
            "dragmode": False,
            "hovermode": "closest",
        }
    )


def _line(method: str, *, markers: bool = True) -> dict[str, Any]:
    return {
        "mode": "lines+markers" if markers else "lines",
        "name": label(method),
        "line": {
            "color": _look(method)[0],
            "width": 2,
            "dash": "solid" if method == "corsa" else "dash" if method == "lora" else "dot",
        },
        "marker": {"size": 7, "symbol": _look(method)[1]},
    }


def _bars(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Error bars from each value to both ends of its interval, in percent."""
    reach: Callable[[dict[str, Any], str], float] = lambda entry, end: (  # noqa: E731
        0.0 if entry["low"] is None else 100 * abs(entry[end] - entry["value"])
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": [reach(entry, "high") for entry in entries],
        "arrayminus": [reach(entry, "low") for entry in entries],
        "thickness": 1.2,
        "width": 4,
    }


def _look(method: str) -> tuple[str, str]:
    """Colour and symbol, also of a method with settings, such as "lora revising 20 %"."""
    return LOOKS.get(method) or (_SPARE[sum(map(ord, method)) % len(_SPARE)], "star")


def _without(figure: Figure, note: str) -> Figure:
    return Figure(figure.id, figure.title, "", note=note)


_SIZE_UNITS = {"generality": "%", "forgetting": "%", "training_s": "s", "worker_hours": "hours", "peak_memory": "GiB"}


def against_size(scaling: dict[str, Any]) -> list[Figure]:
    """Figure 4 of the paper, with the cost of each size: a figure per benchmark, a line per method, dashed trends."""
    found = []
    for number, benchmark in enumerate(dict.fromkeys(point["benchmark"] for point in scaling["points"])):
        points = [point for point in scaling["points"] if point["benchmark"] == benchmark and point["parameters"]]
        figure = Figure(
            f"size-{number}",
            f"Against size: {benchmark}",
            "Each point is a model. Dashed: the trend, where there are three sizes or more. Bars are 95 % intervals "
            "over facts, and over seeds where there are several.",
        )
        for measure, unit in _SIZE_UNITS.items():
            if plot := _size_plot([p for p in points if p[measure] is not None], scaling["fits"], measure, unit):
                figure.plots.append((measure.removesuffix("_s").replace("_", " "), plot))
        found.append(figure if figure.plots else _without(figure, "None of these runs has a value."))
    return found


def _size_plot(points: list[dict[str, Any]], trends: list[dict[str, Any]], measure: str, unit: str) -> go.Figure | None:
    scale = {"GiB": 2.0**-30, "%": 100.0}.get(unit, 1.0)
    plot = _plot("parameters", unit)
    plot.update_xaxes(type="log")
    plot.update_yaxes({"range": [-4, 104]} if unit == "%" else {"type": "log"})
    for method in dict.fromkeys(point["method"] for point in points):
        own = sorted((p for p in points if p["method"] == method), key=lambda p: p["parameters"])
        entries = [p[measure] if unit == "%" else {"value": p[measure], "low": None, "high": None} for p in own]
        known = [(p, entry) for p, entry in zip(own, entries, strict=True) if entry["value"] is not None]
        if not known:
            continue
        sizes = [p["parameters"] for p, _ in known]
        plot.add_scatter(
            x=sizes,
            y=[scale * entry["value"] for _, entry in known],
            error_y=_bars([entry for _, entry in known]) if unit == "%" else None,
            text=[p["model"] for p, _ in known],
            hovertemplate="%{text}: %{y:.3g}",
            **_line(method),
        )
        ours = (known[0][0]["benchmark"], method, measure)
        for fit in trends:
            if (fit["benchmark"], fit["method"], fit["measure"]) == ours and fit["slope"] is not None:
                ends = [fit["intercept"] + fit["slope"] * math.log10(size) for size in (sizes[0], sizes[-1])]
                drawn = [scale * (end if unit == "%" else 10**end) for end in ends]
                line = {"color": _look(method)[0], "width": 1, "dash": "dash"}
                plot.add_scatter(
                    x=[sizes[0], sizes[-1]], y=drawn, mode="lines", line=line, name=f"{label(method)}, trend"
                )
    return plot if plot.data else None
