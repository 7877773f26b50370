"""A trial: the rounds of one setting (the same steps as in the pipelines) and their evaluation.

A trial's rounds are ordinary results in the store: a grid shares them with `pipelines/sensitivity.py`, and an
interrupted trial resumes from its checkpoints.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from rich.console import Console

from corsa.config import Placement
from corsa.config.steps import SweepConfig, TrialPlace
from corsa.evaluation.metrics import METRICS, compute
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step, Store, run
from corsa.flow.task import Progress
from corsa.tuning.space import Setting, applied, label


@dataclass(frozen=True)
class Trials:
    """The common data of all trials, and their execution. Picklable."""

    config: SweepConfig
    planner: Planner[Experiment]
    taught: Facts
    schedule: Step
    store: Store
    rung: int | None  # epochs between scores; None: no early stopping
    progress: Progress

    @property
    def experiment(self) -> Experiment:
        """The experiment that the settings change."""
        return self.planner.experiment

    def label(self, setting: Setting) -> str:
        return label(self.experiment, setting)

    def chains(self, number: int, setting: Setting, title: str) -> list[list[Step]]:
        """The rounds of a setting: one chain per seed."""
        metric = self.config.objectives[0]
        place = TrialPlace(  # the same for all trials that may be packed together; their names distinguish them
            **{name: getattr(self.experiment.placement, name) for name in Placement.model_fields},
            title=title,
            metric=metric if self.rung else None,
            rung=self.rung or 1,
            rounds=self.config.rounds.rounds,
            seeds=self.experiment.seeds,
            rule=self.experiment.evaluation.rule,
            better=METRICS[metric].better,
        )
        own = replace(self.planner, experiment=applied(self.experiment, setting)).changed(placement=place)
        rounds, name = range(1, self.config.rounds.rounds + 1), TrialPlace.named(number, self.label(setting))
        return [
            own.chain("corsa", seed, self.taught, self.schedule, rounds=rounds, name=name)
            for seed in self.experiment.seeds
        ]

    def perform(self, trials: Sequence[tuple[int, dict[str, float]]], title: str) -> dict[int, dict[str, Any]]:
        """Run the trials' rounds in one worker group. Returns, by number, {failed} or {metrics, seconds, training_s}.

        Errors of a trial are not raised: they are recorded for that trial only.
        """
        began = time.monotonic()
        chains = {number: self.chains(number, setting, title) for number, setting in trials}
        said = io.StringIO()
        last = [steps[-1] for found in chains.values() for steps in found]
        outcome = run(last, self.store, lambda: None, lambda steps: 1, Console(file=said), progress=self.progress)
        seconds = (time.monotonic() - began) / len(chains)
        results: dict[int, dict[str, Any]] = {}
        for number, found in chains.items():
            steps = [step for own in found for step in own]
            causes = [outcome.failed[step.name] for step in steps if step.name in outcome.failed]
            if not all(step.fingerprint in outcome.artifacts for step in steps):
                cause = causes[0] if causes else next(iter(outcome.failed.values()), "its rounds were not finished")
                results[number] = {"failed": cause, "seconds": seconds}
                continue
            tables = [pd.read_parquet(outcome.artifacts[s.fingerprint].local("predictions.parquet")) for s in steps]
            predictions = pd.concat(tables, ignore_index=True).assign(method="corsa")
            how: dict[str, Any] = {
                "rule": self.experiment.evaluation.rule,
                "protocol": self.experiment.evaluation.protocol,
            }
            row = compute(predictions, **how)["rows"][0]["metrics"]
            records = [outcome.artifacts[step.fingerprint].record for step in steps]
            results[number] = {
                "metrics": row,
                "seconds": seconds,
                "training_s": sum(record.metrics["training_s"] for record in records),
                "evaluation_s": sum(record.metrics["evaluation_s"] for record in records),
                "worked_s": sum(record.seconds for record in records),
            }
            nothing = [name for name in self.config.objectives if row[name]["value"] is None]
            if nothing:
                results[number]["failed"] = f"{nothing[0]} has no value: {row[nothing[0]]['reason']}"
        return results
