"""The step of a sweep. Imports neither torch, ray nor optuna."""

from __future__ import annotations

from typing import Any

from corsa.config.steps import RoundsConfig, SweepConfig, SweepPlace
from corsa.experiments.base import Experiment, identity
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Kind, Step, StepFunction


def _run() -> StepFunction:
    from corsa.tuning.sweep import run

    return run


SWEEP = Kind("sweep", _run, version=1, on_cluster=True)


def sweep_step(
    planner: Planner[Experiment], taught: Facts, schedule: Step, rounds: RoundsConfig, *, study: str, **search: Any
) -> Step:
    """The sweep of a space over facts that are taught on a schedule. `search`: further fields of `SweepConfig`."""
    common = planner.of_kind(Experiment)
    config = SweepConfig(experiment=identity(common.experiment), command=planner.command, rounds=rounds, **search)
    place = SweepPlace(**dict(planner.experiment.placement), study=study)
    return Step(f"sweep/{taught.name}", SWEEP, config, {**taught.tables, "schedule": schedule}, place)
