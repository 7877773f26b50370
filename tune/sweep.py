"""Sweeps lambda, rho and beta: Ray Tune runs the trials that an Optuna study in the store suggests.

    python tune/sweep.py --model M --benchmark counterfact --data counterfact.json --trials 32
    python tune/sweep.py --space.rho "0|0.01:0.3" --space.lambda 0.5,1,2 --objectives generality,forgetting --rounds 3
    python tune/sweep.py --sampler grid --trials 13       # shares the results of pipelines/sensitivity.py
    python tune/sweep.py ... --confirm 3                  # best against default, on facts that no trial has seen

Trials are scored on a development split: the first `--development` facts from `--offset`. Reported results use later
facts only; best.yaml, for `--config`, sets this.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field

from corsa.config import plain
from corsa.config.command_line import configure, exit_with, listed
from corsa.config.steps import RoundsConfig
from corsa.errors import CorsaError, unknown_name
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import announce, lasting, launch, produce, repeat_command, show_plan
from corsa.flow import Artifact, Step, Store
from corsa.flow.step import topological
from corsa.planning.inputs import check_files
from corsa.planning.layers import check_lora
from corsa.terminal import Console
from corsa.tuning.space import Space, applied
from corsa.tuning.step import sweep_step

HEADLINES = ("edit_success", "generality", "forgetting", "retention", "neighborhood")


class Sweep(Experiment):
    """The search space, the search method and the objectives."""

    space: Space = Space()
    trials: int = Field(
        default=32, ge=1, description="total number of trials, including those of an earlier run of the study"
    )
    development: int = Field(
        default=64, ge=1, description="number of facts that trials learn and are asked; they are never reported"
    )
    objectives: Annotated[tuple[str, ...], listed(str, "M,M")] = Field(
        default=("generality",), description="metrics to optimize; two or more give a Pareto front"
    )
    rounds: int = Field(
        default=1, ge=1, description="rounds of the temporal scenario; the last round gives the objective"
    )
    update_share: Annotated[float, plain()] = Field(
        default=0.5, gt=0, lt=1, description="share of the chains that are revised"
    )
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    sampler_seed: int = Field(default=0, ge=0, description="seed of the suggested trials")
    stop: Literal["no", "asha", "median"] = Field(
        default="no", description="rule that stops a poor trial early, at the end of an epoch"
    )
    rung: int | None = Field(
        default=None,
        ge=1,
        description="epochs between scores; default: those that take as long as a worker group's start (first trial)",
    )
    study: str = Field(default="sweep", description="name of the study in the store")
    confirm: int = Field(
        default=0,
        ge=0,
        description="number of seeds that compare best and default on --limit facts after the development split; "
        "default: as many facts as the split has",
    )

    def checked(self) -> Self:
        """Checks the options and returns the sweep itself; see `Experiment.checked`."""
        from corsa.evaluation.metrics import METRICS

        super().checked()
        for name in self.objectives:
            if name not in METRICS:
                raise unknown_name("metric", name, METRICS)
            if METRICS[name].of == "standing" and self.rounds == 1:
                raise CorsaError(f"no trial would report {name}: it needs a later round; add --rounds 2 or more")
            if name == "agreement":
                raise CorsaError("no trial would report agreement: trials do not ask the unedited model again")
        standing = any(METRICS[name].of == "standing" for name in self.objectives)
        if not self.objectives:
            raise CorsaError("nothing to judge a trial by: name one of --objectives")
        if self.stop != "no" and (len(self.objectives) > 1 or standing):
            raise CorsaError("--stop needs one objective that a round's own answers give: leave it out")
        self.space.domains(grid=self.sampler == "grid")
        return self


def placed(experiment: Sweep) -> Sweep:
    """The sweep with the workers and the sharding from the plan of its largest trial.

    Raises:
        CorsaError: no group of the requested workers can hold a trial.
    """
    from corsa.planning.preflight import in_question

    if in_question(experiment.model, experiment.placement) is None:
        return experiment
    from corsa.experiments.groups import placement_of

    rank = experiment.space.domains(grid=experiment.sampler == "grid").get("rank")
    largest = max(rank.values or (rank.high,)) if rank else experiment.lora.rank
    trial = {"methods": ("corsa",), "lora": experiment.lora.model_copy(update={"rank": int(largest)})}
    placement = placement_of(experiment.model, experiment.model_copy(update=trial))
    return experiment.model_copy(update={"placement": placement})


def _refuse_what_cannot_be_confirmed(experiment: Sweep) -> None:
    """Raises `CorsaError` before the search if no facts are left to confirm the best setting on."""
    from corsa.data.benchmarks import read

    try:
        read(
            experiment.benchmark,
            experiment.data,
            limit=1,
            offset=experiment.offset + experiment.development,
            rounds=experiment.rounds,
            on_bad_record="skip",
        )
    except CorsaError as error:
        raise CorsaError(
            f"nothing is left to confirm the best setting on: {error}; give a smaller --development than "
            f"{experiment.development}, or leave out --confirm"
        ) from error


def sweep(planner: Planner[Sweep]) -> Step:
    """The sweep as one step. Its trials are separate steps, planned as results arrive."""
    experiment = planner.experiment
    taught = planner.changed(limit=experiment.development).facts(experiment.rounds)
    rounds = _rounds(experiment)
    return sweep_step(
        planner,
        taught,
        planner.schedule(taught, rounds),
        rounds,
        study=experiment.study,
        space={n: d.text for n, d in experiment.space.domains(grid=experiment.sampler == "grid").items()},
        objectives=experiment.objectives,
        sampler=experiment.sampler,
        seed=experiment.sampler_seed,
        trials=experiment.trials,
        stop=experiment.stop,
        rung=experiment.rung,
        development=experiment.development,
    )


def _rounds(experiment: Sweep) -> RoundsConfig:
    if experiment.rounds == 1:
        return RoundsConfig(rounds=1)  # the same as a single round in the pipelines
    return RoundsConfig(rounds=experiment.rounds, update_share=experiment.update_share)


def confirmation(planner: Planner[Sweep], best: dict[str, float]) -> Step:
    """The report that compares the best setting with the default, on facts after the development split."""
    experiment = planner.experiment
    after = experiment.offset + experiment.development
    default = planner.changed(offset=after, limit=experiment.limit or experiment.development)
    taught = default.facts(experiment.rounds)
    schedule = default.schedule(taught, _rounds(experiment))
    settings = {"corsa": default, "corsa best": replace(default, experiment=applied(default.experiment, best))}
    page = Page("confirmation", primary=experiment.objectives, headlines=HEADLINES, compare_with="corsa best")
    page.add(default.base(taught), "base")
    for seed in range(experiment.confirm):
        for shown, own in settings.items():
            rounds, name = range(1, experiment.rounds + 1), shown.replace(" ", "-")
            for step in own.chain("corsa", seed, taught, schedule, rounds=rounds, name=name):
                page.add(step, shown)
    return page.step(default)


def show(found: Artifact, console: Console) -> None:
    """Prints the best setting and the paths of the results."""
    result = found.metrics
    values = ", ".join(f"{name} {value:.3f}" for name, value in result["objectives"].items())
    counts = f"{result['done']} finished, {result['stopped']} stopped early, {result['failed']} failed"
    console.print(f"{result['trials']} trials: {counts}", highlight=False)
    console.print(f"best: trial {result['best']}, {result['label']}: {values}", highlight=False, soft_wrap=True)
    for name in ("report.html", "trials.parquet", "best.yaml"):
        console.print(found.path(name), markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    """Run the sweep from the command line, and its confirmation if --confirm is given."""
    program, console = "tune/sweep.py", Console()
    experiment = configure(Sweep(), sys.argv[1:], program=program, description=__doc__ or "").checked()
    if experiment.confirm and not experiment.dry_run:
        _refuse_what_cannot_be_confirmed(experiment)
    command = repeat_command(program, experiment.model_copy(update={"confirm": 0}), Sweep())
    experiment = placed(experiment)
    planner = Planner.of(experiment, command)
    step, store = sweep(planner), Store(lasting(experiment.storage))
    check_files(needed for needed in topological([step]) if not store.find(needed))
    check_lora(experiment.model, experiment.lora)
    if experiment.dry_run:
        show_plan([step], store, console)
        return 0
    announce(experiment, store, console)
    found = produce(step, store, console, experiment.quiet)
    if found is None:
        return 1
    show(found, console)
    if not experiment.confirm:
        return 0
    best: dict[str, float] = found.metrics["setting"]
    if found.metrics["best"] == 0:
        console.print("the best setting is the default: there is nothing to confirm")
        return 0
    confirming = replace(planner, command=f"{command} --confirm {experiment.confirm}")
    return launch(experiment, confirmation(confirming, best), console)


if __name__ == "__main__":
    exit_with(main)
