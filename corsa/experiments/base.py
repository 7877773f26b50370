"""The configuration and the steps that all scenarios share.

A scenario (a file under `pipelines/`) is a function from a configuration to steps; `corsa.experiments.runner` runs
them. Nothing here imports torch or ray: planning a scenario needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from corsa.config import SEEDS, AnswerEnd, RunSettings
from corsa.config.command_line import listed
from corsa.config.steps import (
    AnchorsConfig,
    AskingConfig,
    EditsConfig,
    EditsPlace,
    MergeConfig,
    PartConfig,
    QuestionsConfig,
    QuestionsPlace,
    ReferenceConfig,
    RoundConfig,
    RoundsConfig,
    RoutingConfig,
    SpecificityConfig,
    SweepConfig,
    SweepPlace,
)
from corsa.data.benchmarks import BENCHMARKS, contradiction_rule, locate
from corsa.errors import CorsaError, unknown_name
from corsa.evaluation import anchor_questions, mmlu
from corsa.flow import Kind, Step
from corsa.methods import METHODS, known_method
from corsa.models.registry import pin

EDITS = Kind("edits", "corsa.experiments.steps:read_edits", version=3)
PART = Kind("part", "corsa.experiments.steps:take_part", version=1)
REFERENCE = Kind("reference", "corsa.training.reference:compute", version=2, on_cluster=True)
SCHEDULE = Kind("schedule", "corsa.experiments.steps:deal_rounds", version=1)
QUESTIONS = Kind("questions", "corsa.experiments.steps:read_questions", version=1)
ROUND = Kind("round", "corsa.training.rounds:run", version=2, on_cluster=True, together=True)
MERGE = Kind("merge", "corsa.experiments.steps:merge_adapters", version=1)
REPORT = Kind("report", "corsa.experiments.steps:make_report", version=4)
SWEEP = Kind("sweep", "corsa.tuning.sweep:run", version=1, on_cluster=True)
SCALING = Kind("report", "corsa.experiments.scaling:join_sizes", version=2)

NOT_OF_THE_RESULT = ("config", "dry_run", "quiet", "show_config")
"""Fields of an experiment that affect only its output or name its configuration file."""


Methods = Annotated[
    tuple[str, ...], listed(str, "A,B"), Field(description=f"compared methods, of {', '.join(METHODS)}")
]


class Experiment(RunSettings):
    """Fields of every scenario."""

    config: str | None = Field(
        default=None, description="YAML file with any of these fields; the command line wins over it"
    )
    benchmark: str = Field(default="world_facts", description=f"one of {', '.join(BENCHMARKS)}")
    data: str | None = Field(
        default=None, description="the benchmark's file; without it the hub's rows, or the shipped file"
    )
    limit: int | None = Field(default=None, description="facts (chains) to use from the benchmark; all by default")
    offset: int = Field(default=0, ge=0, description="facts (chains) to skip, such as those a setting was chosen on")
    on_bad_record: Literal["skip", "stop"] | None = Field(
        default=None,
        description="bad records: skip and list them, or stop at the first; default: published files skip, yours stop",
    )
    on_contradiction: Literal["report", "refuse", "keep-first"] | None = Field(
        default=None,
        description="edits that give one question different new answers: report them, refuse, or keep the first; "
        "default: published files report, yours refuse",
    )
    methods: Methods = ("lora", "corsa")
    seeds: Annotated[tuple[int, ...], listed(int, "N,N")] = Field(
        default=(0,), description="every method is trained once per seed"
    )
    storage: str = Field(
        default="runs",
        description="where results live: a directory (of a submitted job: below its home), s3://... or gs://...",
    )
    track: Annotated[tuple[str, ...], listed(str, "T,T")] = Field(
        default=(), description="send the finished run to tensorboard:DIR, mlflow[:URI] or wandb[:PROJECT]"
    )
    dry_run: bool = Field(default=False, description="draw the steps and show which are done; run nothing")
    quiet: bool = Field(default=False, description="do not show the progress of steps")
    show_config: bool = Field(default=False, description="print every setting first, not only changed ones")
    mmlu: str | None = Field(
        default=None,
        description="measure specificity on MMLU: directory with its test/ and dev/ files, or 'hub'; else it is not",
    )
    mmlu_limit: int | None = Field(default=None, ge=1, description="questions of each subject; all by default")

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("methods", "seeds")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @property
    def runs(self) -> list[tuple[str, int]]:
        """The (method, seed) pairs to train: every method with every seed."""
        return [(method, seed) for method in self.methods for seed in self.seeds]

    def checked(self) -> Experiment:
        """Returns itself after checking its names.

        Raises:
            CorsaError: an unknown method or benchmark, no method or no seed.
        """
        if self.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", self.benchmark, BENCHMARKS)
        for name in self.methods:
            known_method(name)
        if wrong := [seed for seed in self.seeds if not 0 <= seed <= SEEDS]:
            raise CorsaError(f"--seeds {wrong[0]}: a seed is a whole number from 0 to {SEEDS}")
        check_trackers(self.track)
        if not self.methods or not self.seeds:
            raise CorsaError("nothing would be trained: name at least one of --methods and one of --seeds")
        self.evaluation.checked(self.model)
        return self


def check_trackers(where: Sequence[str]) -> None:
    """Raises `CorsaError` if a finished run cannot be sent to a tracker."""
    if where:  # tracker libraries are loaded only if one is named
        from corsa.experiments.trackers import check

        check(where)


# Steps of scenarios


@dataclass(frozen=True)
class Facts:
    """A prepared benchmark: its `Edit` table, and the reference column, which is computed once for all methods.

    A method with another answer end has its own reference column (`ending`).
    """

    name: str
    edits: Step
    reference: Step

    @property
    def tables(self) -> dict[str, Step]:
        """Both tables as inputs of a step."""
        return {"edits": self.edits, "reference": self.reference}

    def ending(self, answer_end: AnswerEnd) -> Facts:
        """The same facts with the reference column for this answer end."""
        config = self.reference.config
        assert isinstance(config, ReferenceConfig)
        if config.answer_end == answer_end:
            return self
        other = config.model_copy(update={"answer_end": answer_end})
        return replace(
            self, reference=replace(self.reference, name=f"{self.reference.name}/{answer_end}", config=other)
        )


def facts(experiment: Experiment, rounds: int, split: str = "") -> Facts:
    """The experiment's benchmark, with the first `rounds` updates of each chain. `split` distinguishes its steps from
    those of other facts of the benchmark.
    """
    limit = experiment.limit
    if limit is not None and limit < 1:
        raise CorsaError(
            f"--limit {limit}: nothing would be edited; give 1 or more, or leave it out to take every fact"
        )
    source = locate(experiment.benchmark, experiment.data)
    config = EditsConfig(
        benchmark=experiment.benchmark,
        digest=source.digest(),
        limit=limit,
        offset=experiment.offset,
        rounds=rounds,
        on_bad_record=_on_bad_record(experiment),
        on_contradiction=experiment.on_contradiction or contradiction_rule(experiment.benchmark),
        whole_cases=experiment.evaluation.protocol == "full" or not BENCHMARKS[experiment.benchmark].repeats,
    )
    name = experiment.benchmark + f"-x{rounds}" * (rounds > 1) + f"-{split}" * bool(split)
    place = str(source.path.absolute()) if experiment.data and source.path else None  # for a pipe: its stored copy
    edits = Step(f"edits/{name}", EDITS, config, placement=EditsPlace(data=place))
    return with_reference(experiment, name, edits)


def part_of(experiment: Experiment, whole: Facts, part: int, parts: int) -> Facts:
    """One of `parts` parts of a benchmark's edits. Edits of one relation stay together."""
    name = f"{whole.name}/part{part + 1}of{parts}"
    edits = Step(f"edits/{name}", PART, PartConfig(part=part, parts=parts), {"edits": whole.edits})
    return with_reference(experiment, name, edits)


def with_reference(experiment: Experiment, name: str, edits: Step) -> Facts:
    """Named edits together with their reference column."""
    config = ReferenceConfig(
        model=pin(experiment.model),
        on_bad_record=_on_bad_record(experiment),
        answer_end=experiment.training.effective(experiment.model.template).answer_end,
    )
    reference = Step(f"reference/{name}", REFERENCE, config, {"edits": edits}, experiment.placement)
    return Facts(name, edits, reference)


def _on_bad_record(experiment: Experiment) -> Literal["skip", "stop"]:
    known = BENCHMARKS.get(experiment.benchmark)  # does not contain the code domain's problems
    return experiment.on_bad_record or (known.on_bad_record if known else "stop")


def absolute(path: str | None) -> str | None:
    """The absolute path: workers run in directories of their own."""
    return str(Path(path).expanduser().absolute()) if path else None


def dealt(taught: Facts, rounds: RoundsConfig) -> Step:
    """The step that assigns edits to rounds."""
    other = f"/from{rounds.first}" * (rounds.first > 1) + f"/revised{rounds.fraction:g}" * (rounds.fraction < 1)
    return Step(f"schedule/{taught.name}{other}", SCHEDULE, rounds, {"edits": taught.edits})


def chain(
    experiment: Experiment,
    method: str,
    seed: int,
    taught: Facts,
    schedule: Step,
    *,
    rounds: Sequence[int] = (1,),
    after: Step | None = None,
    known: tuple[Facts, Step] | None = None,
    name: str | None = None,
) -> list[Step]:
    """The rounds of one method and seed. Each continues from the previous round's adapter; the first from `after`'s.

    `known`: other facts that the chain was taught before, with their schedule; rounds that look back depend on them.
    `name` replaces the method in the names of the steps, if one method is trained with several settings.
    """
    record, settings = METHODS[method], experiment.model_copy(update={"model": pin(experiment.model)})
    steps: list[Step] = []
    for number in rounds:
        config = record.round_config(settings, seed, number)
        own = taught.ending(config.training.answer_end) if isinstance(config, RoundConfig) else taught
        inputs = {**own.tables, "schedule": schedule}
        previous = steps[-1] if steps else after
        if previous and record.continues:
            inputs["previous"] = previous
        if known and record.looks_back(config):
            before, when = known
            ending = config.training.answer_end if isinstance(config, RoundConfig) else "end_token"
            reference = before.ending(ending).reference
            inputs |= {"known_reference": reference, "known_schedule": when}
        if isinstance(config, RoundConfig) and config.training.anchor:
            inputs["anchors"] = anchors(settings)
        inputs |= record.inputs(settings)
        title = f"{taught.name}/{name or method}/seed{seed}/round{number}"
        steps.append(Step(title, ROUND, config, inputs, experiment.placement))
    return steps


def base(experiment: Experiment, taught: Facts) -> Step:
    """The answers of the unedited model."""
    config = AskingConfig(model=pin(experiment.model), evaluation=experiment.evaluation.asking())
    return Step(f"{taught.name}/base", ROUND, config, taught.tables, experiment.placement)


def anchors(experiment: Experiment) -> Step:
    """The unedited model's answers to the anchor questions (`training.anchor`). All runs of a model share them."""
    config = AnchorsConfig(model=pin(experiment.model), digest=anchor_questions.digest(), new_tokens=ANCHOR_TOKENS)
    return Step("base/anchors", ROUND, config, placement=experiment.placement)


ANCHOR_TOKENS = 32
"""Most tokens of an answer to an anchor question."""


def asked(
    experiment: Experiment, name: str, taught: Facts, schedule: Step, adapter: Step, seed: int = 0, round_: int = 1
) -> Step:
    """The answers of an edited model to the probes of facts, as valid after a round. `adapter` is the step that trained
    the model.
    """
    evaluation = experiment.evaluation.asking()
    config = AskingConfig(model=pin(experiment.model), evaluation=evaluation, seed=seed, round=round_)
    inputs = {**taught.tables, "schedule": schedule, "adapter": adapter}
    return Step(f"{name}/asked/{taught.name}", ROUND, config, inputs, experiment.placement)


def routed(
    experiment: Experiment,
    method: str,
    router: str,
    taught: Facts,
    schedule: Step,
    parts: Sequence[Facts],
    adapters: Sequence[Step],
    seed: int = 0,
) -> Step:
    """The answers of a model that sends each query about `taught` to the adapter of one of its parts."""
    if router not in ROUTERS:
        raise unknown_name("router", router, ROUTERS)
    config = RoutingConfig.model_validate(
        {
            "model": pin(experiment.model),
            "evaluation": experiment.evaluation.asking(),
            "seed": seed,
            "round": 1,
            "router": router,
        }
    )
    inputs = {**taught.tables, "schedule": schedule}
    for number, (part, adapter) in enumerate(zip(parts, adapters, strict=True), start=1):
        inputs |= {f"edits{number}": part.edits, f"adapter{number}": adapter}
    return Step(f"{taught.name}/{method}-by-{router}/seed{seed}", ROUND, config, inputs, experiment.placement)


def specificity(experiment: Experiment, edited: Mapping[tuple[str, int], Step]) -> list[tuple[Step, str, int]]:
    """The MMLU answers of the unedited model and of each edited one, {(method, seed): its adapter}; each with its
    method and seed.

    Empty if the experiment names no MMLU files.
    """
    if experiment.mmlu is None:
        return []
    data = None if experiment.mmlu == "hub" else absolute(experiment.mmlu)
    read = QuestionsConfig(digest=mmlu.digest(data), limit=experiment.mmlu_limit)
    questions = Step("mmlu", QUESTIONS, read, placement=QuestionsPlace(data=data))
    config = SpecificityConfig(model=pin(experiment.model))
    steps = [(Step("base/mmlu", ROUND, config, {"questions": questions}, experiment.placement), "base", 0)]
    for (method, seed), adapter in edited.items():
        inputs = {"questions": questions, "adapter": adapter}
        steps.append((Step(f"{adapter.name}/mmlu", ROUND, config, inputs, experiment.placement), method, seed))
    return steps


def merged(name: str, adapters: Sequence[Step], config: MergeConfig) -> Step:
    """Merges separately trained adapters into one."""
    return Step(name, MERGE, config, {f"adapter{i}": step for i, step in enumerate(adapters, start=1)})


def swept(
    experiment: Experiment,
    taught: Facts,
    schedule: Step,
    rounds: RoundsConfig,
    *,
    command: str,
    study: str,
    **plan: Any,
) -> Step:
    """The sweep of a space over facts that are taught on a schedule. `plan`: further fields of `SweepConfig`."""
    common = Experiment.model_validate({name: getattr(experiment, name) for name in Experiment.model_fields})
    config = SweepConfig(experiment=identity(common), command=command, rounds=rounds, **plan)
    place = SweepPlace(**dict(experiment.placement), study=study)
    return Step(f"sweep/{taught.name}", SWEEP, config, {**taught.tables, "schedule": schedule}, place)


ROUTERS = ("prompt", "embedding", "oracle")


def identity(experiment: Experiment) -> dict[str, Any]:
    """The resolved configuration without the settings of how it runs."""
    how = {*NOT_OF_THE_RESULT, "storage", "track", "placement"}
    return {k: v for k, v in experiment.canonical().items() if k not in how}
