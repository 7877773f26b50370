"""Single update: every fact is taught once, and asked in its own and in other words (Tables 1, 4 and 10, Fig. 2).

    python pipelines/single_update.py --benchmark counterfact --data counterfact.json --mmlu mmlu

Edit success, generality, retention of old knowledge, specificity on MMLU where its files are named, the
log-probabilities of both answers through training, and examples of answers (Tables 11 and 12).
"""

from __future__ import annotations

from corsa.config.command_line import exit_with
from corsa.config.steps import RoundsConfig
from corsa.experiments.base import Experiment, Methods, base, chain, dealt, facts, specificity
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import start
from corsa.flow import Step

HEADLINES = ("edit_success", "generality", "retention", "neighborhood", "multihop")


class SingleUpdate(Experiment):
    """One round for every method."""

    methods: Methods = ("lora", "memit", "f-learning", "corsa")


def single_update(experiment: Experiment, command: str, scenario: str = "single update") -> Step:
    """The report of a run, and through its inputs every step of it."""
    taught = facts(experiment, 1)
    schedule = dealt(taught, RoundsConfig(rounds=1))
    page = Page(scenario, headlines=HEADLINES, published=("Table 1",))
    page.add(base(experiment, taught), "base")
    edited: dict[str, Step] = {}
    for method, seed in experiment.runs:
        step = chain(experiment, method, seed, taught, schedule)[0]
        page.add(step, method)
        edited.setdefault(method, step)
    page.add_specificity(specificity(experiment, edited))
    return page.step(experiment, command)


def main() -> int:
    """Run the scenario from the command line."""
    return start(single_update, SingleUpdate(), program="pipelines/single_update.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
