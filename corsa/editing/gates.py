"""The steps that measure what a model could do before an update and can do now, for `--gate`."""

from __future__ import annotations

from corsa.config.steps import HarnessConfig, PerplexityConfig, Shown
from corsa.editing.harness import check_harness, own_task
from corsa.editing.history import file_digest
from corsa.editing.kinds import HARNESS
from corsa.editing.options import Gates
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.kinds import ROUND
from corsa.experiments.planner import Planner
from corsa.flow import Step
from corsa.methods.memit.corpora import NEUTRAL

_PASSAGES = 64  # of about 120 words: some 8,000 tokens
_TASKS = "lm-eval:"


def tasks_of(gates: Gates) -> tuple[str, ...]:
    """The tasks of the evaluation harness that the gates name.

    Raises:
        CorsaError: a gate or a task is unknown, or the harness is not installed.
    """
    tasks: list[str] = []
    for gate in gates.gate:
        if gate.startswith(_TASKS):
            tasks.append(gate.removeprefix(_TASKS))
        elif gate != "capability":
            if not tasks:  # in `lm-eval:gsm8k,ifeval` the second name is a task too
                raise CorsaError(f"unknown gate {gate!r}: known are capability and lm-eval:TASK,TASK")
            tasks.append(gate)
    if tasks:
        check_harness([name for name in tasks if not _is_file(name)])
    elif gates.limit is not None:
        raise CorsaError("--limit bounds the documents of --gate lm-eval:TASK: give such a gate with it")
    return tuple(tasks)


def capability_steps(
    planner: Planner[Experiment], adapter: Step | None, gates: Gates
) -> tuple[list[Step], list[Shown]]:
    """The steps that measure the base model and the edited one, and how a report shows them.

    Raises:
        CorsaError: a gate is unknown, or the harness is not installed.
    """
    tasks = tasks_of(gates)
    if not gates.gate or adapter is None:
        return [], []
    place, steps = planner.experiment.placement, []
    own = {name: own_task(name) for name in tasks if _is_file(name)}
    for edited in (None, adapter):
        inputs = {"adapter": edited} if edited else {}
        owner = edited.name if edited else "base"
        if "capability" in gates.gate:
            text = PerplexityConfig(model=planner.model, digest=file_digest(NEUTRAL), passages=_PASSAGES)
            steps.append(Step(f"{owner}/perplexity", ROUND, text, inputs, place))
        if tasks:
            chosen = HarnessConfig(model=planner.model, tasks=tasks, limit=gates.limit, own=own)
            steps.append(Step(f"{owner}/harness", HARNESS, chosen, inputs, place))
    half = len(steps) // 2
    shown = [Shown(answers=step.name, method="before" if i < half else "now") for i, step in enumerate(steps)]
    return steps, shown


def _is_file(name: str) -> bool:
    """Whether a task is described by a file."""
    return name.endswith((".yaml", ".yml"))
