"""Ablation (Table 9): CoRSA without SAM, without DPO, without PCGrad, and plain LoRA.

python pipelines/ablation.py --benchmark counterfact --data counterfact.json
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.experiments.base import Experiment, Methods
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("generality",)
"""The metric that compares each variant with CoRSA, as in Table 9."""


class Ablation(Experiment):
    """One round for every variant, each compared with full CoRSA."""

    methods: Methods = ("corsa", "corsa-no-sam", "corsa-no-dpo", "corsa-no-pcgrad", "lora")


def ablation(planner: Planner[Ablation]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    taught = planner.facts()
    schedule = planner.schedule(taught)
    headlines = ("edit_success", "generality", "retention", "neighborhood")
    page = Page("ablation", primary=PRIMARY, headlines=headlines, published=("Table 9",), compare_with="corsa")
    page.add(planner.base(taught), "base")
    for method, seed in planner.experiment.runs:
        page.add(planner.round(method, seed, taught, schedule), method)
    return page.step(planner)


def main() -> int:
    """Run the scenario from the command line."""
    return start(ablation, Ablation(), program="pipelines/ablation.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
