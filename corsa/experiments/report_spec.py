"""The content of a scenario's report: the answers of its steps, by method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from corsa.config.steps import Axis, JoinedConfig, ReportConfig, Shown, SpecificityConfig
from corsa.experiments.base import Experiment, identity
from corsa.experiments.kinds import EDITS, PAPER, PART, REFERENCE, REPORT, SCHEDULE
from corsa.experiments.planner import Planner
from corsa.flow import Step
from corsa.report.findings import HEADLINES


@dataclass
class Page:
    """The content of one report; `add` collects the answers. `primary`: the metrics that get verdicts."""

    scenario: str
    primary: Sequence[str]
    headlines: Sequence[str] = HEADLINES
    published: Sequence[str] = ()
    compare_with: str | None = None
    axes: list[Axis] = field(default_factory=list)
    inputs: dict[str, Step] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    specific: list[Shown] = field(default_factory=list)
    everyday: list[Shown] = field(default_factory=list)

    def add(self, answers: Step, method: str, trained: int | None = None) -> None:
        """Show a step's answers under a method's name. `trained` overrides its round."""
        self.shown.append(Shown(answers=answers.name, method=method, trained=trained))
        # Two steps with the same result and different names count as one.
        self.inputs[answers.name] = answers
        self.inputs |= {step.name: step for step in answers.inputs.values() if step.kind in (EDITS, PART, SCHEDULE)}
        self.inputs |= {step.name: step for step in answers.inputs.values() if step.kind is REFERENCE}

    def add_specificity(self, found: Sequence[tuple[Step, str, int]]) -> None:
        """Show the answers of methods and seeds to MMLU or to everyday questions."""
        for step, method, seed in found:
            shown = self.specific if isinstance(step.config, SpecificityConfig) else self.everyday
            shown.append(Shown(answers=step.name, method=method, seed=seed))
            self.inputs[step.name] = step

    def step(self, planner: Planner[Experiment], name: str | None = None) -> Step:
        """The step that makes the report, called `report/<name or scenario>`."""
        experiment = planner.experiment
        sources = [step.config for step in self.inputs.values() if step.kind is EDITS]
        names = " and ".join(dict.fromkeys(source.benchmark for source in sources))  # type: ignore[attr-defined]
        config = ReportConfig(
            title=f"{self.scenario.capitalize()}: {names} on {experiment.model.name}",
            scenario=self.scenario,
            command=planner.command,
            experiment=identity(experiment),
            rule=experiment.evaluation.rule,
            protocol=experiment.evaluation.protocol,
            kinds=experiment.evaluation.kinds,
            headlines=tuple(self.headlines),
            primary=tuple(self.primary),
            shown=tuple(self.shown),
            specificity=tuple(self.specific),
            everyday=tuple(self.everyday),
            axes=tuple(self.axes),
            compare_with=self.compare_with,
            published=tuple(self.published),
        )
        return Step(f"report/{name or self.scenario}", REPORT, config, self.inputs)


def joined(planner: Planner[Experiment], reports: Sequence[Step]) -> Step:
    """One report of several scenarios."""
    config = JoinedConfig(
        title=f"The paper's experiments on {planner.experiment.model.name}",
        command=planner.command,
        experiment=identity(planner.experiment),
    )
    return Step("report/paper", PAPER, config, {report.name: report for report in reports})
