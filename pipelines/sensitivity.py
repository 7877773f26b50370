"""Sensitivity (Fig. 5): generality of CoRSA against lambda, rho and beta, one varied and the others at their defaults.
Also that of F-Learning against its alpha, whose default is this project's choice.

    python pipelines/sensitivity.py --benchmark counterfact --data counterfact.json --lambdas 0.2,0.5,1,2,5

Readers choose values from this figure, so it uses a development split, like the trials of the sweep: the first
`--development` facts from `--offset`. Report results with a chosen value on later facts only. The page is exploratory;
`tune/sweep.py --confirm` compares a chosen value with the default on facts that were not used to choose it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from corsa.config.command_line import exit_with, listed
from corsa.config.steps import Axis
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

Values = Annotated[tuple[float, ...], listed(float, "V,V")]


PRIMARY = ()
"""None: values are chosen here, and their gain must be shown on other facts."""


class Sensitivity(Experiment):
    """One round of CoRSA for every value of its settings, and one of F-Learning for every alpha."""

    development: int = Field(
        default=64, ge=1, description="number of facts on which values are compared; they are never reported"
    )

    lambdas: Values = Field(default=(0.2, 0.5, 1.0, 2.0, 5.0), description="values of lambda")
    rhos: Values = Field(default=(0.0, 0.02, 0.05, 0.1, 0.2), description="values of rho")
    betas: Values = Field(default=(0.02, 0.05, 0.1, 0.2, 0.5), description="values of beta")
    alphas: Values = Field(default=(0.03, 0.1, 0.3, 1.0), description="values of F-Learning's alpha")


def sensitivity(planner: Planner[Sensitivity]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    experiment = planner.experiment
    taught = planner.changed(limit=experiment.development).facts(split="development")
    schedule = planner.schedule(taught)
    headlines = ("edit_success", "generality", "retention", "neighborhood")
    page = Page("sensitivity", primary=PRIMARY, headlines=headlines, published=("Figure 5",), compare_with="corsa")
    page.add(planner.base(taught), "base")
    for seed in experiment.seeds:
        page.add(planner.round("corsa", seed, taught, schedule), "corsa")
    grid = {
        "lambda": ("corsa", "lambda_", experiment.lambdas),
        "rho": ("corsa", "rho", experiment.rhos),
        "beta": ("corsa", "beta", experiment.betas),
        "alpha": ("f-learning", "alpha", experiment.alphas),
    }
    for name, (method, field, values) in grid.items():
        points = {}
        group = method.replace("-", "_")
        for value in values:
            shown = f"{method} {name}={value:g}"
            changed = planner.changed(**{group: getattr(experiment, group).model_copy(update={field: value})})
            for seed in experiment.seeds:
                step = changed.round(method, seed, taught, schedule, name=f"{method}-{name}{value:g}")
                page.add(step, shown)
            points[shown] = (method, value)
        axis = Axis(name=name, metrics=("generality", "edit_success"), points=points, logarithmic=min(values) > 0)
        page.axes.append(axis)
    return page.step(planner)


def main() -> int:
    """Run the scenario from the command line."""
    return start(sensitivity, Sensitivity(), program="pipelines/sensitivity.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
