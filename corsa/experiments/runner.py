"""Runs a scenario: plans its steps, runs them up to the report, and shows the result on the terminal.

Nothing here imports torch or ray: a run whose steps are all done starts nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console

from corsa import terminal
from corsa.config import Frozen, ModelConfig, Placement
from corsa.config.command_line import configure
from corsa.config.steps import EditsConfig
from corsa.errors import CorsaError
from corsa.experiments.base import NOT_OF_THE_RESULT, Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.remaining import left
from corsa.experiments.so_far import so_far
from corsa.flow import Outcome, Step, Store, draw, run
from corsa.flow.cluster import connect, disconnect, submitted
from corsa.flow.step import topological
from corsa.flow.store import Artifact, Record
from corsa.planning.inputs import check_files, say_what_cannot_count
from corsa.planning.layers import refuse_layers_that_do_not_exist
from corsa.planning.preflight import refuse_what_memory_cannot_hold
from corsa.training.resources import groups_side_by_side, refuse_what_cannot_fit

E = TypeVar("E", bound=Experiment)


@dataclass(frozen=True)
class Branches:
    """Separate reports, and the step that joins the successful ones: {name: report}, {name: why it is missing}.

    If a branch fails, the others continue, and the joined report omits it.
    """

    reports: Mapping[str, Step]
    join: Callable[[Mapping[str, Step], Mapping[str, str]], Step]


def start(
    scenario: Callable[[Planner[E]], Step | Branches],
    default: E,
    *,
    program: str,
    description: str,
    demo: E | None = None,
    each: Callable[[E], Sequence[E]] | None = None,
) -> int:
    """Run a scenario from the command line: check its experiment, resolve the model, make its report step (or several
    to join) and run it. `demo` is the default if no model, benchmark or configuration file is named. `each` makes
    several experiments of one: they run one after the other, and one that fails does not stop the others.
    """
    arguments = sys.argv[1:]
    named = {a.split("=")[0] for a in arguments} & {"--model", "--benchmark", "--config"}
    chosen = default if named or demo is None else demo
    experiment = configure(chosen, arguments, program=program, description=description).checked()
    # Naming the benchmark keeps the demo's sizes out of the command that repeats the run.
    known = default.model_copy(update={"benchmark": ""}) if named and demo is not None else chosen
    runs = each(experiment) if each else [experiment]
    planners = [Planner.of(one, repeat_command(program, one, known)) for one in runs]
    planned = [(planner.experiment, scenario(planner)) for planner in planners]
    console = terminal.Console()
    if len(planned) == 1:
        return launch(*planned[0], console)
    return _launch_each(planned, Store(lasting(experiment.storage)), console)


def _launch_each(planned: Sequence[tuple[Experiment, Step | Branches]], store: Store, console: Console) -> int:
    """Launch several runs one after the other. Returns the highest exit status."""
    if not any(experiment.dry_run or experiment.so_far for experiment, _ in planned):
        pending = [s for _, step in planned for s in topological(_targets(step)) if not store.find(s)]
        _say_how_long(list({step.fingerprint: step for step in pending}.values()), store.records(), console)
    status = 0
    for number, (experiment, step) in enumerate(planned, start=1):
        title = f"run {number} of {len(planned)}: {experiment.model.name}, protocol {experiment.evaluation.protocol}"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        try:
            status = max(status, launch(experiment, step, console))
        except CorsaError as error:
            console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            status = 1
    return status


def _targets(planned: Step | Branches) -> list[Step]:
    return list(planned.reports.values()) if isinstance(planned, Branches) else [planned]


def _say_how_long(pending: Sequence[Step], finished: Sequence[Record], console: Console) -> None:
    """Print how long the pending steps will take, if steps like them are finished."""
    if known := left(pending, finished):
        count = sum(step.kind.on_cluster for step in pending)
        console.print(f"{count} steps on the cluster to do: {known}", markup=False, highlight=False, soft_wrap=True)


def launch(experiment: Experiment, planned: Step | Branches, console: Console) -> int:
    """Produce a scenario's report and show it. Returns the exit status: 0, or 1 if a step failed."""
    from corsa.experiments.trackers import track_run
    from corsa.report.tables import summary_tables

    store = Store(lasting(experiment.storage))
    branches = planned if isinstance(planned, Branches) else None
    targets = _targets(planned)
    if experiment.so_far and not branches:
        targets = [so_far(targets[0], store)]
    if experiment.dry_run or not branches:  # a branch with a wrong file fails alone
        check_files(step for step in topological(targets) if not store.find(step))
    if experiment.dry_run:
        wanted = [branches.join(branches.reports, {})] if branches else targets
        show_plan(wanted, store, console)
        if experiment.cluster:
            show_forecast(wanted, experiment.cluster, console)
        return 0
    announce(experiment, store, console)
    outcome = _attempt(targets, store, console, experiment.quiet)
    if branches:
        made = {name: step for name, step in branches.reports.items() if step.fingerprint in outcome.artifacts}
        missing = {name: _why(step, outcome) for name, step in branches.reports.items() if name not in made}
        targets = [branches.join(made, missing)] if made else targets
        outcome = _and(outcome, _attempt(targets, store, console, experiment.quiet)) if made else outcome
    page = outcome.artifacts.get(targets[-1].fingerprint)
    if page is None:
        _say_what_failed(outcome, console)
        return 1
    for table in summary_tables(json.loads(page.read("metrics.json"))):
        console.print(table)
    if "scaling.json" in page.record.files:
        from corsa.report.sizes import sizes_table

        console.print(sizes_table(json.loads(page.read("scaling.json"))))
    for place in track_run(experiment.track, page):
        console.print(f"tracked in {place}", markup=False, highlight=False, soft_wrap=True)
    if outcome.failed:
        _say_what_failed(outcome, console)
    for name in ("report.html", "metrics.json", "predictions.parquet"):
        if name in page.record.files:
            console.print(page.path(name), markup=False, highlight=False, soft_wrap=True)
    return 1 if outcome.failed else 0


def show_plan(targets: Sequence[Step], store: Store, console: Console) -> None:
    """Draw some steps and their dependencies (`--dry-run`).

    Raises:
        CorsaError: the facts of a step are not available, or there are none, or an option names a layer that the model
            does not have.
    """
    from corsa.data.benchmarks import read

    refuse_layers_that_do_not_exist(step for step in topological(targets) if not store.find(step))
    for step in topological(targets):
        config = step.config
        data = getattr(step.placement, "data", None)
        # `check_files` reads files; this checks that the hub can be reached.
        if isinstance(config, EditsConfig) and config.digest.startswith("hub:") and not store.find(step):
            read(config.benchmark, data, limit=1, offset=config.offset, on_bad_record="skip")
    console.print(draw(targets, store))


def show_forecast(targets: Sequence[Step], cluster: str, console: Console) -> None:
    """Print hours, cost and schedule of some steps on a cluster, as if none was done.

    Raises:
        CorsaError: the file of the cluster is wrong, or a model does not fit.
    """
    from corsa.planning.cluster import ClusterSpec, forecast
    from corsa.planning.cluster_tables import cluster_tables

    spec = ClusterSpec.read(Path(cluster))
    with terminal.working(
        "rehearsing a step of each model for every size of group, to count memory and arithmetic (a minute)"
    ):
        found = forecast(targets, spec)
    for part in cluster_tables(found):
        console.print(part)


def announce(experiment: Experiment, store: Store, console: Console) -> None:
    """Print the storage and the settings that differ from the defaults; with `show_config`, all settings."""
    shown = experiment.canonical() if experiment.show_config else _changed(experiment, type(experiment)())
    told = {name: value for name, value in shown.items() if name not in NOT_OF_THE_RESULT and value is not None}
    text = yaml.safe_dump(told | {"storage": store.url}, sort_keys=False, default_flow_style=None, width=110)
    console.print(text.rstrip(), markup=False, highlight=False, style="dim", soft_wrap=True)


def _changed(config: Frozen, default: Frozen) -> dict[str, Any]:
    """The values that differ from the defaults, by group, under the names of a configuration file."""
    found: dict[str, Any] = {}
    every = config.canonical()
    for name, field in type(config).model_fields.items():
        mine, theirs, shown = getattr(config, name), getattr(default, name), field.alias or name
        if isinstance(mine, Frozen) and isinstance(theirs, Frozen):
            if changed := _changed(mine, theirs):
                found[shown] = changed
        elif mine != theirs:
            found[shown] = every[shown]
    return found


def produce(report: Step, store: Store, console: Console, quiet: bool = False) -> Artifact | None:
    """Run a step and its dependencies, except those already done. None if a step failed: the failure and its cause are
    printed.

    `quiet`: do not show the progress of steps.

    Raises:
        CorsaError: the run needs more resources or memory than the cluster has, or the store is not writable.
        KeyboardInterrupt: after Ctrl-C; finished steps are kept.
    """
    outcome = _attempt([report], store, console, quiet)
    if outcome.failed:
        _say_what_failed(outcome, console)
        return None
    return outcome.artifacts[report.fingerprint]


def _attempt(targets: Sequence[Step], store: Store, console: Console, quiet: bool) -> Outcome:
    """Run some steps and their dependencies, except those already done, each with the resources of its placement."""
    pending = [step for step in topological(targets) if step.kind.on_cluster and not store.find(step)]
    placements = [step.placement for step in pending if isinstance(step.placement, Placement)]

    def refuse() -> None:
        for placement in placements:
            refuse_what_cannot_fit(placement)

    before = store.records() if pending and not quiet else []
    _say_how_long(pending, before, console)
    refuse()  # now if no cluster is to be joined, else after joining it
    refuse_layers_that_do_not_exist(pending)
    refuse_what_memory_cannot_hold(pending, console)
    say_what_cannot_count(pending, console)

    def join() -> None:
        connect(console)
        refuse()

    def time_left(todo: Sequence[Step], finished: Sequence[Record]) -> str:
        return "" if quiet else left(todo, [*before, *finished])

    # Ray prints cluster messages to stdout at any time. They would mix with the results.
    console.file = console.file
    with redirect_stdout(sys.stderr):
        outcome = run(targets, store, join, _groups, console, quiet=quiet, left=time_left)
        disconnect()  # a submitted job's log merges both streams: no message may follow the results
    return outcome


def _groups(steps: Sequence[Step]) -> int:
    """How many worker groups of this size the cluster can run at once."""
    placement = steps[0].placement
    return groups_side_by_side(placement if isinstance(placement, Placement) else Placement())


def _why(step: Step, outcome: Outcome) -> str:
    """The first failure among a step's dependencies. From a worker's traceback, only the line with the error."""
    failed = [needed.name for needed in topological([step]) if needed.name in outcome.failed]
    if not failed:
        return "it was not run"
    reason = outcome.failed[failed[0]].strip().splitlines()[-1]
    return f"{failed[0]}: {reason.removeprefix('corsa.errors.CorsaError: ')}"


def _and(first: Outcome, second: Outcome) -> Outcome:
    return Outcome(first.artifacts | second.artifacts, first.failed | second.failed, [*first.not_run, *second.not_run])


def lasting(storage: str) -> str:
    """The location of a storage, or of a directory to write to. In a submitted job, a relative path is resolved below
    the home directory: the job's own directory is deleted with the job, and the results with it.
    """
    if not submitted() or "://" in storage or Path(storage).expanduser().is_absolute():
        return storage
    return str(Path.home() / storage)


def _say_what_failed(outcome: Outcome, console: Console) -> None:
    for name, cause in outcome.failed.items():
        console.print(f"error: {name}: {cause}", markup=False, highlight=False, soft_wrap=True)
    if outcome.not_run:
        console.print(
            f"not run, for want of these: {', '.join(outcome.not_run)}", markup=False, highlight=False, soft_wrap=True
        )
    console.print("finished steps are kept: once the cause is gone, the same command goes on from here")


def repeat_command(program: str, experiment: Experiment, default: Experiment) -> str:
    """The command that repeats a run. Every identity field that differs from the default becomes an option."""
    return shlex.join(["python", program, *_differences(experiment, default, "")])


def _differences(value: Frozen, default: Frozen, prefix: str) -> list[str]:
    found: list[str] = []
    for name, field in type(value).model_fields.items():
        mine, theirs = getattr(value, name), getattr(default, name)
        if isinstance(mine, Frozen):
            found += [] if isinstance(mine, Placement) else _differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs and name not in (*NOT_OF_THE_RESULT, "storage", "track"):
            option = (field.alias or name).replace("_", "-")
            group = "" if isinstance(value, ModelConfig) else prefix
            if isinstance(mine, bool):
                found.append(f"--{group}{'' if mine else 'no-'}{option}")
                continue
            word = ",".join(map(str, mine)) if isinstance(mine, tuple) else str(mine)
            found += [f"--{group}{'model' if isinstance(value, ModelConfig) and name == 'name' else option}", word]
    return found
