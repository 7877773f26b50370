"""The page of a sweep, from trials made by hand."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest

from corsa.config.steps import RoundsConfig, SweepConfig
from corsa.evaluation.metrics import METRICS
from corsa.experiments.base import Experiment
from corsa.tuning.page import write_sweep
from corsa.tuning.space import Space

FOUND = [(1.0, 0.05, 0.5), (1.0, 0.0, 0.4), (2.0, 0.1, 0.7), (0.5, 0.2, 0.2), (4.0, 0.02, 0.6), (3.0, 0.3, 0.1)]


def row(number: int, lam: float, rho: float, value: float, seeds: dict[str, float]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in METRICS:
        metrics |= {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}
        metrics[f"{name}_seeds"] = json.dumps(seeds)
    own = {"trial": number, "state": "done", "label": f"lambda={lam},rho={rho}", "lambda": lam, "rho": rho}
    return own | {"seconds": 9.0, "training_s": 5.0, "worked_s": 6.0, "stopped_at": None, "cause": None} | metrics


@pytest.mark.parametrize("objectives", [("generality",), ("generality", "forgetting")])
@pytest.mark.parametrize("seeds", [{}, {"0": 0.4, "1": 0.6}])
def test_the_page_shows_every_figure(tmp_path: Path, objectives: tuple[str, ...], seeds: dict[str, float]) -> None:
    domains = Space.model_validate({"lambda": "0.1:10", "rho": "0|0.01:0.5"}).domains(grid=False)
    rows = [row(n, *found, seeds) for n, found in enumerate(FOUND)]
    rows.append({**rows[0], "trial": 6, "state": "stopped", "stopped_at": 2, **dict.fromkeys(METRICS)})
    study = optuna.create_study(directions=[optuna.study.StudyDirection.MAXIMIZE for _ in objectives])
    distribution = optuna.distributions.FloatDistribution(0.001, 10, log=True)
    for lam, rho, value in FOUND:
        params = {"lambda": lam, "rho": max(rho, 0.005)}
        made = optuna.trial.create_trial(
            params=params, distributions=dict.fromkeys(params, distribution), values=[value] * len(objectives)
        )
        study.add_trial(made)
    config = SweepConfig(
        experiment=Experiment().canonical(),
        command="python tune/sweep.py",
        space={name: domain.text for name, domain in domains.items()},
        objectives=objectives,
        sampler="tpe",
        seed=0,
        trials=7,
        rounds=RoundsConfig(rounds=1),
        stop="asha",
        rung=None,
        development=12,
    )
    page = write_sweep(
        tmp_path,
        table=pd.DataFrame(rows),
        config=config,
        domains=domains,
        best=2,
        front=[2, 4],
        scores={6: {2: 0.1}},
        study=study,
        this_run=60.0,
    ).read_text()
    for title in ("History", "Which setting matters", "Sensitivity to each setting", "Two settings at once"):
        assert title in page
    assert ("Pareto front" in page) == (len(objectives) > 1)
    assert ("2 settings are equally good" in page) == (len(objectives) == 1)
    packed = page.split('id="plots">')[1].split("<")[0]
    drawn = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert {trace["type"] for plot in drawn.values() for trace in plot["data"]} == {"scatter", "bar", "contour"}
    lines = next(plot for name, plot in drawn.items() if name.startswith("parallel"))["data"]
    assert len(lines) == 6
    assert lines[-1]["text"][0] == "lambda=2.0,rho=0.1: lambda 2", "the best on top"
    assert "7 trials (6 done, 1 stopped)" in page
    assert "Best: lambda=2.0,rho=0.1, generality 0.700 (0.650 to 0.750)" in page
    assert "t-intervals over seeds" in page if seeds else "intervals over facts (one seed a trial)" in page
    assert "http://" not in page.split("<script")[0].replace("http://www.w3.org", "")
