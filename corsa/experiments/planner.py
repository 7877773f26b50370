"""Makes the steps of a scenario.

A scenario (a file under `pipelines/`) is a function from a `Planner` to the step of its report;
`corsa.experiments.runner` runs the steps. Nothing here imports torch or ray: planning a scenario needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from corsa.config import AnswerEnd, EvaluationConfig, ModelConfig
from corsa.config.evaluation import RecheckConfig
from corsa.config.model import NF4_IS_NOT_SHARDED
from corsa.config.steps import (
    AnchorsConfig,
    EditsConfig,
    EditsPlace,
    MergeConfig,
    PartConfig,
    PredictionConfig,
    QuestionsConfig,
    QuestionsPlace,
    ReferenceConfig,
    RoundConfig,
    RoundsConfig,
    RoutingConfig,
    SanityQuestionsConfig,
    SpecificityConfig,
)
from corsa.data.benchmarks import BENCHMARKS, contradiction_rule, locate
from corsa.errors import CorsaError, unknown_name
from corsa.evaluation import anchor_questions, mmlu, sanity_questions
from corsa.experiments.base import Experiment
from corsa.experiments.kinds import EDITS, MERGE, PART, QUESTIONS, REFERENCE, ROUND, SCHEDULE
from corsa.flow import Step
from corsa.methods import METHODS
from corsa.models.registry import pin

E = TypeVar("E", bound=Experiment)
E_co = TypeVar("E_co", bound=Experiment, covariant=True)

ANCHOR_TOKENS = 32
"""Most tokens of an answer to an anchor question."""

ROUTERS = ("prompt", "embedding", "oracle")


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


@dataclass(frozen=True)
class Planner(Generic[E_co]):
    """Makes the steps of one experiment.

    Attributes:
        experiment: the configuration as given. Reports show it.
        model: its model with the revision filled in. Every step depends on this value, so the files of a model are
            hashed once.
        command: the command that repeats the run. Reports show it.
        recheck: the sample of the facts of earlier rounds that is asked after a round; None: all are asked.
    """

    experiment: E_co
    model: ModelConfig
    command: str
    recheck: RecheckConfig | None = None

    @staticmethod
    def of(experiment: E, command: str) -> Planner[E]:
        """The planner of an experiment.

        Raises:
            CorsaError: the experiment's model is unknown, or cannot be loaded where the steps run.
        """
        _refuse_what_cannot_be_loaded(experiment)
        return Planner(experiment, pin(experiment.model), command)

    def changed(self, **settings: Any) -> Planner[E_co]:
        """The same with other settings. The model stays: see `with_model`."""
        assert "model" not in settings
        return replace(self, experiment=self.experiment.model_copy(update=settings))

    def of_kind(self, kind: type[E], **settings: Any) -> Planner[E]:
        """The planner of another kind of experiment, with the common settings of this one. The model stays."""
        assert "model" not in settings
        common = {name: getattr(self.experiment, name) for name in Experiment.model_fields}
        return Planner(kind.model_validate(common | settings), self.model, self.command)

    def with_model(self, model: ModelConfig) -> Planner[E_co]:
        """The same with another model."""
        return Planner(self.experiment.model_copy(update={"model": model}), pin(model), self.command)

    # Data

    def facts(self, rounds: int = 1, split: str = "") -> Facts:
        """The experiment's benchmark, with the first `rounds` updates of each chain. `split` distinguishes its steps
        from those of other facts of the benchmark.
        """
        experiment = self.experiment
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
            on_bad_record=self._on_bad_record,
            on_contradiction=experiment.on_contradiction or contradiction_rule(experiment.benchmark),
            whole_cases=experiment.evaluation.protocol == "full" or not BENCHMARKS[experiment.benchmark].repeats,
        )
        name = experiment.benchmark + f"-x{rounds}" * (rounds > 1) + f"-{split}" * bool(split)
        place = str(source.path.absolute()) if experiment.data and source.path else None  # for a pipe: its stored copy
        return self.with_reference(name, Step(f"edits/{name}", EDITS, config, placement=EditsPlace(data=place)))

    def part_of(self, whole: Facts, part: int, parts: int) -> Facts:
        """One of `parts` parts of a benchmark's edits. Edits of one relation stay together."""
        name = f"{whole.name}/part{part + 1}of{parts}"
        edits = Step(f"edits/{name}", PART, PartConfig(part=part, parts=parts), {"edits": whole.edits})
        return self.with_reference(name, edits)

    def with_reference(self, name: str, edits: Step) -> Facts:
        """Named edits together with their reference column."""
        config = ReferenceConfig(
            model=self.model,
            on_bad_record=self._on_bad_record,
            answer_end=self.experiment.training.effective(self.model.template).answer_end,
        )
        reference = Step(f"reference/{name}", REFERENCE, config, {"edits": edits}, self.experiment.placement)
        return Facts(name, edits, reference)

    @property
    def _on_bad_record(self) -> Literal["skip", "stop"]:
        known = BENCHMARKS.get(self.experiment.benchmark)  # does not contain the code domain's problems
        return self.experiment.on_bad_record or (known.on_bad_record if known else "stop")

    def schedule(self, taught: Facts, rounds: RoundsConfig | None = None) -> Step:
        """The step that assigns edits to rounds; all to one round by default."""
        rounds = rounds or RoundsConfig(rounds=1)
        other = f"/from{rounds.first}" * (rounds.first > 1) + f"/revised{rounds.fraction:g}" * (rounds.fraction < 1)
        return Step(f"schedule/{taught.name}{other}", SCHEDULE, rounds, {"edits": taught.edits})

    # Training

    def round(
        self,
        method: str,
        seed: int,
        taught: Facts,
        schedule: Step,
        *,
        number: int = 1,
        after: Step | None = None,
        known: tuple[Facts, Step] | None = None,
        name: str | None = None,
    ) -> Step:
        """One round of a method and seed. It continues from the adapter of `after`, or starts a new one.

        `known`: other facts that `after` was taught, with their schedule; a round that looks back depends on them.
        `name` replaces the method in the name of the step, if one method is trained with several settings.
        """
        record = METHODS[method]
        if self.model.dtype == "nf4" and (why := record.refuses.get("4 bits")):
            raise CorsaError(f"{method} cannot edit a base in 4 bits: {why}; give --dtype bfloat16")
        if self.experiment.placement.engine == "vllm" and (why := record.refuses.get("adapter")):
            raise CorsaError(
                f"--placement.engine vllm answers with adapters, and {why}: leave {method} or the engine out"
            )
        settings = self.experiment.model_copy(update={"model": self.model})
        config = record.round_config(settings, seed, number)
        if self.recheck:
            config = config.model_copy(update={"recheck": self.recheck})
        own = taught.ending(config.training.answer_end) if isinstance(config, RoundConfig) else taught
        inputs = {**own.tables, "schedule": schedule} | ({"previous": after} if after and record.continues else {})
        if known and record.looks_back(config):
            before, when = known
            ending = config.training.answer_end if isinstance(config, RoundConfig) else "end_token"
            inputs |= {"known_reference": before.ending(ending).reference, "known_schedule": when}
        if isinstance(config, RoundConfig) and (
            config.training.anchor or (config.training.ridge and "previous" not in inputs)  # a line keeps its A
        ):
            inputs["anchors"] = self.anchors()
        title = f"{taught.name}/{name or method}/seed{seed}/round{number}"
        return Step(title, ROUND, config, inputs | record.inputs(settings), self.experiment.placement)

    def chain(
        self,
        method: str,
        seed: int,
        taught: Facts,
        schedule: Step,
        *,
        rounds: Sequence[int],
        after: Step | None = None,
        name: str | None = None,
    ) -> list[Step]:
        """Several rounds of one method and seed. Each continues from the one before; the first from `after`."""
        steps: list[Step] = []
        for number in rounds:
            after = self.round(method, seed, taught, schedule, number=number, after=after, name=name)
            steps.append(after)
        return steps

    def merged(self, name: str, adapters: Sequence[Step], config: MergeConfig) -> Step:
        """Merges separately trained adapters into one."""
        return Step(name, MERGE, config, {f"adapter{i}": step for i, step in enumerate(adapters, start=1)})

    # Answers

    def anchors(self) -> Step:
        """The unedited model's answers to the anchor questions (`training.anchor`). All runs of a model share them."""
        config = AnchorsConfig(model=self.model, digest=anchor_questions.digest(), new_tokens=ANCHOR_TOKENS)
        return Step("base/anchors", ROUND, config, placement=self.experiment.placement)

    def base(self, taught: Facts, beside: Step | None = None) -> Step:
        """The answers of the unedited model. If a sample of earlier facts is asked (`recheck`), they are those of the
        facts that the step `beside` asks an edited model.
        """
        config = PredictionConfig(model=self.model, evaluation=self._evaluation)
        inputs = taught.tables
        if self.recheck and beside:
            assert isinstance(beside.config, PredictionConfig)
            config = config.model_copy(update={"round": beside.config.round, "recheck": self.recheck})
            inputs = {**inputs, "schedule": beside.inputs["schedule"]}
        return Step(f"{taught.name}/base", ROUND, config, inputs, self.experiment.placement)

    def answers(self, name: str, taught: Facts, schedule: Step, adapter: Step, seed: int = 0, round_: int = 1) -> Step:
        """The answers of an edited model to the probes of facts, as valid after a round. `adapter` is the step that
        trained the model.
        """
        known = {"seed": seed, "round": round_, "recheck": self.recheck}
        config = PredictionConfig(model=self.model, evaluation=self._evaluation, **known)
        inputs = {**taught.tables, "schedule": schedule, "adapter": adapter}
        return Step(f"{name}/asked/{taught.name}", ROUND, config, inputs, self.experiment.placement)

    def routed(
        self,
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
        if why := METHODS[method].refuses.get("routing"):
            raise CorsaError(f"{method} cannot be routed: {why}; leave it out of --methods")
        known = {"model": self.model, "evaluation": self._evaluation, "seed": seed, "round": 1, "router": router}
        inputs = {**taught.tables, "schedule": schedule}
        for number, (part, adapter) in enumerate(zip(parts, adapters, strict=True), start=1):
            inputs |= {f"edits{number}": part.edits, f"adapter{number}": adapter}
        title = f"{taught.name}/{method}-by-{router}/seed{seed}"
        return Step(title, ROUND, RoutingConfig.model_validate(known), inputs, self.experiment.placement)

    def specificity(self, edited: Mapping[tuple[str, int], Step]) -> list[tuple[Step, str, int]]:
        """The MMLU answers, and the answers to everyday questions, of the unedited model and of each edited one,
        {(method, seed): its adapter}; each with its method and seed.

        Without what the experiment does not ask for, and without methods that cannot answer it.
        """
        experiment = self.experiment
        asked = {key: adapter for key, adapter in edited.items() if "specificity" not in METHODS[key[0]].refuses}
        models: list[tuple[str, int, Step | None]] = [("base", 0, None), *((*key, step) for key, step in asked.items())]
        steps = []
        if experiment.mmlu is not None:
            data = None if experiment.mmlu == "hub" else absolute(experiment.mmlu)
            read = QuestionsConfig(digest=mmlu.digest(data), limit=experiment.mmlu_limit)
            questions = Step("mmlu", QUESTIONS, read, placement=QuestionsPlace(data=data))
            config = SpecificityConfig(model=self.model)
            for method, seed, adapter in models:
                inputs = {"questions": questions} | ({"adapter": adapter} if adapter else {})
                name = f"{adapter.name if adapter else 'base'}/mmlu"
                steps.append((Step(name, ROUND, config, inputs, experiment.placement), method, seed))
        if experiment.everyday:
            steps += [(self.everyday_answers(adapter), method, seed) for method, seed, adapter in models]
        return steps

    def everyday_answers(self, adapter: Step | None) -> Step:
        """The answers to the everyday questions of the base model, or of the one that the step `adapter` trained."""
        tokens = self.experiment.evaluation.new_tokens
        config = SanityQuestionsConfig(model=self.model, digest=sanity_questions.digest(), new_tokens=tokens)
        name = f"{adapter.name}/controls" if adapter else "base/controls"
        return Step(name, ROUND, config, {"adapter": adapter} if adapter else {}, self.experiment.placement)

    @property
    def _evaluation(self) -> EvaluationConfig:
        return self.experiment.evaluation.for_predictions()


def _refuse_what_cannot_be_loaded(experiment: Experiment) -> None:
    placement = experiment.placement
    if experiment.model.dtype == "nf4" and not placement.gpu:
        raise CorsaError("--dtype nf4 holds the base in 4 bits on a GPU: add --placement.gpu, or give --dtype bfloat16")
    if experiment.model.dtype == "nf4" and placement.sharding.zero_stage == 3:
        raise CorsaError(NF4_IS_NOT_SHARDED)
    if placement.engine == "vllm" and experiment.model.dtype == "nf4":
        raise CorsaError("--placement.engine vllm does not hold a base in 4 bits: leave it or --dtype nf4 out")
    if placement.engine == "vllm" and experiment.model.name.startswith("random:"):
        raise CorsaError("--placement.engine vllm loads a base from its files, and random weights have none")


def absolute(path: str | None) -> str | None:
    """The absolute path: workers run in directories of their own."""
    return str(Path(path).expanduser().absolute()) if path else None
