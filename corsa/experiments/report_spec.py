"""What a report shows of a scenario: the answers that its steps gave, under the names of the methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from corsa.config.steps import Axis, JoinedConfig, ReportConfig, Shown
from corsa.experiments.base import EDITS, PART, REFERENCE, REPORT, SCHEDULE, Experiment, identity
from corsa.flow import Kind, Step
from corsa.report.findings import HEADLINES

PAPER = Kind("report", "corsa.experiments.steps:join_reports", version=2)


@dataclass
class Page:
    """What one report shows; `add` collects the answers."""

    scenario: str
    headlines: Sequence[str] = HEADLINES
    published: Sequence[str] = ()
    compare_with: str | None = None
    axes: list[Axis] = field(default_factory=list)
    inputs: dict[str, Step] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    specific: list[Shown] = field(default_factory=list)

    def add(self, answers: Step, method: str, trained: int | None = None) -> None:
        """Show a step's answers under a method's name, and after a round other than its own if one is given."""
        self.shown.append(Shown(answers=answers.name, method=method, trained=trained))
        # A step that shares its result with another of a different name is one step.
        self.inputs[answers.name] = answers
        self.inputs |= {step.name: step for step in answers.inputs.values() if step.kind in (EDITS, PART, SCHEDULE)}
        self.inputs |= {step.name: step for step in answers.inputs.values() if step.kind is REFERENCE}

    def add_specificity(self, found: Iterable[tuple[Step, str]]) -> None:
        """Show the answers to MMLU."""
        for step, method in found:
            self.specific.append(Shown(answers=step.name, method=method))
            self.inputs[step.name] = step

    def step(self, experiment: Experiment, command: str, name: str | None = None) -> Step:
        """The step that makes the report, called `report/<name or scenario>`."""
        sources = [step.config for step in self.inputs.values() if step.kind is EDITS]
        names = " and ".join(dict.fromkeys(source.benchmark for source in sources))  # type: ignore[attr-defined]
        config = ReportConfig(
            title=f"{self.scenario.capitalize()}: {names} on {experiment.model.name}",
            scenario=self.scenario,
            command=command,
            experiment=identity(experiment),
            rule=experiment.evaluation.match,
            protocol=experiment.evaluation.protocol,
            headlines=tuple(self.headlines),
            shown=tuple(self.shown),
            specificity=tuple(self.specific),
            axes=tuple(self.axes),
            compare_with=self.compare_with,
            published=tuple(self.published),
        )
        return Step(f"report/{name or self.scenario}", REPORT, config, self.inputs)


def joined(experiment: Experiment, command: str, reports: Sequence[Step]) -> Step:
    """One report of several scenarios."""
    config = JoinedConfig(
        title=f"The paper's experiments on {experiment.model.name}", command=command, experiment=identity(experiment)
    )
    return Step("report/paper", PAPER, config, {report.name: report for report in reports})
