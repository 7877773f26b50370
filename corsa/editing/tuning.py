"""`corsa edit --tune N`: N trainings with other settings on a few of the facts; the best setting teaches all of them.

The first trial has the settings as given. The others are spread evenly over the ranges of `SEARCHED` (a scrambled
Halton sequence), so all are known before the first is run: one worker group runs them, and each is an ordinary stored
step. If the trials teach all facts, the chosen trial's adapter is the update's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from corsa.config import TrainingConfig
from corsa.config.steps import ChoiceConfig, FewFactsConfig, Trial
from corsa.editing.kinds import CHOICE, FEW_FACTS
from corsa.editing.options import EditOptions, Teaching
from corsa.editing.plan import Tuned, check_free, check_place, plan_facts, with_setting
from corsa.editing.tuning_steps import told
from corsa.errors import CorsaError, StepsFailedError
from corsa.experiments.runner import lasting, produce
from corsa.flow import Step, Store
from corsa.tuning.space import Domain

FEW = 16
"""Facts of the update that a trial teaches at most."""

SEARCHED = {"learning_rate": "0.0001:0.002", "ridge": "0.001:0.1", "stop_above": "0.5:0.9:linear", "epochs": "8:30"}
"""Settings of the training that trials change, and their ranges (`corsa.tuning.space.Domain`)."""

_DEFAULT: TrainingConfig = Teaching.model_fields["training"].default


@dataclass(frozen=True)
class Tuning:
    """The planned trials. `taught`: facts that each of them teaches, and facts of the update."""

    choice: Step
    taught: tuple[int, int]
    trials: int

    def __str__(self) -> str:
        few, of = self.taught
        last = (
            "the chosen one is the adapter, so nothing more is trained"
            if few == of
            else f"then one of all {of} with the chosen settings"
        )
        return f"--tune: {self.trials} trainings of {few} facts each; {last}"


def settings(training: TrainingConfig, trials: int, seed: int, *, new_adapter: bool) -> list[dict[str, float]]:
    """The settings of the trials, with two digits; first those given. A field that differs from the default of `corsa
    edit` is kept.

    Raises:
        CorsaError: nothing is left to choose.
    """
    from scipy.stats import qmc

    domains = {
        name: Domain.read(name, text)
        for name, text in SEARCHED.items()
        if getattr(training, name) == getattr(_DEFAULT, name) and (new_adapter or name != "ridge")  # a line keeps its A
    }
    if not domains:
        raise CorsaError("--tune has nothing to choose: every setting that it searches is given")
    points = qmc.Halton(len(domains), scramble=True, rng=seed).random(trials - 1)
    drawn = [
        {name: float(f"{domain.at(u):.2g}") for (name, domain), u in zip(domains.items(), point, strict=True)}
        for point in points.tolist()
    ]
    return [{name: getattr(training, name) for name in domains}, *drawn]


def plan_tuning(options: EditOptions) -> Tuning:
    """Plans the trials and the choice among them.

    Raises:
        CorsaError: an option, a file, a name or a fact is wrong.
    """
    assert options.tune is not None
    update = plan_facts(options)
    planner, number, few = update.planner, update.number, min(FEW, update.facts)
    edits, name = update.edits, f"{update.name}/update{number}"
    if few < update.facts:
        name += f"/{few}facts"
        edits = Step(f"edits/{name}", FEW_FACTS, FewFactsConfig(facts=few, update=number), {"edits": update.edits})
    taught = planner.with_reference(name, edits)
    schedule = update.schedule(taught)
    base = planner.everyday_answers(None)
    tried, inputs = [], {base.name: base}
    chosen = settings(options.training, options.tune, options.seed, new_adapter=update.line is None)
    for index, setting in enumerate(chosen, start=1):
        own = planner.changed(training=with_setting(options.training, setting))
        step = own.round(
            options.method, options.seed, taught, schedule, number=number, after=update.after, name=f"trial{index}"
        )
        everyday = own.everyday_answers(step)
        inputs |= {step.name: step, everyday.name: everyday}
        tried.append(Trial(round=step.name, everyday=everyday.name, setting=setting))
    rule = planner.experiment.evaluation.rule
    config = ChoiceConfig(trials=tuple(tried), everyday=base.name, update=number, rule=rule)
    return Tuning(Step(f"choice/{name}", CHOICE, config, inputs), (few, update.facts), len(tried))


def chosen(tuning: Tuning, store: Store) -> Tuned | None:
    """The choice, if it has been made."""
    found = store.find(tuning.choice)
    return None if found is None else _tuned(json.loads(found.read("choice.json")), tuning)


def tune(options: EditOptions, console: Console) -> tuple[Tuned, dict[str, Any]]:
    """Runs the trials that are not done, and returns the choice and all trials (choice.json).

    Raises:
        StepsFailedError: a trial failed; the console shows which, and why.
        CorsaError: an option, a file or a fact is wrong, or the store cannot be written.
    """
    tuning, store = plan_tuning(options), Store(lasting(options.storage))
    if chosen(tuning, store) is None:  # the identity of the update is not known before the choice
        out = Path(lasting(options.out))
        check_free(out, "")
        check_place(out, options.storage)
    console.print(str(tuning), markup=False, highlight=False, soft_wrap=True)
    found = produce(tuning.choice, store, console, options.quiet)
    if found is None:
        raise StepsFailedError("a trial failed; its cause is above")
    trials = json.loads(found.read("choice.json"))
    return _tuned(trials, tuning), trials


def _tuned(found: Mapping[str, Any], tuning: Tuning) -> Tuned:
    return Tuned(found["setting"], told(found, tuning.taught))
