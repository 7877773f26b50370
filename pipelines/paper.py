"""Runs the paper's experiments on facts as one DAG on the cluster. Shared steps run once; there is one report.

    python pipelines/paper.py --benchmark counterfact --data A --then zsre --then-data B
    python pipelines/paper.py --models smollm2-135m,models/gemma.gguf --seeds 0,1,2 --protocols full,paper

Scenarios: a single update; its ablation; sensitivity; its adapter trained on a second benchmark (injection), and merged
with an adapter of that benchmark; temporal revision; its fractions; routing. `--scenarios` selects some of them.
`--models` and `--protocols` run all of it for each model and protocol, one after the other, with a report for each.
The same command goes on after an interruption, and with `--so-far` it reports what is done, also while it runs.
Sensitivity compares values on the first `--development` facts of the benchmark; the other scenarios use later facts.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated

from ablation import Ablation, ablation
from continual import Continual, fractions, injection, temporal
from merging import Merging, merging
from pydantic import Field
from routing import Routing, routing
from sensitivity import Sensitivity, sensitivity
from single_update import SingleUpdate, single_update

from corsa.config.command_line import exit_with, listed
from corsa.errors import unknown_name
from corsa.experiments.base import Experiment, Methods
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import joined
from corsa.experiments.runner import start
from corsa.flow import Step
from corsa.methods import METHODS

SCENARIOS = ("single", "ablation", "sensitivity", "injection", "merging", "temporal", "fractions", "routing")


class Paper(Experiment):
    """All scenarios with the same model, methods and training."""

    methods: Methods = ("lora", "memit", "f-learning", "corsa")
    models: Annotated[tuple[str, ...], listed(str, "M,M")] = Field(
        default=(), exclude_if=lambda names: not names, description="names of the models; default: --model alone"
    )
    protocols: Annotated[tuple[str, ...], listed(str, "P,P")] = Field(
        default=(),
        exclude_if=lambda names: not names,
        description="protocols of evaluation; default: --evaluation.protocol alone",
    )
    then: str = Field(default="zsre", description="injection and merging: the other benchmark")
    then_data: str | None = Field(default=None, description="its file")
    temporal: str = Field(default="world_facts", description="temporal and fractions: a benchmark of chains")
    temporal_data: str | None = Field(default=None, description="its file")
    fractions: Annotated[tuple[float, ...], listed(float, "F,F")] = (0.2, 0.4, 0.6, 0.8, 1.0)
    rounds: int = Field(default=3, ge=2, description="temporal: rounds of updates")
    development: int = Field(
        default=64,
        ge=1,
        description="sensitivity: number of facts on which values are compared; the other scenarios skip them",
    )
    parts: int = Field(default=4, ge=2, le=26, description="routing: parts of the data, one adapter each")
    scenarios: Annotated[tuple[str, ...], listed(str, "S,S")] = Field(
        default=SCENARIOS, description=f"some of {', '.join(SCENARIOS)}"
    )


def paper(planner: Planner[Paper]) -> Step:
    """The report step of all scenarios. Its inputs lead to every other step."""
    experiment = planner.experiment
    split = "sensitivity" in experiment.scenarios
    reported = planner.changed(offset=experiment.offset + experiment.development * split)
    tuned = {"offset": experiment.offset, "development": experiment.development}
    low_rank = tuple(method for method in experiment.methods if "adapter" not in METHODS[method].refuses)
    chains = {"benchmark": experiment.temporal, "data": experiment.temporal_data, "rounds": experiment.rounds}
    if experiment.temporal != experiment.benchmark:  # values are compared on the other benchmark's facts
        chains["offset"] = experiment.offset
    second = {"scenario": "injection", "then": experiment.then, "then_data": experiment.then_data}
    both = {"other": experiment.then, "other_data": experiment.then_data, "methods": low_rank}
    plans = {
        "single": lambda: single_update(reported.of_kind(SingleUpdate)),
        "ablation": lambda: ablation(reported.of_kind(Ablation, methods=Ablation().methods)),
        "sensitivity": lambda: sensitivity(reported.of_kind(Sensitivity, **tuned)),
        "injection": lambda: injection(reported.of_kind(Continual, **second)),
        "merging": lambda: merging(reported.of_kind(Merging, **both)),
        "temporal": lambda: temporal(reported.of_kind(Continual, **chains)),
        "fractions": lambda: fractions(reported.of_kind(Continual, **chains, fractions=experiment.fractions)),
        "routing": lambda: routing(reported.of_kind(Routing, methods=Routing().methods, parts=experiment.parts)),
    }
    for name in experiment.scenarios:
        if name not in plans:
            raise unknown_name("scenario", name, plans)
    return joined(planner, [plans[name]() for name in experiment.scenarios])


def each(experiment: Paper) -> list[Paper]:
    """The experiment with each model under each protocol."""
    models = experiment.models or (experiment.model.name,)
    found = []
    for name, protocol in product(models, experiment.protocols or (experiment.evaluation.protocol,)):
        model = experiment.model if not experiment.models else {**experiment.model.canonical(), "name": name}
        evaluation = {**experiment.evaluation.canonical(), "protocol": protocol}
        own = {"model": model, "evaluation": evaluation, "models": (), "protocols": ()}
        one = Paper.model_validate({**{field: getattr(experiment, field) for field in Paper.model_fields}, **own})
        one.checked()
        found.append(one)
    return found


def main() -> int:
    """Run all scenarios from the command line."""
    return start(paper, Paper(), program="pipelines/paper.py", description=__doc__ or "", each=each)


if __name__ == "__main__":
    exit_with(main)
