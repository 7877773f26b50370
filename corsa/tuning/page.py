"""The page of a sweep: the trials, their cost, and the conclusions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
import yaml
from plotly.colors import sample_colorscale
from scipy.interpolate import griddata
from scipy.spatial import QhullError

from corsa.config.steps import SweepConfig
from corsa.evaluation.metrics import METRICS
from corsa.report.figures import Figure, _plot
from corsa.report.layout import write_page
from corsa.tuning.space import Domain

_POINT, _BEST, _QUIET = "#2f7fd6", "#c2681d", "#7d8590"


def write_sweep(
    directory: Path,
    *,
    table: pd.DataFrame,
    config: SweepConfig,
    domains: Mapping[str, Domain],
    best: int,
    front: Sequence[int],
    scores: Mapping[int, Mapping[int, float]],
    study: optuna.Study,
    this_run: float,
) -> Path:
    """Write `report.html` of a sweep. `table`: trials.parquet. `scores`: {trial: {epoch: score}}."""
    done = table[table.state == "done"].copy()
    figures = [
        _history(table, done, config, scores),
        _importance(study, config),
        _slices(done, config, domains, best),
        _contours(done, config, domains, best),
        _parallel(done, config, domains),
        *([_front(done, config, front)] if len(config.objectives) > 1 else []),
        _cost(table),
    ]
    plots = {f"{f.id}-{i}": plot for f in figures for i, (_, plot) in enumerate(f.plots)}
    told = [name for name in ("stopped_at", "cause") if table[name].notna().any()]
    columns = ["trial", "state", *domains, *config.objectives, "seconds", *told]
    return write_page(
        directory,
        "sweep.html",
        title=f"Sweep of {', '.join(domains)} on {config.experiment['model']['name']}",
        plots=plots,
        figures=figures,
        prefix="",
        sentences=_sentences(table, done, config, best, front, this_run),
        columns=[name.replace("_", " ") for name in columns],
        rows=[[_cell(value) for value in row] for row in table[columns].itertuples(index=False)],
        run={"command": config.command, "versions": None, "hardware": None},
        config=yaml.safe_dump(config.canonical(), sort_keys=False),
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sentences(
    table: pd.DataFrame, done: pd.DataFrame, config: SweepConfig, best: int, front: Sequence[int], this_run: float
) -> list[str]:
    names = " and ".join(METRICS[name].label.lower() for name in config.objectives)
    counts = ", ".join(f"{n} {state}" for state, n in table.state.value_counts().items())
    chosen = done[done.trial == best].iloc[0]
    found = [
        f"{len(table)} trials ({counts}), judged by {names} on {config.development} development facts that no report "
        "made with best.yaml asks.",
        f"Best: {chosen.label}, "
        + ", ".join(f"{METRICS[n].label.lower()} {chosen[n]:.3f}{_ends(chosen, n)}" for n in config.objectives)
        + ".",
    ]
    if 0 in set(done.trial) and best != 0:
        first = done[done.trial == 0].iloc[0]
        name = config.objectives[0]
        found.append(
            f"The default, {first.label}, has {METRICS[name].label.lower()} {first[name]:.3f}{_ends(first, name)}. The "
            "best of many is flattered by chance: --confirm N compares the two on other facts, over N seeds."
        )
    if len(front) > 1:
        found.append(
            f"{len(front)} settings are on the Pareto front: none is better than another on every objective."
            if len(config.objectives) > 1
            else f"{len(front)} settings are equally good."
        )
    total, training = table.seconds.sum(), table.training_s.sum()
    found.append(
        f"The trials took {total / 60:.1f} minutes of a worker group, {training / 60:.1f} of them steps; this run took "
        f"{this_run / 60:.1f} minutes."
    )
    return found


def _ends(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None or pd.isna(low) else f" ({low:.3f} to {high:.3f})"


def _history(
    table: pd.DataFrame, done: pd.DataFrame, config: SweepConfig, scores: Mapping[int, Mapping[int, float]]
) -> Figure:
    figure = Figure(
        "history",
        "History",
        "Every finished trial in its order, and the best so far; stopped trials at their last score.",
    )
    for name in config.objectives:
        plot = _plot("trial", METRICS[name].label)
        plot.add_scatter(
            x=done.trial,
            y=done[name],
            mode="markers",
            name="finished",
            text=done.label,
            marker={"color": _POINT, "size": 9},
        )
        running = done[name].cummax() if METRICS[name].better == "high" else done[name].cummin()
        plot.add_scatter(
            x=done.trial, y=running, mode="lines", name="best so far", line={"color": _BEST, "shape": "hv"}
        )
        stopped = [
            (n, list(s.values())[-1])
            for n, s in scores.items()
            if s and n in set(table.trial[table.state == "stopped"])
        ]
        if stopped and name == config.objectives[0]:
            plot.add_scatter(
                x=[n for n, _ in stopped],
                y=[v for _, v in stopped],
                mode="markers",
                name="stopped early",
                marker={"color": _QUIET, "symbol": "x", "size": 9},
            )
        figure.plots.append((METRICS[name].label, plot))
    if any(scores.values()):
        plot = _plot("epoch", METRICS[config.objectives[0]].label)
        for number, own in scores.items():
            if own:
                plot.add_scatter(x=list(own), y=list(own.values()), mode="lines+markers", name=f"trial {number}")
        figure.plots.append(("Scores during training", plot))
    return figure


def _importance(study: optuna.Study, config: SweepConfig) -> Figure:
    figure = Figure(
        "importance",
        "Which setting matters",
        "Share of the objective's variance that follows from each "
        "setting (PED-ANOVA of Optuna): a hint, no test, with few trials.",
    )
    for index, name in enumerate(config.objectives):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = optuna.importance.get_param_importances(
                    study,
                    evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                    target=lambda trial, i=index: trial.values[i],
                )
        except (RuntimeError, ValueError):
            continue
        plot = _plot("importance", "")
        plot.add_bar(x=list(found.values()), y=list(found), orientation="h", marker={"color": _POINT}, name=name)
        plot.update_layout(showlegend=False)
        figure.plots.append((METRICS[name].label, plot))
    return figure if figure.plots else Figure(figure.id, figure.title, "", note="Too few trials to say.")


def _slices(done: pd.DataFrame, config: SweepConfig, domains: Mapping[str, Domain], best: int) -> Figure:
    several = any(len(json.loads(text)) > 1 for text in done[f"{config.objectives[0]}_seeds"])
    of = f"95 % intervals over {'facts and seeds' if several else 'facts (one seed a trial)'}"
    figure = Figure(
        "slices",
        "Sensitivity to each setting",
        f"Every trial at its value of one setting, the others "
        f"varying too. Bars are {of}. A value of 0 stands at the left end.",
    )
    for objective in config.objectives:
        for name, domain in domains.items():
            plot = _plot(name, METRICS[objective].label)
            if domain.log:
                plot.update_xaxes(type="log")
            low, high = zip(*(_interval(row, objective) for _, row in done.iterrows()), strict=True)
            values = [_placed(value, domain, done[name]) for value in done[name]]
            centre = done[objective].to_numpy(float)
            for chosen, colour, title in ((done.trial != best, _POINT, "trial"), (done.trial == best, _BEST, "best")):
                at = np.flatnonzero(chosen.to_numpy())
                plot.add_scatter(
                    x=[values[i] for i in at],
                    y=centre[at],
                    mode="markers",
                    name=title,
                    text=[done.label.iloc[i] for i in at],
                    marker={"color": colour, "size": 9},
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "thickness": 1,
                        "width": 3,
                        "array": [max(0.0, high[i] - centre[i]) for i in at],
                        "arrayminus": [max(0.0, centre[i] - low[i]) for i in at],
                    },
                )
            figure.plots.append((f"{METRICS[objective].label} against {name}", plot))
    return figure


def _interval(row: pd.Series, name: str) -> tuple[float, float]:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return (float(row[name]), float(row[name])) if low is None or pd.isna(low) else (float(low), float(high))


def _placed(value: float, domain: Domain, values: pd.Series) -> float:
    """The axis position of a value. On a log scale, 0 is at the left end."""
    if value > 0 or not domain.log:
        return value
    return domain.floor or float(values[values > 0].min()) / 2


def _scaled(done: pd.DataFrame, name: str, domains: Mapping[str, Domain]) -> np.ndarray:
    """A column's values on the scale of its setting."""
    domain = domains.get(name)
    if domain is None or not domain.log:
        return done[name].to_numpy(dtype=float)
    return np.log10([_placed(value, domain, done[name]) for value in done[name]])


def _contours(done: pd.DataFrame, config: SweepConfig, domains: Mapping[str, Domain], best: int) -> Figure:
    name = config.objectives[0]
    figure = Figure(
        "contours",
        "Two settings at once",
        f"{METRICS[name].label}, interpolated linearly between trials (points); nothing is said outside of them. "
        "A value of 0 stands at the lower end.",
    )
    for one, other in combinations(domains, 2):
        x, y, z = _scaled(done, one, domains), _scaled(done, other, domains), done[name].to_numpy(dtype=float)
        plot = _plot(f"log10 {one}" if domains[one].log else one, f"log10 {other}" if domains[other].log else other)
        if len(done) >= 4 and np.ptp(x) > 0 and np.ptp(y) > 0:
            across, up = np.linspace(x.min(), x.max(), 40), np.linspace(y.min(), y.max(), 40)
            try:
                surface = griddata((x, y), z, tuple(np.meshgrid(across, up)), method="linear", rescale=True)
            except QhullError:  # the trials are collinear
                surface = None
            if surface is not None:
                plot.add_trace(go.Contour(x=across, y=up, z=surface, colorscale="Viridis", name="", showscale=True))
        plot.add_scatter(
            x=x,
            y=y,
            mode="markers",
            text=done.label,
            showlegend=False,
            marker={
                "color": [_BEST if t == best else "#ffffff" for t in done.trial],
                "size": 9,
                "line": {"color": "#333333", "width": 1},
            },
        )
        figure.plots.append((f"{one} and {other}", plot))
    return figure if figure.plots else Figure(figure.id, figure.title, "", note="Only one setting was searched.")


def _parallel(done: pd.DataFrame, config: SweepConfig, domains: Mapping[str, Domain]) -> Figure:
    """Uses plain lines, because plotly's parallel coordinates are empty in a browser without WebGL."""
    objective = METRICS[config.objectives[0]]
    figure = Figure(
        "parallel",
        "All settings of a trial",
        f"A line a trial, from blue to orange with its {objective.label.lower()}, orange is good. Each axis goes from "
        "the least to the greatest value that was tried, on its setting's scale; a value of 0 stands at the lower end.",
    )
    names = {name: METRICS[name].label if name in METRICS else name for name in (*domains, *config.objectives)}
    heights = {}
    for name in names:
        scaled = _scaled(done, name, domains)
        heights[name] = (scaled - scaled.min()) / (np.ptp(scaled) or 1.0)
    good = heights[config.objectives[0]] if objective.better == "high" else 1 - heights[config.objectives[0]]
    plot = _plot("", "")
    for i in np.argsort(good, kind="stable"):  # the best on top
        plot.add_scatter(
            x=list(names.values()),
            y=[heights[name][i] for name in names],
            mode="lines+markers",
            text=[f"{done.label.iloc[i]}: {label} {done[name].iloc[i]:.4g}" for name, label in names.items()],
            hoverinfo="text",
            line={"color": sample_colorscale([_POINT, _BEST], float(good[i]))[0]},
            showlegend=False,
        )
    for name, label in names.items():
        for value, y, anchor in ((done[name].min(), 0, "top"), (done[name].max(), 1, "bottom")):
            plot.add_annotation(x=label, y=y, text=f"{value:.3g}", yanchor=anchor, yshift=20 * y - 10, showarrow=False)
    plot.update_yaxes(visible=False, range=[-0.15, 1.15])
    figure.plots.append(("", plot))
    return figure


def _front(done: pd.DataFrame, config: SweepConfig, front: Sequence[int]) -> Figure:
    one, other = config.objectives[:2]
    figure = Figure("front", "Pareto front", "Orange: no other trial is better on every objective.")
    plot = _plot(METRICS[one].label, METRICS[other].label)
    for chosen, colour, title in ((~done.trial.isin(front), _POINT, "trial"), (done.trial.isin(front), _BEST, "front")):
        own = done[chosen].sort_values(one)
        plot.add_scatter(
            x=own[one], y=own[other], text=own.label, mode="markers", name=title, marker={"color": colour, "size": 10}
        )
    figure.plots.append((f"{METRICS[one].better} and {METRICS[other].better} is good", plot))
    return figure


def _cost(table: pd.DataFrame) -> Figure:
    figure = Figure(
        "cost",
        "What it cost",
        "Seconds of a worker group for each trial: steps, and all else (start, model, "
        "questions). A trial whose rounds were in the store already cost next to nothing.",
    )
    plot = _plot("trial", "seconds")
    seconds = table.seconds.fillna(0).astype(float)
    steps = np.minimum(table.training_s.fillna(0).astype(float), seconds)
    plot.add_bar(x=table.trial, y=steps, name="steps", marker={"color": _POINT})
    plot.add_bar(x=table.trial, y=seconds - steps, name="all else", marker={"color": _QUIET})
    plot.update_layout(barmode="stack")
    figure.plots.append(("", plot))
    return figure
