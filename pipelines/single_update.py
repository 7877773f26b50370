"""Single update: teaches every fact once, then asks it as taught and in other wordings (Tables 1, 4, 10, Fig. 2).

    python pipelines/single_update.py --benchmark counterfact --data counterfact.json --mmlu mmlu

Reports edit success, generality, retention of old knowledge, specificity on MMLU if its files are given, the
log-probabilities of both answers during training, and example answers (Tables 11 and 12).
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.experiments.base import Experiment, Methods
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("edit_success", "generality")
"""What an edit should teach, as taught and in other wordings."""

HEADLINES = ("edit_success", "generality", "retention", "neighborhood", "multihop")


class SingleUpdate(Experiment):
    """One round for every method."""

    methods: Methods = ("lora", "memit", "f-learning", "corsa")


def single_update(planner: Planner[Experiment]) -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    taught = planner.facts()
    schedule = planner.schedule(taught)
    page = Page("single update", primary=PRIMARY, headlines=HEADLINES, published=("Table 1",))
    page.add(planner.base(taught), "base")
    edited: dict[tuple[str, int], Step] = {}
    for method, seed in planner.experiment.runs:
        edited[method, seed] = planner.round(method, seed, taught, schedule)
        page.add(edited[method, seed], method)
    page.add_specificity(planner.specificity(edited))
    return page.step(planner)


def main() -> int:
    """Run the scenario from the command line."""
    return start(single_update, SingleUpdate(), program="pipelines/single_update.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
