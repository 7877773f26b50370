"""Sensitivity (Fig. 5): generality against lambda, and likewise against rho and beta, the others at their defaults.

python pipelines/sensitivity.py --benchmark counterfact --data counterfact.json --lambdas 0.2,0.5,1,2,5
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from corsa.config.command_line import exit_with, listed
from corsa.config.steps import Axis, RoundsConfig
from corsa.experiments.base import Experiment, base, chain, dealt, facts
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

Values = Annotated[tuple[float, ...], listed(float, "V,V")]


class Sensitivity(Experiment):
    """One round of CoRSA for every value."""

    lambdas: Values = Field(default=(0.2, 0.5, 1.0, 2.0, 5.0), description="values of lambda")
    rhos: Values = Field(default=(0.0, 0.02, 0.05, 0.1, 0.2), description="values of rho")
    betas: Values = Field(default=(0.02, 0.05, 0.1, 0.2, 0.5), description="values of beta")


def sensitivity(experiment: Sensitivity, command: str) -> Step:
    """The report of a run, and through its inputs every step of it."""
    taught = facts(experiment, 1)
    schedule = dealt(taught, RoundsConfig(rounds=1))
    headlines = ("edit_success", "generality", "retention", "neighborhood")
    page = Page("sensitivity", headlines=headlines, published=("Figure 5",), compare_with="corsa")
    page.add(base(experiment, taught), "base")
    for seed in experiment.seeds:
        page.add(chain(experiment, "corsa", seed, taught, schedule)[0], "corsa")
    grid = {"lambda": experiment.lambdas, "rho": experiment.rhos, "beta": experiment.betas}
    for name, values in grid.items():
        points = {}
        for value in values:
            shown = f"corsa {name}={value:g}"
            field = {"lambda": "lambda_"}.get(name, name)
            changed = experiment.model_copy(update={"corsa": experiment.corsa.model_copy(update={field: value})})
            for seed in experiment.seeds:
                steps = chain(changed, "corsa", seed, taught, schedule, name=f"corsa-{name}{value:g}")
                page.add(steps[0], shown)
            points[shown] = ("corsa", value)
        axis = Axis(name=name, metrics=("generality", "edit_success"), points=points, logarithmic=min(values) > 0)
        page.axes.append(axis)
    return page.step(experiment, command)


def main() -> int:
    """Run the scenario from the command line."""
    return start(sensitivity, Sensitivity(), program="pipelines/sensitivity.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
