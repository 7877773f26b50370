"""A sweep as a step: runs the remaining trials, then writes the best setting, the table of trials and the page."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial, TrialState

from corsa.config import Placement
from corsa.config.steps import ReferenceConfig, SweepConfig
from corsa.data.edit import from_table
from corsa.errors import CorsaError
from corsa.evaluation.metrics import METRICS
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow.task import Task
from corsa.terminal import Console
from corsa.training.resources import trials_at_once
from corsa.tuning.page import write_sweep
from corsa.tuning.search import scheduler, search
from corsa.tuning.space import Domain, applied, default_setting, label, with_default
from corsa.tuning.study import ENDED, SweepStudy
from corsa.tuning.trials import Trials

USUAL_START = 20.0
"""Assumed seconds of a trial's start if none is measured: a sweep's first start took 18 (docs/results.md)."""

_STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


def run(task: Task) -> dict[str, Any]:
    """Step function: edits, reference, schedule -> best.yaml, pareto/, trials.parquet, report.html."""
    config: SweepConfig = task.config
    refuse_what_is_not_asked(config.objectives, pq.read_table(task.inputs["edits"].local("edits.parquet")))
    console = Console()
    planner = planner_of(task)
    study = _opened_study(task, planner.experiment, console)
    began = time.monotonic()
    _run_trials(task, planner, study, console)
    rows = {trial.number: _row(trial, config, study) for trial in study.trials if trial.state in ENDED}
    table = pd.DataFrame(list(rows.values()))
    table.to_parquet(task.output / "trials.parquet", index=False)
    if not any(row["state"] == "done" for row in rows.values()):
        causes = "; ".join(dict.fromkeys(str(row["cause"]) for row in rows.values() if row["cause"]))
        raise CorsaError(f"none of the {len(rows)} trials gave a result: {causes}")
    front = [trial.number for trial in study.study.best_trials]
    sign = 1 if METRICS[config.objectives[0]].better == "high" else -1
    best = max(front, key=lambda number: sign * rows[number][config.objectives[0]])
    summary = _write_settings(task, planner.experiment, study, rows, best, front)
    write_sweep(
        task.output,
        table=table,
        config=config,
        domains=study.domains,
        best=best,
        front=front,
        scores={t.number: dict(t.intermediate_values) for t in study.trials},
        study=study.study,
        this_run=time.monotonic() - began,
    )
    return summary


def planner_of(task: Task) -> Planner[Experiment]:
    """The planner of the trials: the sweep's experiment and placement, with the model of its reference column."""
    config: SweepConfig = task.config
    placement = Placement(**{name: getattr(task.placement, name) for name in Placement.model_fields})
    experiment = Experiment.model_validate({**config.experiment, "placement": placement})
    reference = task.step.inputs["reference"].config
    assert isinstance(reference, ReferenceConfig)
    return Planner(experiment, reference.model, config.command)


def _opened_study(task: Task, experiment: Experiment, console: Console) -> SweepStudy:
    """The sweep's study in the store; says what is searched and where it can be watched."""
    config: SweepConfig = task.config
    domains = {name: Domain.read(name, text) for name, text in config.space.items()}
    default = default_setting(experiment, domains)
    study = SweepStudy(
        task.store,
        task.placement.study,
        domains=with_default(domains, default),
        default=default,
        directions=["maximize" if METRICS[name].better == "high" else "minimize" for name in config.objectives],
        sampler=config.sampler,
        seed=config.seed,
        made_with=made_with(task),
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    searched = ", ".join(f"{name} {domain.text}" for name, domain in study.domains.items())
    console.print(f"searched: {searched}", highlight=False)
    if study.path:
        watch = f"watch it: optuna-dashboard {study.path}\n          tensorboard --logdir {study.path.parent}"
        console.print(watch, markup=False, highlight=False, soft_wrap=True)
    return study


def _run_trials(task: Task, planner: Planner[Experiment], study: SweepStudy, console: Console) -> None:
    """Run the trials that are left. If poor trials are stopped, the first one is run in full, to measure the times of a
    start and of an epoch, unless the configuration gives the rung.
    """
    config: SweepConfig = task.config

    def left() -> bool:
        return bool(study.unfinished()) or sum(t.state in ENDED for t in study.trials) < config.trials

    rung = None
    if config.stop != "no":
        if config.rung is None and not any(t.user_attrs.get("training_s") for t in study.trials):
            _search(task, planner, study, console, most=1, rung=None)
        rung, said = rung_of(config, planner.experiment, study.trials)
        console.print(said, highlight=False)
    before = -1
    while left() and len(study.trials) > before:  # a grid may have fewer trials
        before = len(study.trials)
        _search(task, planner, study, console, most=config.trials, rung=rung)


def _search(
    task: Task, planner: Planner[Experiment], study: SweepStudy, console: Console, *, most: int, rung: int | None
) -> None:
    """Run trials until `most` trials of the study have ended, with scores every `rung` epochs."""
    config, inputs, experiment = task.config, task.step.inputs, planner.experiment
    taught = Facts(inputs["edits"].name.removeprefix("edits/"), inputs["edits"], inputs["reference"])
    epochs = experiment.training.epochs * config.rounds.rounds * len(experiment.seeds)
    count, arithmetic = trials_at_once(experiment.placement)
    console.print(f"trials side by side: {arithmetic}", highlight=False)
    search(
        study,
        Trials(config, planner, taught, inputs["schedule"], task.store, rung, task.progress),
        most=most,
        at_once=count,
        pack=experiment.placement.pack,
        stops=scheduler(config.stop if rung else "no", config.objectives[0], rung or 1, epochs),
        folder=f"{task.store.url}/studies/{study.name}",
        name=datetime.now(UTC).strftime("tune-%Y%m%d-%H%M%S-%f"),
        console=console,
    )
    study.keep()


def _write_settings(
    task: Task,
    experiment: Experiment,
    study: SweepStudy,
    rows: Mapping[int, Mapping[str, Any]],
    best: int,
    front: Sequence[int],
) -> dict[str, Any]:
    """Write best.yaml, pareto/ and sweep.json from the rows of trials.parquet. Returns what sweep.json has."""
    config: SweepConfig = task.config
    settings = {trial.number: study.setting(trial) for trial in study.trials}
    named = {"best.yaml": best} | ({f"pareto/trial{n}.yaml": n for n in front} if len(front) > 1 else {})
    for name, number in named.items():
        path = task.output / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(_configuration(experiment, config, settings[number], rows[number]))
    summary = {
        "best": best,
        "label": label(experiment, settings[best]),
        "setting": settings[best],
        "front": list(front),
    }
    states = [row["state"] for row in rows.values()]
    summary |= {"trials": len(rows), **{state: states.count(state) for state in _STATES.values()}}
    summary |= {"objectives": {name: rows[best][name] for name in config.objectives}}
    (task.output / "sweep.json").write_text(json.dumps(summary, indent=1))
    return summary


def made_with(task: Task) -> dict[str, Any]:
    """The configuration that all trials of a study share. If any of it differs, another study is needed."""
    config: SweepConfig = task.config
    inputs = {name: step.fingerprint[:16] for name, step in task.step.inputs.items()}
    kept = {"model", "lora", "corsa", "training", "evaluation", "seeds"}
    same = {name: value for name, value in config.experiment.items() if name in kept}
    plan = {
        "space": config.space,
        "objectives": list(config.objectives),
        "sampler": config.sampler,
        "seed": config.seed,
    }
    plan |= {"rounds": config.rounds.canonical(), "stop": config.stop}
    return json.loads(json.dumps({**plan, "experiment": same, "inputs": inputs}))


def refuse_what_is_not_asked(objectives: Sequence[str], edits: Any) -> None:
    """Raises `CorsaError` before any trial if the data has nothing that an objective counts."""
    kinds = {probe.kind for edit in from_table(edits) for probe in edit.probes}
    for name in objectives:
        of = METRICS[name].of
        if of in ("paraphrase", "multihop", "neighbor") and of not in kinds:
            raise CorsaError(
                f"no trial would report {name}: these edits have no {of} probes, only {', '.join(sorted(kinds))}. "
                "Name another --objectives"
            )


def rung_of(config: SweepConfig, experiment: Experiment, trials: list[FrozenTrial]) -> tuple[int, str]:
    """Epochs between scores (no trial stops earlier): as configured, or derived from the time of a group's start."""
    if config.rung:
        return config.rung, f"nothing is stopped before {config.rung} epochs, as asked"
    epochs = experiment.training.epochs * config.rounds.rounds * len(experiment.seeds)
    measured = [t.user_attrs for t in trials if t.user_attrs.get("training_s") and "failed" not in t.user_attrs]
    if not measured:
        return 1, "nothing is stopped before the first epoch: no trial has shown what a start is worth"
    epoch = measured[0]["training_s"] / epochs
    # A trial that found its rounds in the store took less time than their training, so it does not measure a start.
    starts = [m["seconds"] - m["training_s"] - m["evaluation_s"] for m in measured]
    start = next((s for s in starts if s > 0), USUAL_START)
    rung = max(1, min(math.ceil(start / epoch), epochs))
    return rung, f"a start takes {start:.1f} s, an epoch {epoch:.2f} s: nothing is stopped before {rung} epochs"


def _row(trial: FrozenTrial, config: SweepConfig, study: SweepStudy) -> dict[str, Any]:
    """A trial as a row of trials.parquet."""
    attrs = trial.user_attrs
    found = attrs.get("metrics") or {}
    values = {}
    for name in dict.fromkeys([*config.objectives, *METRICS]):
        entry = found.get(name) or {}
        values |= {name: entry.get("value"), f"{name}_low": entry.get("low"), f"{name}_high": entry.get("high")}
        values[f"{name}_seeds"] = json.dumps((entry.get("seeds") or {}).get("values") or {})
    return {
        "trial": trial.number,
        "state": _STATES[trial.state],
        "label": attrs.get("label", ""),
        **study.setting(trial),
        "seconds": attrs.get("seconds"),
        "training_s": attrs.get("training_s"),
        "worked_s": attrs.get("worked_s"),
        "stopped_at": attrs.get("stopped_at"),
        "cause": attrs.get("failed"),
        **values,
    }


def _configuration(
    experiment: Experiment, config: SweepConfig, setting: Mapping[str, float], row: Mapping[str, Any]
) -> str:
    """A configuration file for `--config` with the chosen setting. A run with it skips the facts used by the sweep."""
    chosen = applied(experiment, setting).canonical()
    kept = {name: chosen[name] for name in ("model", "benchmark", "data", "lora", "corsa", "training", "evaluation")}
    if kept["data"]:
        kept["data"] = str(Path(kept["data"]).expanduser().absolute())
    kept["offset"] = experiment.offset + config.development
    measured = ", ".join(f"{name} {row[name]:.3f}" for name in config.objectives)
    return (
        f"# Trial {row['trial']} of a sweep: {measured} on {config.development} development facts, which are passed"
        f" over below (offset).\n# {config.command}\n" + yaml.safe_dump(kept, sort_keys=False)
    )
