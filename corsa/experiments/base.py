"""What every scenario shares: its configuration, and the steps it is made of.

A scenario (a file under `pipelines/`) is a function from a configuration to steps; `corsa.experiments.runner` runs
them. Nothing here imports torch or ray: a scenario is planned before either is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from corsa.config import (
    METHODS,
    STEPS,
    EvaluationConfig,
    FLearningConfig,
    Frozen,
    LoraConfig,
    MemitConfig,
    ModelConfig,
    Placement,
    StepConfig,
    TrainingConfig,
)
from corsa.config.command_line import listed
from corsa.config.steps import (
    AskingConfig,
    EditsConfig,
    EditsPlace,
    FLearningRoundConfig,
    MemitRoundConfig,
    MergeConfig,
    PartConfig,
    QuestionsConfig,
    QuestionsPlace,
    ReferenceConfig,
    RoundConfig,
    RoundsConfig,
    RoutingConfig,
    SpecificityConfig,
    StatisticsConfig,
    StatisticsPlace,
    SweepConfig,
    SweepPlace,
)
from corsa.data.benchmarks import BENCHMARKS, digest
from corsa.errors import CorsaError, unknown_name
from corsa.evaluation import mmlu
from corsa.flow import Kind, Step
from corsa.models.registry import pin

EDITS = Kind("edits", "corsa.experiments.steps:read_edits", version=2)
PART = Kind("part", "corsa.experiments.steps:take_part", version=1)
REFERENCE = Kind("reference", "corsa.training.reference:compute", version=1, on_cluster=True)
STATISTICS = Kind("statistics", "corsa.methods.memit.statistics_stage:compute", version=1, on_cluster=True)
SCHEDULE = Kind("schedule", "corsa.experiments.steps:deal_rounds", version=1)
QUESTIONS = Kind("questions", "corsa.experiments.steps:read_questions", version=1)
ROUND = Kind("round", "corsa.training.rounds:run", version=1, on_cluster=True, together=True)
MERGE = Kind("merge", "corsa.experiments.steps:merge_adapters", version=1)
REPORT = Kind("report", "corsa.experiments.steps:make_report", version=2)
SWEEP = Kind("sweep", "corsa.tuning.sweep:run", version=1, on_cluster=True)
SCALING = Kind("report", "corsa.experiments.scaling:join_sizes", version=1)


Methods = Annotated[
    tuple[str, ...], listed(str, "A,B"), Field(description=f"compared methods, of {', '.join(METHODS)}")
]


class Experiment(Frozen):
    """Fields every scenario has."""

    config: str | None = Field(
        default=None, description="YAML file with any of these fields; the command line wins over it"
    )
    model: ModelConfig = ModelConfig()
    benchmark: str = Field(default="world_facts", description=f"one of {', '.join(BENCHMARKS)}")
    data: str | None = Field(
        default=None, description="the benchmark's file; without it the hub's rows, or the shipped file"
    )
    limit: int | None = Field(default=None, description="facts (chains) taken from the benchmark; all by default")
    offset: int = Field(
        default=0, ge=0, description="facts (chains) passed over, such as those a setting was chosen on"
    )
    on_bad_record: Literal["skip", "stop"] | None = Field(
        default=None,
        description="bad records: skip and list them, or stop at the first; default: published files skip, yours stop",
    )
    on_contradiction: Literal["report", "refuse", "keep-first"] = Field(
        default="report",
        description="edits that give one question different new answers: report them, refuse, or keep the first",
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
    dry_run: bool = Field(default=False, description="draw the steps, say what is done, run nothing")
    mmlu: str | None = Field(
        default=None,
        description="measure specificity on MMLU: directory with its test/ and dev/ files, or 'hub'; else it is not",
    )
    mmlu_limit: int | None = Field(default=None, ge=1, description="questions of each subject; all by default")
    lora: LoraConfig = LoraConfig()
    corsa: StepConfig = StepConfig()
    f_learning: FLearningConfig = FLearningConfig()
    memit: MemitConfig = MemitConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: Placement = Placement()

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
        """What is trained: every method with every seed."""
        return [(method, seed) for method in self.methods for seed in self.seeds]

    def checked(self) -> Experiment:
        """Itself, if its names are known and it asks for something.

        Raises:
            CorsaError: an unknown method or benchmark, no method or no seed.
        """
        if self.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", self.benchmark, BENCHMARKS)
        for method in self.methods:
            if method not in METHODS:
                raise unknown_name("method", method, METHODS)
        if any(seed < 0 for seed in self.seeds):
            raise CorsaError(f"--seeds {','.join(map(str, self.seeds))}: a seed is a whole number from 0")
        if not self.methods or not self.seeds:
            raise CorsaError("nothing would be trained: name at least one of --methods and one of --seeds")
        return self


# The steps that scenarios are made of


@dataclass(frozen=True)
class Facts:
    """A benchmark made ready: its `Edit` table, and the reference column, which is computed once for all methods."""

    name: str
    edits: Step
    reference: Step

    @property
    def tables(self) -> dict[str, Step]:
        """Both as inputs of a step."""
        return {"edits": self.edits, "reference": self.reference}


def facts(experiment: Experiment, rounds: int) -> Facts:
    """The experiment's benchmark; of a chain of updates the first `rounds` are kept."""
    limit = experiment.limit
    if limit is not None and limit < 1:
        raise CorsaError(
            f"--limit {limit}: nothing would be edited; give 1 or more, or leave it out to take every fact"
        )
    config = EditsConfig(
        benchmark=experiment.benchmark,
        digest=digest(experiment.benchmark, experiment.data),
        limit=limit,
        offset=experiment.offset,
        rounds=rounds,
        on_bad_record=_on_bad_record(experiment),
        on_contradiction=experiment.on_contradiction,
        whole_cases=experiment.evaluation.protocol == "full" or not BENCHMARKS[experiment.benchmark].repeats,
    )
    name = experiment.benchmark if rounds == 1 else f"{experiment.benchmark}-x{rounds}"
    edits = Step(f"edits/{name}", EDITS, config, placement=EditsPlace(data=_absolute(experiment.data)))
    return with_reference(experiment, name, edits)


def part_of(experiment: Experiment, whole: Facts, part: int, parts: int) -> Facts:
    """One of `parts` parts of a benchmark's edits, relations kept together."""
    name = f"{whole.name}/part{part + 1}of{parts}"
    edits = Step(f"edits/{name}", PART, PartConfig(part=part, parts=parts), {"edits": whole.edits})
    return with_reference(experiment, name, edits)


def with_reference(experiment: Experiment, name: str, edits: Step) -> Facts:
    """Edits as facts made ready, under a name."""
    config = ReferenceConfig(model=pin(experiment.model), on_bad_record=_on_bad_record(experiment))
    reference = Step(f"reference/{name}", REFERENCE, config, {"edits": edits}, experiment.placement)
    return Facts(name, edits, reference)


def _on_bad_record(experiment: Experiment) -> Literal["skip", "stop"]:
    known = BENCHMARKS.get(experiment.benchmark)  # problems of the code domain are not among them
    return experiment.on_bad_record or (known.on_bad_record if known else "stop")


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else None


def dealt(taught: Facts, rounds: RoundsConfig) -> Step:
    """Which round teaches which edit."""
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
    name: str | None = None,
) -> list[Step]:
    """The rounds of one method and seed, each going on from the adapter of the one before; the first from `after`'s.

    `name` stands for the method in the names of the steps, where one method is taught under several settings.
    """
    steps: list[Step] = []
    for number in rounds:
        inputs = {**taught.tables, "schedule": schedule}
        if previous := steps[-1] if steps else after:
            inputs["previous"] = previous
        if method == "memit":
            inputs["statistics"] = _statistics(experiment, taught)
        title = f"{taught.name}/{name or method}/seed{seed}/round{number}"
        steps.append(Step(title, ROUND, _round(experiment, method, seed, number), inputs, experiment.placement))
    return steps


def _round(experiment: Experiment, method: str, seed: int, number: int) -> AskingConfig:
    asking = {"model": pin(experiment.model), "evaluation": experiment.evaluation.asking()}
    if method == "memit":
        if experiment.placement.sharding.zero_stage == 3:
            raise CorsaError(
                "memit reads and solves for the base's own weights, and under --sharding.zero-stage 3 no worker has "
                "them whole: leave memit out of --methods, or use a stage below 3"
            )
        method_alone = experiment.memit.model_copy(update={"corpus": None})  # the statistics stand for it
        return MemitRoundConfig(**asking, seed=seed, round=number, memit=method_alone)
    step = STEPS["lora" if method == "f-learning" else method](experiment.corsa).effective()
    common = RoundConfig(
        **asking, seed=seed, round=number, lora=experiment.lora, step=step, training=experiment.training
    )
    if method == "f-learning":
        return FLearningRoundConfig(**dict(common), f_learning=experiment.f_learning)
    return common


def _statistics(experiment: Experiment, taught: Facts) -> Step:
    corpus = _absolute(experiment.memit.corpus)
    config = StatisticsConfig(
        model=pin(experiment.model), layers=experiment.memit.layers, corpus=_corpus_digest(corpus) if corpus else None
    )
    place = StatisticsPlace(**dict(experiment.placement), corpus=corpus)
    # A named corpus stands for itself: whichever benchmark is taught, its statistics are gathered once.
    name, inputs = (Path(corpus).stem, {}) if corpus else (taught.name, {"edits": taught.edits})
    return Step(f"statistics/{name}", STATISTICS, config, inputs, place)


def _corpus_digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CorsaError(f"--memit.corpus {path} cannot be read: {e.strerror}; give a text file") from e


def base(experiment: Experiment, taught: Facts) -> Step:
    """The answers of the unedited model."""
    config = AskingConfig(model=pin(experiment.model), evaluation=experiment.evaluation.asking())
    return Step(f"{taught.name}/base", ROUND, config, taught.tables, experiment.placement)


def asked(
    experiment: Experiment, name: str, taught: Facts, schedule: Step, adapter: Step, seed: int = 0, round_: int = 1
) -> Step:
    """The answers of an edited model to the probes of facts, as they stand after a round, that another step has taught
    it.
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


def specificity(experiment: Experiment, edited: Mapping[str, Step]) -> list[tuple[Step, str]]:
    """The answers to MMLU of the unedited model and of each edited one, {method: its adapter}; with the methods' names.

    Nothing where the experiment names no MMLU files.
    """
    if experiment.mmlu is None:
        return []
    data = None if experiment.mmlu == "hub" else _absolute(experiment.mmlu)
    read = QuestionsConfig(digest=mmlu.digest(data), limit=experiment.mmlu_limit)
    questions = Step("mmlu", QUESTIONS, read, placement=QuestionsPlace(data=data))
    config = SpecificityConfig(model=pin(experiment.model))
    steps = [(Step("base/mmlu", ROUND, config, {"questions": questions}, experiment.placement), "base")]
    for method, adapter in edited.items():
        inputs = {"questions": questions, "adapter": adapter}
        steps.append((Step(f"{adapter.name}/mmlu", ROUND, config, inputs, experiment.placement), method))
    return steps


def merged(name: str, adapters: Sequence[Step], config: MergeConfig) -> Step:
    """Adapters that were trained apart as one."""
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
    """The sweep of a space (`SweepConfig` names what else it needs) over facts that are taught on a schedule."""
    common = Experiment.model_validate({name: getattr(experiment, name) for name in Experiment.model_fields})
    config = SweepConfig(experiment=identity(common), command=command, rounds=rounds, **plan)
    place = SweepPlace(**dict(experiment.placement), study=study)
    return Step(f"sweep/{taught.name}", SWEEP, config, {**taught.tables, "schedule": schedule}, place)


ROUTERS = ("prompt", "embedding", "oracle")


def identity(experiment: Experiment) -> dict[str, Any]:
    """The resolved configuration without how it is run."""
    how = {"config", "storage", "track", "dry_run", "placement"}
    return {k: v for k, v in experiment.canonical().items() if k not in how}
