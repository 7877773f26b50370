"""Scaling (Fig. 4): the same edits in models of several sizes, with their cost, as one run on the cluster.

    python pipelines/scaling.py --models qwen3-4b,qwen3-8b,qwen3-14b --workers 8 --placement.gpu --dtype bfloat16
    python pipelines/scaling.py --models random:tiny-llama,random:tiny-llama-64,random:tiny-llama-96 --limit 5

Reports generality, forgetting, time, GPU hours and peak memory against the number of parameters, with a trend for three
or more sizes. `--benchmarks counterfact,zsre --files A,B` uses several benchmarks. On GPUs each model gets the smallest
group of at most `--workers` in which some sharding fits, with the fastest such sharding. Models share only the cluster:
if one fails, the others continue, and the report names the missing one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from corsa.config.command_line import exit_with, listed
from corsa.config.steps import RoundsConfig, ScalingConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment, identity
from corsa.experiments.kinds import SCALING
from corsa.experiments.planner import Planner
from corsa.experiments.report_spec import Page
from corsa.experiments.runner import Branches, lasting, start
from corsa.flow import Step, Store
from corsa.flow.step import topological

Words = Annotated[tuple[str, ...], listed(str, "A,B")]


PRIMARY = ("generality", "forgetting")
"""Metrics plotted against the size of the model; methods are compared within each size."""


class Scaling(Experiment):
    """Rounds of every method, for every model and benchmark."""

    models: Words = Field(default=("qwen3-4b", "qwen3-8b", "qwen3-14b"), description="names of the models")
    benchmarks: Words = Field(default=(), description="names of the benchmarks; default: --benchmark alone")
    files: Words = Field(default=(), description="files of the benchmarks, in the same order; default: --data for all")
    rounds: int = Field(default=2, ge=1, description="rounds of updates; forgetting is measured from round 2 on")


def scaling(planner: Planner[Scaling]) -> Branches:
    """The report step of each model and benchmark, and the function that joins them."""
    if not planner.experiment.models:
        raise CorsaError("nothing would be compared: name --models")
    given = planner.experiment.model.model_copy(update={"revision": None})  # --revision is of one model
    sizes = {name: planner.with_model(given.model_copy(update={"name": name})) for name in planner.experiment.models}
    return branches(planner, _placed(sizes, branches(planner, sizes)))


def branches(planner: Planner[Scaling], sizes: Mapping[str, Planner[Scaling]]) -> Branches:
    """As `scaling`, with the planner of each model."""
    experiment = planner.experiment
    names = experiment.benchmarks or (experiment.benchmark,)
    files = experiment.files or (experiment.data,) * len(names)
    if len(files) != len(names):
        raise CorsaError(f"--files names {len(files)} files for {len(names)} benchmarks: give one for each")
    reports, models, benchmarks = {}, {}, {}
    for model, sized in sizes.items():
        placement = sized.experiment.placement.model_copy(update={"branch": model})
        for benchmark, data in zip(names, files, strict=True):
            own = sized.of_kind(Experiment, benchmark=benchmark, data=data, placement=placement)
            own.experiment.checked()
            name = f"{model} on {benchmark}"
            reports[name] = _branch(own, experiment.rounds, name)
            models[name], benchmarks[name] = model, benchmark

    def join(made: Mapping[str, Step], missing: Mapping[str, str]) -> Step:
        config = ScalingConfig(
            title="Editing against the size of the model",
            command=planner.command,
            experiment=identity(experiment),
            models={name: models[name] for name in made},
            benchmarks={name: benchmarks[name] for name in made},
            missing=dict(missing),
        )
        return Step("report/scaling", SCALING, config, made)

    return Branches(reports, join)


def _branch(planner: Planner[Experiment], rounds: int, name: str) -> Step:
    """The report step of all rounds of one model, for every method."""
    shared = planner.facts(rounds)
    model = planner.experiment.model.name
    taught = replace(
        shared,
        name=f"{model}/{shared.name}",  # names distinguish the models' steps
        reference=replace(shared.reference, name=f"{model}/{shared.reference.name}"),
    )
    schedule = planner.schedule(shared, RoundsConfig(rounds=rounds))
    page = Page(f"scaling, {model}", primary=PRIMARY)
    page.add(planner.base(taught), "base")
    for method, seed in planner.experiment.runs:
        for step in planner.chain(method, seed, taught, schedule, rounds=range(1, rounds + 1)):
            page.add(step, method)
    return page.step(planner, name)


def _placed(sizes: Mapping[str, Planner[Scaling]], drawn: Branches) -> Mapping[str, Planner[Scaling]]:
    """The planners with the resources in each model's plan; unchanged if all is done, or without GPUs."""
    experiment = next(iter(sizes.values())).experiment
    if not experiment.placement.gpu:
        return sizes
    store = Store(lasting(experiment.storage))
    if all(store.find(s) for s in topological(drawn.reports.values()) if s.kind.on_cluster):
        return sizes
    from corsa.experiments.groups import placement_of

    return {
        model: sized.changed(placement=placement_of(sized.experiment.model, sized.experiment))
        for model, sized in sizes.items()
    }


def main() -> int:
    """Run the scenario from the command line."""
    return start(scaling, Scaling(), program="pipelines/scaling.py", description=__doc__ or "")


if __name__ == "__main__":
    exit_with(main)
