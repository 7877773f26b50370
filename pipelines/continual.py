"""Continual revision: facts are revised in rounds, and after each round the model is asked about all facts so far.

    python pipelines/continual.py                      # the embedded model on the shipped facts
    python pipelines/continual.py --fractions 0.2,0.4,0.6,0.8,1.0
    python pipelines/continual.py --scenario injection --benchmark counterfact --data A --then zsre --then-data B
    ray job submit --working-dir . -- python pipelines/continual.py

The temporal scenario of the paper (Section 4.3, Tables 3 and 5): chains of successive updates are split into an update
set and an evaluation set. Round 1 teaches both; later rounds revise only the update set, so losses in the evaluation
set are forgetting. With fractions, later rounds revise these shares of the update set (Fig. 3). The facts of a
benchmark without chains are divided among the rounds, so each round teaches new facts. Injection (Table 2): an adapter
trained on one benchmark then learns another.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from corsa.config import TrainingConfig, plain
from corsa.config.command_line import exit_with, listed
from corsa.config.steps import Axis, RoundsConfig
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("efficacy", "forgetting")
"""What each round should teach, and what it should not lose; for temporal, fractions and injection."""


class Continual(Experiment):
    """Rounds of revision."""

    scenario: Literal["temporal", "injection"] = Field(
        default="temporal", description="temporal: revise chains; injection: teach a second benchmark afterwards"
    )
    rounds: int = Field(default=3, ge=1, description="rounds of updates; a chain is cut to this many updates")
    update_share: Annotated[float, plain()] = Field(
        default=0.5, gt=0, lt=1, description="share of the chains that are revised"
    )
    split_seed: int = Field(default=0, ge=0, description="seed of the split into update and evaluation set")
    fractions: Annotated[tuple[float, ...], listed(float, "F,F")] = Field(
        default=(), description="shares of the update set that are revised, one run for each (Fig. 3)"
    )
    then: str = Field(default="zsre", description="injection: the second benchmark")
    then_data: str | None = Field(default=None, description="injection: the file of the second benchmark")


def demo() -> Continual:
    """The default experiment, if no model, benchmark or file is given. Takes minutes on a laptop without a GPU.

    Batches are smaller and the learning rate is higher than in the paper, so that 135M parameters learn 16 facts in
    few steps. These values, and rho, were chosen on facts that the demo does not report (`--offset 60`); see README.
    """
    return Continual(limit=16, training=TrainingConfig(batch=8, epochs=8, learning_rate=5e-4))


def continual(planner: Planner[Continual]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    if planner.experiment.scenario == "injection":
        return injection(planner)
    return fractions(planner) if planner.experiment.fractions else temporal(planner)


def temporal(planner: Planner[Continual]) -> Step:
    """Tables 3, 5 and 13: the update set is revised in every round."""
    experiment = planner.experiment
    taught = planner.facts(experiment.rounds)
    schedule = planner.schedule(taught, _rounds(experiment))
    page = Page("continual", primary=PRIMARY, published=("Table 3",))
    page.add(planner.base(taught), "base")
    last: dict[tuple[str, int], Step] = {}
    for method, seed in experiment.runs:
        steps = planner.chain(method, seed, taught, schedule, rounds=range(1, experiment.rounds + 1))
        for step in steps:
            page.add(step, method)
        last[method, seed] = steps[-1]
    page.add_specificity(planner.specificity(last))
    return page.step(planner)


def fractions(planner: Planner[Continual]) -> Step:
    """Figure 3: forgetting on the fixed evaluation set against the revised share of the update set."""
    experiment = planner.experiment
    taught = planner.facts(experiment.rounds)
    whole = _rounds(experiment)
    page = Page("fractions", primary=PRIMARY, published=("Figure 3",))
    page.add(planner.base(taught), "base")
    points = {}
    for method, seed in experiment.runs:
        # Shared by all fractions: it teaches both sets.
        first = planner.round(method, seed, taught, planner.schedule(taught, whole))
        for fraction in experiment.fractions:
            shown = f"{method} revising {100 * fraction:g} %"
            schedule = planner.schedule(taught, whole.model_copy(update={"fraction": fraction}))
            later = range(2, experiment.rounds + 1)
            name = f"{method}-revised{fraction:g}"
            steps = planner.chain(method, seed, taught, schedule, rounds=later, after=first, name=name)
            for step in [first, *steps]:
                page.add(step, shown)
            points[shown] = (method, fraction)
    page.axes.append(Axis(name="share of the update set revised", metrics=("forgetting", "efficacy"), points=points))
    return page.step(planner)


def injection(planner: Planner[Continual]) -> Step:
    """Table 2: an adapter trained on one benchmark learns another. The activation of Table 5 is reported too."""
    experiment = planner.experiment
    known = planner.facts()
    new = planner.changed(benchmark=experiment.then, data=experiment.then_data).facts()
    first, second = planner.schedule(known), planner.schedule(new, RoundsConfig(rounds=1, first=2))
    page = Page("injection", primary=PRIMARY, published=("Table 2", "Table 5"))
    for taught in (known, new):
        page.add(planner.base(taught), "base")
    last: dict[tuple[str, int], Step] = {}
    for method, seed in experiment.runs:
        learnt = planner.round(method, seed, known, first)
        injected = planner.round(method, seed, new, second, number=2, after=learnt, known=(known, first))
        page.add(learnt, method)
        page.add(injected, method)
        page.add(planner.answers(injected.name, known, first, injected, seed), method, trained=2)
        last[method, seed] = injected
    page.add_specificity(planner.specificity(last))
    return page.step(planner)


def _rounds(experiment: Continual) -> RoundsConfig:
    return RoundsConfig(
        rounds=experiment.rounds, update_share=experiment.update_share, split_seed=experiment.split_seed
    )


def main() -> int:
    """Run the scenario from the command line."""
    return start(continual, Continual(), demo=demo(), program="pipelines/continual.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
