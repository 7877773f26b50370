"""Routing (Table 8): one adapter for each part of the data, and a router that sends every query to one adapter.

    python pipelines/routing.py --benchmark counterfact --data counterfact.json --parts 4

Routers: "prompt" shows the model a description of every part and asks which one fits (as in the paper); "embedding"
takes the part whose facts are most similar to the query; "oracle" always takes the right part, the upper bound of
both. For comparison, one adapter is trained on all the data.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from corsa.config.command_line import exit_with, listed
from corsa.experiments.base import Experiment, Methods
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("generality",)
"""The metric that compares each router with one adapter for all the data, as in Table 8."""


class Routing(Experiment):
    """An adapter for every part, and one for the whole."""

    methods: Methods = ("corsa",)
    parts: int = Field(default=4, ge=2, le=26, description="parts of the data, one adapter each")
    routers: Annotated[tuple[str, ...], listed(str, "R,R")] = Field(
        default=("prompt", "embedding", "oracle"), description="some of prompt, embedding, oracle"
    )


def routing(planner: Planner[Routing]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    experiment = planner.experiment
    whole = planner.facts()
    schedule = planner.schedule(whole)
    parts = [planner.part_of(whole, part, experiment.parts) for part in range(experiment.parts)]
    headlines = ("generality", "edit_success", "retention")
    alone = experiment.methods[0]  # one adapter for everything
    page = Page("routing", primary=PRIMARY, headlines=headlines, published=("Table 8",), compare_with=alone)
    page.add(planner.base(whole), "base")
    for method, seed in experiment.runs:
        page.add(planner.round(method, seed, whole, schedule), method)
        adapters = [planner.round(method, seed, part, planner.schedule(part)) for part in parts]
        for router in experiment.routers:
            answers = planner.routed(method, router, whole, schedule, parts, adapters, seed)
            page.add(answers, f"{method} by {router}")
    return page.step(planner)


def main() -> int:
    """Run the scenario from the command line."""
    return start(routing, Routing(), program="pipelines/routing.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
