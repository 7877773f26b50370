"""Merging (Fig. 6): merges adapters trained separately on two benchmarks, and asks the result about both.

    python pipelines/merging.py --benchmark counterfact --data A --other zsre --other-data B --merges linear,sum,ties

Forgetting is measured against each single adapter: the share of its right answers that the merged one gets wrong.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from corsa.config.command_line import exit_with, listed
from corsa.config.steps import MergeConfig, MergeMethod
from corsa.errors import CorsaError, unknown_name
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step
from corsa.methods import METHODS

MERGES = get_args(MergeMethod)


PRIMARY = ("generality", "forgetting")
"""What the merged adapter knows, and what it lost; CoRSA is compared with the other methods for each merge."""


class Merging(Experiment):
    """Two adapters per method, and their merges."""

    other: str = Field(default="zsre", description="the second benchmark")
    other_data: str | None = Field(default=None, description="file of the second benchmark")
    merges: Annotated[tuple[str, ...], listed(str, "M,M")] = Field(
        default=("linear", "sum", "average", "svd", "ties", "dare_linear"), description=f"some of {', '.join(MERGES)}"
    )
    rank: int = Field(default=32, ge=1, description="rank of the merged adapter, for svd")
    density: float = Field(default=0.5, gt=0, le=1, description="share of the values that ties and dare keep")


def merging(planner: Planner[Merging]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    experiment = planner.experiment
    for name in experiment.methods:
        if why := METHODS[name].refuses.get("adapter"):
            raise CorsaError(f"{why}, and these merges take adapters: leave {name} out of --methods")
    for way in experiment.merges:
        if way not in MERGES:
            raise unknown_name("merge", way, MERGES)
    one = planner.facts()
    other = planner.changed(benchmark=experiment.other, data=experiment.other_data).facts()
    schedules = {taught: planner.schedule(taught) for taught in (one, other)}
    page = Page(
        "merging", primary=PRIMARY, headlines=("generality", "forgetting", "edit_success"), published=("Figure 6",)
    )
    for taught in schedules:
        page.add(planner.base(taught), "base")
    for method, seed in experiment.runs:
        alone = [planner.round(method, seed, taught, schedule) for taught, schedule in schedules.items()]
        for way in experiment.merges:
            shown = f"{method} {way}"
            config = MergeConfig(
                method=way,  # type: ignore[arg-type]
                rank=experiment.rank if way == "svd" else None,
                density=experiment.density if way in ("ties", "dare_linear", "dare_ties") else 0.5,
                seed=seed if "dare" in way else 0,
            )
            adapter = planner.merged(f"merge/{method}/seed{seed}/{way}", alone, config)
            for step in alone:
                page.add(step, shown)
            for taught, schedule in schedules.items():
                answers = planner.answers(adapter.name, taught, schedule, adapter, seed)
                page.add(answers, shown, trained=2)
    return page.step(planner)


def main() -> int:
    """Run the scenario from the command line."""
    return start(merging, Merging(), program="pipelines/merging.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
