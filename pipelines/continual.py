"""Continual revision: what a model knows is revised round after round, and all it learnt so far is asked after each.

    python pipelines/continual.py                      # the embedded model on the shipped facts
    python pipelines/continual.py --fractions 0.2,0.4,0.6,0.8,1.0
    python pipelines/continual.py --scenario injection --benchmark counterfact --data A --then zsre --then-data B
    ray job submit --working-dir . -- python pipelines/continual.py

The temporal scenario of the paper (Section 4.3, Tables 3 and 5): chains of successive updates are split into an update
set and an evaluation set. Round 1 teaches both; later rounds revise the update set only. What the evaluation set loses
is forgetting. With fractions, later rounds revise so much of the update set (Fig. 3). A benchmark without chains is
dealt out over the rounds instead, each teaching new facts. Injection (Table 2): the adapter of one benchmark goes on
learning another.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from corsa.config import TrainingConfig, plain
from corsa.config.command_line import exit_with, listed
from corsa.config.steps import Axis, RoundsConfig
from corsa.experiments.base import Experiment, asked, base, chain, dealt, facts, specificity
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step


class Continual(Experiment):
    """Rounds of revision."""

    scenario: Literal["temporal", "injection"] = Field(
        default="temporal", description="temporal: chains are revised; injection: another benchmark follows"
    )
    rounds: int = Field(default=3, ge=1, description="rounds of updates; of a chain the first so many are used")
    update_share: Annotated[float, plain()] = Field(
        default=0.5, gt=0, lt=1, description="share of the chains that is revised"
    )
    split_seed: int = Field(default=0, ge=0, description="of the split into update and evaluation set")
    fractions: Annotated[tuple[float, ...], listed(float, "F,F")] = Field(
        default=(), description="shares of the update set that are revised, each a run of its own (Fig. 3)"
    )
    then: str = Field(default="zsre", description="injection: the benchmark that follows")
    then_data: str | None = Field(default=None, description="injection: its file")


def demo() -> Continual:
    """What runs when neither model nor benchmark nor file is named: minutes on a laptop without a GPU.

    Smaller batches and a higher rate than the paper's, so that 135M parameters learn 16 facts in few steps. Chosen with
    rho on other facts (`--offset 60`) than those the demo reports; see README.
    """
    return Continual(limit=16, training=TrainingConfig(batch=8, epochs=8, learning_rate=5e-4))


def continual(experiment: Continual, command: str) -> Step:
    """The report of a run, and through its inputs every step of it."""
    if experiment.scenario == "injection":
        return injection(experiment, command)
    return fractions(experiment, command) if experiment.fractions else temporal(experiment, command)


def temporal(experiment: Continual, command: str) -> Step:
    """Tables 3, 5 and 13: the update set is revised in every round."""
    taught = facts(experiment, experiment.rounds)
    schedule = dealt(taught, _rounds(experiment))
    page = Page("continual", published=("Table 3",))
    page.add(base(experiment, taught), "base")
    last: dict[str, Step] = {}
    for method, seed in experiment.runs:
        steps = chain(experiment, method, seed, taught, schedule, rounds=range(1, experiment.rounds + 1))
        for step in steps:
            page.add(step, method)
        last.setdefault(method, steps[-1])
    page.add_specificity(specificity(experiment, last))
    return page.step(experiment, command)


def fractions(experiment: Continual, command: str) -> Step:
    """Figure 3: forgetting of the fixed evaluation set against the share of the update set that is revised."""
    taught = facts(experiment, experiment.rounds)
    whole = _rounds(experiment)
    page = Page("fractions", published=("Figure 3",))
    page.add(base(experiment, taught), "base")
    points = {}
    for method, seed in experiment.runs:
        first = chain(experiment, method, seed, taught, dealt(taught, whole))[0]  # shared: it teaches both sets
        for fraction in experiment.fractions:
            shown = f"{method} revising {100 * fraction:g} %"
            schedule = dealt(taught, whole.model_copy(update={"fraction": fraction}))
            later = range(2, experiment.rounds + 1)
            name = f"{method}-revised{fraction:g}"
            steps = chain(experiment, method, seed, taught, schedule, rounds=later, after=first, name=name)
            for step in [first, *steps]:
                page.add(step, shown)
            points[shown] = (method, fraction)
    page.axes.append(Axis(name="share of the update set revised", metrics=("forgetting", "efficacy"), points=points))
    return page.step(experiment, command)


def injection(experiment: Continual, command: str) -> Step:
    """Table 2: the adapter of one benchmark goes on learning another; Table 5's activation stands beside it."""
    known = facts(experiment, 1)
    new = facts(experiment.model_copy(update={"benchmark": experiment.then, "data": experiment.then_data}), 1)
    first, second = dealt(known, RoundsConfig(rounds=1)), dealt(new, RoundsConfig(rounds=1, first=2))
    page = Page("injection", published=("Table 2", "Table 5"))
    for taught in (known, new):
        page.add(base(experiment, taught), "base")
    last: dict[str, Step] = {}
    for method, seed in experiment.runs:
        learnt = chain(experiment, method, seed, known, first)[0]
        went_on = chain(experiment, method, seed, new, second, rounds=(2,), after=learnt)[0]
        page.add(learnt, method)
        page.add(went_on, method)
        page.add(asked(experiment, went_on.name, known, first, went_on, seed), method, trained=2)
        last.setdefault(method, went_on)
    page.add_specificity(specificity(experiment, last))
    return page.step(experiment, command)


def _rounds(experiment: Continual) -> RoundsConfig:
    return RoundsConfig(
        rounds=experiment.rounds, update_share=experiment.update_share, split_seed=experiment.split_seed
    )


def main() -> int:
    """Run the scenario from the command line."""
    return start(continual, Continual(), demo=demo(), program="pipelines/continual.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
