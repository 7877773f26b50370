"""The configuration of experiments: frozen and typed; unknown keys are refused.

Fields that change a result enter a step's identity (`corsa.flow`); fields that only say how it is run (`Placement`) do
not. This module imports neither torch nor ray: a pipeline is planned from it before either is needed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from tyro.conf import Suppress, arg

from corsa.config.amounts import as_bytes
from corsa.config.base import Frozen, plain
from corsa.config.evaluation import EvaluationConfig as EvaluationConfig
from corsa.config.training import ALONE as ALONE
from corsa.config.training import TRAININGS as TRAININGS
from corsa.config.training import AnswerEnd as AnswerEnd
from corsa.config.training import TrainingConfig as TrainingConfig
from corsa.errors import CorsaError


class ModelConfig(Frozen):
    """A base model and its prompt template. Part of the identity of everything computed with it."""

    name: Annotated[str, plain("model")] = Field(
        default="smollm2-135m",
        description="alias, Hugging Face id, local directory, or random:<architecture or directory>",
    )
    revision: Annotated[str | None, plain()] = Field(
        default=None, description="hub revision; for a local directory, filled with a digest of its files"
    )
    dtype: Annotated[Literal["float32", "bfloat16"], plain()] = Field(
        default="float32", description="of the frozen base; LoRA is float32 always"
    )
    template: Annotated[Literal["qa", "chat"], plain()] = Field(
        default="qa", description="qa: 'Q: ...' and 'A:' (paper, Fig. 7); chat: the tokenizer's chat template"
    )


SEEDS = 2**31 - 1
"""The largest seed: the tables of answers hold it in 32 bits."""


class LoraConfig(Frozen):
    """LoRA: the shape of an adapter, and the linear layers that it adds to. The output head is never among them."""

    rank: int = Field(default=32, ge=1, le=16384, description="rank of each pair of factors")
    alpha: float = Field(default=64.0, gt=0, description="the product B A is scaled by alpha / rank")
    # These two fields do not change the identity of an adapter on all layers.
    targets: tuple[str, ...] = Field(
        default=("all-linear",),
        min_length=1,
        exclude_if=lambda targets: targets == ("all-linear",),
        description="linear layers by the end of their names, as PEFT's target_modules: q_proj v_proj; or all-linear",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda layers: layers is None,
        description="decoder layers, from 0, as PEFT's layers_to_transform; default: all",
    )


PCGrad = Literal["symmetric", "algorithm1", "authors", "off"]
"""How the gradients of the objectives become one (`corsa.algorithm.pcgrad.merge`)."""


class StepConfig(Frozen):
    """The step of Algorithm 1. Plain LoRA and the ablations of Table 9 are settings of it (`STEPS`)."""

    weights: ClassVar[tuple[str, ...]] = ("lambda_", "replay", "anchor")
    """The fields that are weights of objectives (`corsa.algorithm.objectives`). Weight 0 runs without the objective."""

    lambda_: Annotated[float, arg(name="lambda")] = Field(
        default=1.0, ge=0, alias="lambda", description="weight of L_DPO in L_Update (Eq. 4); 0 runs no DPO"
    )
    beta: float = Field(default=0.1, gt=0, description="inverse temperature of L_DPO")
    rho: float = Field(
        default=0.05, ge=0, description="radius of the SAM perturbation, norm over all of phi; 0 runs one phase"
    )
    pcgrad: PCGrad = Field(
        default="symmetric",
        description="symmetric: each gradient against the original other (paper, Sec. 3); algorithm1: Algorithm 1, "
        "line 6, read literally; authors: L_DPO's alone is projected, the sum halved (their trainer); off: plain sum",
    )
    scope: Literal["step", "microbatch"] = Field(
        default="step",
        description="what one perturbation is made from: the whole effective batch, or each `microbatch` edits of it",
    )
    microbatch: int = Field(
        default=4, ge=1, description="edits per perturbation where scope is microbatch (no effect otherwise)"
    )
    reduction: Literal["token", "sequence"] = Field(
        default="token",
        description="L_SFT as a mean over answer tokens (authors' trainer), or over answers of the sum (paper)",
    )
    eps: float = Field(default=1e-12, gt=0, description="guard of the two divisions by a norm")
    perturb_every: int = Field(
        default=1,
        ge=1,
        exclude_if=lambda every: every == 1,  # these two fields do not change the identity of an exact step
        description="1: exact. More is LookSAM (Liu et al. 2022), an approximation: the gradient is taken at phi + e "
        "in the first of so many steps, and what that changed is used again in the others",
    )
    reuse: float = Field(
        default=0.7,
        ge=0,
        exclude_if=lambda alpha: alpha == 0.7,
        description="LookSAM's alpha: length of what is used again, in norms of the gradient (exact steps: no effect)",
    )

    replay: float = Field(
        default=0.0,
        ge=0,
        exclude_if=lambda weight: weight == 0,
        description="weight of L_SFT on the facts of earlier rounds (`training.replay`) as an objective of its own, "
        "reconciled with the others; 0: they are edits like the round's own",
    )
    anchor: float = Field(
        default=0.0,
        ge=0,
        exclude_if=lambda weight: weight == 0,
        description="the same for everyday questions (`training.anchor`)",
    )

    @field_validator("pcgrad", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if value == "sequential":
            raise ValueError(
                "'sequential' was none of the published forms and is gone: set 'authors' for the authors' trainer, "
                "or 'algorithm1' for Algorithm 1 read literally"
            )
        return value

    @model_validator(mode="after")
    def _meant(self) -> StepConfig:
        if self.perturb_every > 1 and self.scope == "microbatch":
            raise ValueError(
                f"perturb_every {self.perturb_every} uses one perturbation again for whole steps, and scope microbatch "
                "has one for each micro-batch: set scope step, or perturb_every 1"
            )
        self.refuse_pcgrad(self.objectives)
        return self

    def refuse_pcgrad(self, objectives: int) -> None:
        """Raise `ValueError` if `pcgrad` cannot reconcile so many objectives."""
        if self.pcgrad in ("algorithm1", "authors") and objectives > 2:
            raise ValueError(f"pcgrad {self.pcgrad} is for two objectives, not {objectives}: set symmetric")

    @classmethod
    def per_row(cls) -> tuple[str, ...]:
        """The fields in which adapters trained together may differ."""
        return (*cls.weights, "beta", "rho")

    @property
    def objectives(self) -> int:
        """How many objectives the step runs: L_SFT, and those with a weight above 0."""
        return 1 + sum(getattr(self, weight) > 0 for weight in self.weights)

    @property
    def sam(self) -> bool:
        """Whether the gradient is taken at phi + e."""
        return self.rho > 0

    def effective(self) -> StepConfig:
        """The same step, with fields without effect at their defaults: equal steps then have equal identities."""
        idle = {"beta"} if self.lambda_ == 0 else set()
        idle |= {"pcgrad"} if self.objectives == 1 else set()
        idle |= {"microbatch"} if self.scope == "step" else set()
        idle |= {"perturb_every"} if self.rho == 0 else set()
        idle |= {"reuse"} if self.rho == 0 or self.perturb_every == 1 else set()
        return self.model_copy(update={name: getattr(type(self)(), name) for name in idle})

    @property
    def shared(self) -> StepConfig:
        """What the steps of adapters trained together must have in common: all but `per_row`.

        Fields without effect are at their defaults: a step with one objective has the default `pcgrad`, and so shares a
        pack only with steps that have it too.
        """
        return self.effective().model_copy(update={name: getattr(type(self)(), name) for name in self.per_row()})


class FLearningConfig(Frozen):
    """F-Learning (Ni et al. 2024): forget the old answers by subtraction, then learn the new ones."""

    alpha: float = Field(
        default=0.1,
        ge=0,
        description="how much of what training on the old answers added is subtracted; 0.1 is this project's choice "
        "and no default of its authors (pipelines/sensitivity.py sweeps it)",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank that the adapter is cut to after each round (SVD; its error is reported); "
        "by default it keeps all and grows by two LoRA ranks a round",
    )


class MemitConfig(Frozen):
    """MEMIT (Meng et al. 2023): a dense change of a few layers in closed form.

    Fields that are None come from the table of published settings, by architecture and size
    (`corsa.methods.memit.settings`).
    """

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="edited layers, from 0; by default those published for the architecture"
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="lambda, the weight of the key statistics C in the solve; by default the published one, scaled to "
        "the inputs of the model's down projections",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="of Adam on the change of the residual; by default as published"
    )
    gradient_steps: int | None = Field(
        default=None, ge=1, description="steps of Adam at most, for every edit; by default as published"
    )
    weight_decay: float | None = Field(
        default=None, ge=0, description="of the norm of the change over that of h squared; by default as published"
    )
    clamp_norm_factor: float | None = Field(
        default=None, gt=0, description="bound on the norm of the change, in norms of h; by default as published"
    )
    kl_factor: float | None = Field(
        default=None, ge=0, description="weight of the KL term on what is said of the subject; by default as published"
    )
    prefixes: int = Field(default=5, ge=0, description="texts sampled from the model and set before a question")
    prefix_tokens: int = Field(default=10, ge=1, description="length of such a text, tokens")
    corpus: str | None = Field(
        default=None,
        description="file for the key statistics, a text a line; by default a neutral corpus that is shipped",
    )


class SamplingConfig(Frozen):
    """How programs are drawn from a model: as CodeUpdateArena's published code does."""

    samples: int = Field(default=5, ge=1, description="programs drawn for each problem")
    temperature: float = Field(default=0.8, gt=0, description="the logits are divided by it")
    top_p: float = Field(default=0.7, gt=0, le=1, description="tokens kept: the likeliest that hold this share")
    new_tokens: int = Field(default=512, ge=1, description="tokens of a program at most")


class ShardingConfig(Frozen):
    """What the workers of a group shard, instead of each holding all of it (DeepSpeed ZeRO).

    The base is frozen: stage 1 shards AdamW's state of phi, the LoRA parameters; 2 also its merged gradient; 3 also
    the base. The result is the same. docs/sharding.md has the table.
    """

    zero_stage: int = Field(
        default=0, ge=0, le=3, description="0: nothing; 1: AdamW's state of phi; 2: and its gradient; 3: and the base"
    )
    offload_parameters: bool = Field(
        default=False, description="keep a worker's shard of the base in CPU memory (stage 3 only)"
    )
    offload_optimizer: bool = Field(
        default=False, description="keep a worker's shard of AdamW's state in CPU memory, and update there (stages 1-3)"
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep each layer's inputs alone, and compute the rest again going back (any stage)"
    )

    @model_validator(mode="after")
    def _meant(self) -> ShardingConfig:
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(
                f"offload_parameters moves a worker's shard of the base, and stage {self.zero_stage} does not shard "
                "that: set zero_stage 3, or leave offload_parameters out"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer moves a worker's shard of AdamW's state, and stage 0 does not shard it: "
                "set zero_stage 1, 2 or 3, or leave offload_optimizer out"
            )
        return self


class Placement(Frozen):
    """How steps are run. Never part of a step's identity: it changes the time a result takes, not the result."""

    workers: Annotated[int, plain()] = Field(default=1, ge=1, description="training workers of one group")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per worker; default: the node's cores shared out"
    )
    gpu: bool = Field(default=False, description="one GPU per worker")
    cpus: float | None = Field(
        default=None, gt=0, description="CPUs reserved per worker; default: what leaves room for the data stream"
    )
    micro_batch: int = Field(
        default=16, ge=1, description="edits per forward pass on one worker, of each adapter trained together"
    )
    gpu_memory: str | None = Field(
        default=None, description="of each GPU, such as 48GiB: a run that it cannot hold is refused; default: as found"
    )

    @field_validator("gpu_memory")
    @classmethod
    def _an_amount(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                as_bytes(value, "")
            except CorsaError as error:
                raise ValueError(str(error).strip()) from error
        return value

    force: bool = Field(default=False, description="start also what the plan says cannot fit in memory")
    branch: Annotated[str, Suppress] = Field(
        default="",
        description="steps of different branches share no worker group: a failure in one does not affect the others",
    )
    probe_batch: int = Field(default=128, ge=1, description="probes generated together on one worker")
    pack: Annotated[int, plain()] = Field(
        default=1,
        ge=1,
        description="rounds that differ only in lambda, beta, rho, learning rate and seed trained together by one "
        "worker group, this many at once (one at a time where the base or AdamW is sharded)",
    )
    checkpoint_every: int = Field(default=20, ge=1, description="steps between checkpoints inside a round")
    max_failures: int = Field(default=3, ge=0, description="worker-group restarts before a run gives up")
    autoscale: bool = Field(
        default=False, description="the cluster starts nodes on demand: wait for what it cannot hold yet"
    )
    start_timeout: float = Field(
        default=1800.0,
        gt=0,
        description="seconds in all to wait for room for the workers, at the start and after losses",
    )
    heartbeat_timeout: float = Field(default=30.0, gt=0, description="seconds after which a silent worker is replaced")
    sharding: Annotated[ShardingConfig, plain("sharding")] = ShardingConfig()


class MethodSettings(Frozen):
    """The settings of every method."""

    lora: LoraConfig = LoraConfig()
    corsa: StepConfig = StepConfig()
    f_learning: FLearningConfig = FLearningConfig()
    memit: MemitConfig = MemitConfig()
    training: TrainingConfig = TrainingConfig()


class RunSettings(MethodSettings):
    """All that a round of any method can depend on, and how it is run."""

    model: ModelConfig = ModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: Placement = Placement()


def _lora(step: StepConfig) -> StepConfig:
    kept = {"reduction": step.reduction, "replay": step.replay, "anchor": step.anchor}
    return StepConfig.model_validate({"lambda": 0.0, "rho": 0.0, "pcgrad": "off"} | kept)


def published_trainer(step: StepConfig) -> StepConfig:
    """The step of the authors' trainer; `published_training` has its other differences."""
    theirs = {"pcgrad": "authors", "scope": "microbatch", "reduction": "token", "perturb_every": 1}
    return step.model_copy(update=theirs)


STEPS = {
    "lora": _lora,
    "corsa": lambda step: step,
    "corsa-no-sam": lambda step: step.model_copy(update={"rho": 0.0}),
    "corsa-no-dpo": lambda step: step.model_copy(update={"lambda_": 0.0}),
    "corsa-no-pcgrad": lambda step: step.model_copy(update={"pcgrad": "off"}),
    "corsa-published": published_trainer,
    "replay": _lora,
    "corsa-replay": lambda step: step,
    "replay-pcgrad": lambda step: _lora(step).model_copy(update={"pcgrad": "symmetric", "replay": step.replay or 1.0}),
}
"""Methods that are settings of the one step: each is made from the configured CoRSA step (Table 9)."""
