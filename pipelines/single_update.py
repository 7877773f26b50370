"""Single update: teaches every fact once, then asks it as taught and in other wordings (Tables 1, 4, 10, Fig. 2).

    python pipelines/single_update.py --benchmark counterfact --data counterfact.json --mmlu mmlu

Reports edit success, generality, retention of old knowledge, specificity on MMLU if its files are given, the
log-probabilities of both answers during training, and example answers (Tables 11 and 12).
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.config.steps import RoundsConfig
from corsa.experiments.base import Experiment, Methods, base, chain, dealt, facts, specificity
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

PRIMARY = ("edit_success", "generality")
"""What an edit should teach, as taught and in other wordings."""

HEADLINES = ("edit_success", "generality", "retention", "neighborhood", "multihop")


class SingleUpdate(Experiment):
    """One round for every method."""

    methods: Methods = ("lora", "memit", "f-learning", "corsa")


def single_update(experiment: Experiment, command: str, scenario: str = "single update") -> Step:
    """The report step of a run. Its inputs lead to every other step."""
    taught = facts(experiment, 1)
    schedule = dealt(taught, RoundsConfig(rounds=1))
    page = Page(scenario, primary=PRIMARY, headlines=HEADLINES, published=("Table 1",))
    page.add(base(experiment, taught), "base")
    edited: dict[tuple[str, int], Step] = {}
    for method, seed in experiment.runs:
        step = chain(experiment, method, seed, taught, schedule)[0]
        page.add(step, method)
        edited[method, seed] = step
    page.add_specificity(specificity(experiment, edited))
    return page.step(experiment, command)


def main() -> int:
    """Run the scenario from the command line."""
    return start(single_update, SingleUpdate(), program="pipelines/single_update.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
