"""What each kind of step depends on, besides its inputs: the configurations that enter a step's identity.

Imports neither torch nor ray: steps are planned from these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from corsa.config import (
    AnswerEnd,
    EvaluationConfig,
    Frozen,
    LoraConfig,
    ModelConfig,
    Placement,
    StepConfig,
    TrainingConfig,
)
from corsa.config.evaluation import ProbeKind, Protocol, RecheckConfig, Rule


class EditsConfig(Frozen):
    """Which edits are read."""

    benchmark: str
    digest: str = Field(description="of the data (`corsa.data.benchmarks.digest`)")
    offset: int = Field(default=0, ge=0, description="facts (chains) to skip")
    limit: int | None = Field(default=None, ge=1, description="facts (chains)")
    rounds: int | None = Field(default=None, ge=1, description="updates kept of a chain")
    on_bad_record: Literal["skip", "stop"]
    on_contradiction: Literal["report", "refuse", "keep-first"]
    whole_cases: bool = Field(description="all edits of a case, or only its first")


class EditsPlace(Frozen):
    """Where the data is read from; what it holds is in `EditsConfig.digest`."""

    data: str | None


class RoundsConfig(Frozen):
    """How facts are assigned to rounds. The split does not follow the training seed: methods and seeds share it."""

    rounds: int = Field(default=3, ge=1, description="rounds of updates")
    first: int = Field(default=1, ge=1, description="number of the first of them; later ones continue another run")
    update_share: float = Field(
        default=0.5, ge=0, le=1, description="share of the chains in the update set, revised from round 2 on"
    )
    fraction: float = Field(default=1.0, ge=0, le=1, description="share of the update set that is revised (Fig. 3)")
    split_seed: int = Field(default=0, ge=0, description="of the split into update and evaluation set")


class PartConfig(Frozen):
    """Which part of a benchmark's edits is taken (routing: one adapter a part)."""

    part: int = Field(ge=0)
    parts: int = Field(ge=2)


class ReferenceConfig(Frozen):
    """What the reference column depends on, besides the edits."""

    model: ModelConfig
    on_bad_record: Literal["skip", "stop"] = Field(
        default="stop", description="an answer without tokens: skip and list it, or stop"
    )
    answer_end: AnswerEnd = Field(
        default="end_token", description="what follows an answer (`TrainingConfig.answer_end`)"
    )


class PredictionConfig(Frozen):
    """What the answers of a model depend on. With an input `adapter` the model is edited, without one it is not.

    With an input `schedule` the facts that hold after `round` are asked, without one all facts of the benchmark.
    """

    model: ModelConfig
    evaluation: EvaluationConfig
    seed: int = Field(default=0, ge=0, description="of the training that the answers follow")
    round: int = Field(default=0, ge=0, description="the round after which it is asked")
    recheck: RecheckConfig | None = Field(
        default=None,
        exclude_if=lambda recheck: recheck is None,
        description="the sample of the facts of earlier rounds that is asked; default: all of them",
    )


class RoundConfig(PredictionConfig):
    """What one round of one method depends on, besides its inputs: the edits, the reference, the schedule and the
    previous adapter. The method's name is not included; its settings are.
    """

    seed: int = Field(ge=0, description="of LoRA's initial values and the order of the edits")
    round: int = Field(ge=1)
    lora: LoraConfig
    step: StepConfig
    training: TrainingConfig

    @property
    def shared(self) -> RoundConfig:
        """What rounds trained together must have in common: all but seed, learning rate, lambda, beta and rho."""
        rate = TrainingConfig().learning_rate
        training = self.training.model_copy(update={"learning_rate": rate})
        return self.model_copy(update={"seed": 0, "training": training, "step": self.step.shared})


class StatisticsConfig(Frozen):
    """What MEMIT's key statistics depend on: the model, its layers and the corpus, and no benchmark."""

    model: ModelConfig
    layers: tuple[int, ...] | None = None
    corpus: str = Field(description="digest of the text file")


class StatisticsPlace(Placement):
    """How the statistics are gathered, and where the corpus is read from; what it holds is in `StatisticsConfig`."""

    corpus: str | None = Field(description="text file; None: the corpus that ships with the project")


class TrialPlace(Placement):
    """How the rounds of a trial of a sweep, or of several in one group, are run, and what they report meanwhile."""

    title: str = Field(description="of the worker group, on the Ray dashboard")
    metric: str | None = Field(default=None, description="scored at the end of epochs; None: never")
    rung: int = Field(default=1, ge=1, description="epochs between scores")
    rounds: int = Field(default=1, ge=1, description="of a trial, for each seed")
    seeds: tuple[int, ...] = (0,)
    rule: Rule = "words"
    better: Literal["high", "low"] = "high"

    @staticmethod
    def named(number: int, label: str) -> str:
        """What replaces the method in the names of a trial's steps."""
        return f"trial{number}-{label}"

    @staticmethod
    def number(name: str) -> str:
        """The number in the study of the trial that a step of this name belongs to."""
        return name.partition("/trial")[2].partition("-")[0]


class SweepConfig(Frozen):
    """What the result of a sweep depends on, besides the edits and the reference."""

    experiment: dict[str, Any] = Field(description="the resolved configuration that the trials change")
    command: str = Field(description="repeats the run")
    space: dict[str, str] = Field(description="name -> values, as `corsa.tuning.space` reads them")
    objectives: tuple[str, ...] = Field(description="metrics of the evaluation; two or more: a Pareto front")
    sampler: Literal["tpe", "random", "grid"]
    seed: int
    trials: int
    rounds: RoundsConfig
    stop: Literal["no", "asha", "median"]
    rung: int | None
    development: int


class SweepPlace(Placement):
    """How a sweep is run."""

    study: str = Field(description="its name in the store")


class QuestionsConfig(Frozen):
    """Which MMLU questions are read."""

    digest: str
    limit: int | None = Field(default=None, ge=1, description="questions of each subject; all by default")


class QuestionsPlace(Frozen):
    """Where the questions are read from; what they hold is in `QuestionsConfig.digest`."""

    data: str | None


class SpecificityConfig(Frozen):
    """What a model's answers to MMLU depend on, besides the questions and the adapter."""

    model: ModelConfig


class SanityQuestionsConfig(Frozen):
    """What a model's answers to the everyday questions depend on, besides the adapter."""

    model: ModelConfig
    digest: str = Field(description="of the questions")
    new_tokens: int = Field(ge=1)


class AnchorsConfig(SanityQuestionsConfig):
    """What the base model's answers to the anchor questions depend on."""


class PerplexityConfig(Frozen):
    """What a model's log-probabilities of the neutral text depend on, besides the adapter."""

    model: ModelConfig
    digest: str = Field(description="of the text")
    passages: int = Field(ge=1, description="passages of the text that are read")


class HarnessConfig(Frozen):
    """What a model's scores on tasks of the evaluation harness depend on, besides the adapter."""

    model: ModelConfig
    tasks: tuple[str, ...]
    limit: int | None = Field(ge=1, description="documents of each task")
    own: dict[str, dict[str, Any]] = Field(
        default={},
        exclude_if=lambda own: not own,
        description="tasks of a file of one's own, by their names in `tasks`",
    )


class LineConfig(Frozen):
    """An adapter from outside the store, and what it was taught."""

    digest: str
    method: str = Field(description="under which its answers are shown; a later update may be made by another")
    seed: int = Field(ge=0)


class LinePlace(Frozen):
    """Where it is read from; what it holds is in `LineConfig.digest`."""

    directory: str


class FactsConfig(Frozen):
    """The facts of an update, old answers included."""

    benchmark: str = Field(description="name of the file, as a report shows it")
    digest: str
    update: int = Field(ge=1)


class AskedFactsConfig(FactsConfig):
    """The same where some old answers are the model's own."""

    model: ModelConfig
    new_tokens: int = Field(ge=1)


class FactsPlace(Placement):
    """How the model is asked, and where the file is read from; what it holds is in `FactsConfig.digest`."""

    data: str


class FewFactsConfig(Frozen):
    """Which facts of an update the trials of `corsa edit --tune` teach; earlier facts stay."""

    facts: int = Field(ge=1, description="facts of the update, taken evenly from the file")
    update: int = Field(ge=1)


class Trial(Frozen):
    """A trial of `corsa edit --tune`: the names of the inputs with its answers, and its settings."""

    round: str
    everyday: str
    setting: dict[str, float]


class ChoiceConfig(Frozen):
    """How a setting is chosen among trials; the first has the settings as given."""

    trials: tuple[Trial, ...]
    everyday: str = Field(description="name of the input with the base model's everyday answers")
    update: int = Field(ge=1)
    rule: Rule


class ServedConfig(Frozen):
    """What the answers of a server depend on. `asked` makes each evaluation a step of its own."""

    address: str
    model: str
    template: Literal["qa", "chat"]
    evaluation: EvaluationConfig
    round: int = Field(ge=0, description="the answers are those after this round; 0: the base model's")
    asked: str = Field(description="time, UTC")


class ServedPlace(Frozen):
    """How a server is asked."""

    concurrency: int = 8
    rate: float | None = None
    retries: int = 5
    token_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0


class TakenBackConfig(Frozen):
    """The edits whose old answers are taught again."""

    benchmark: str = Field(description="as a report shows it")
    edits: tuple[str, ...] = Field(description="ids, chains or questions")
    update: int = Field(ge=1)


class RoutingConfig(PredictionConfig):
    """What routed answers depend on, besides the parts of the data and their adapters."""

    router: Literal["prompt", "embedding", "oracle"] = Field(
        description="oracle: every query goes to the adapter that was taught its fact, the upper bound of any router"
    )


MergeMethod = Literal["linear", "sum", "average", "svd", "ties", "dare_linear", "dare_ties"]


class MergeConfig(Frozen):
    """How adapters become one."""

    method: MergeMethod
    weights: tuple[float, ...] | None = Field(default=None, description="of the adapters; each 1 by default")
    rank: int | None = Field(default=None, ge=1, description="rank of the merged adapter where the method cuts it")
    density: float = Field(default=0.5, gt=0, le=1, description="share of the entries that ties and dare keep")
    seed: int = Field(default=0, ge=0, description="of the entries that dare drops")


class Shown(Frozen):
    """Under which name, and after which round, a report shows the answers of one of its inputs."""

    answers: str = Field(description="name of the input")
    method: str
    trained: int | None = Field(default=None, ge=0, description="by default the round the answers were given after")
    seed: int = Field(default=0, ge=0, description="of the adapter, where the answers themselves do not say it (MMLU)")


class Axis(Frozen):
    """A metric against a setting: what a figure such as Fig. 3 or 5 of the paper draws."""

    name: str = Field(description="of the setting, as the axis is labelled")
    metrics: tuple[str, ...]
    points: dict[str, tuple[str, float]] = Field(description="method as shown -> (line, value of the setting)")
    logarithmic: bool = False


class ReportConfig(Frozen):
    """What a report shows, besides what its inputs hold."""

    title: str
    scenario: str
    command: str = Field(description="repeats the run")
    experiment: dict[str, Any] = Field(description="the resolved configuration")
    rule: Rule
    protocol: Protocol
    kinds: tuple[ProbeKind, ...] | None = Field(
        default=None, description="kinds of probes that were asked; all by default"
    )
    taught_questions: bool = Field(
        default=False, description="forgetting also counts the questions as taught, not only other wordings"
    )
    headlines: tuple[str, ...] = Field(description="metrics of the main table")
    primary: tuple[str, ...] = Field(
        default=(), description="the few metrics that verdicts are given on; all others are exploratory"
    )
    shown: tuple[Shown, ...]
    specificity: tuple[Shown, ...] = ()
    controls: tuple[Shown, ...] = Field(default=(), description="answers to everyday questions: before and after")
    everyday: tuple[Shown, ...] = Field(
        default=(), exclude_if=lambda shown: not shown, description="answers to everyday questions, by method and seed"
    )
    capability: tuple[Shown, ...] = Field(
        default=(), exclude_if=lambda shown: not shown, description="measures of a gate: method `before` and `now`"
    )
    notes: tuple[str, ...] = Field(
        default=(), exclude_if=lambda notes: not notes, description="what else a reader must know"
    )
    axes: tuple[Axis, ...] = ()
    compare_with: str | None = Field(
        default=None, description="every method is compared with this one; by default all pairs are compared"
    )
    published: tuple[str, ...] = Field(default=(), description="tables and figures of the paper to show with it")


class JoinedConfig(Frozen):
    """What a report of several scenarios shows, besides their own reports."""

    title: str
    command: str
    experiment: dict[str, Any]


class ScalingConfig(JoinedConfig):
    """What a report of several sizes of model shows, besides the reports of each."""

    models: dict[str, str] = Field(description="report (name of the input) -> model")
    benchmarks: dict[str, str] = Field(description="report -> benchmark")
    missing: dict[str, str] = Field(default={}, description="report that was not made -> why")
