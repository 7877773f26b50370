"""The settings of methods: LoRA, the step of Algorithm 1, the training of a round, and those with code of their own.

They enter the identity of the rounds that use them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from tyro.conf import arg

from corsa.config.base import Frozen
from corsa.config.training import TrainingConfig

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


Radius = Literal["absolute", "relative", "adaptive"]
"""What rho is a radius of (`corsa.algorithm.sam.perturbation_at`)."""


class StepConfig(Frozen):
    """The step of Algorithm 1. Plain LoRA and the ablations of Table 9 are settings of it (`STEPS`)."""

    weights: ClassVar[tuple[str, ...]] = ("lambda_", "replay", "anchor")
    """The fields that are weights of objectives (`corsa.algorithm.objectives`). Weight 0 runs without the objective."""

    lambda_: Annotated[float, arg(name="lambda")] = Field(
        default=1.0, ge=0, alias="lambda", description="weight of L_DPO in L_Update (Eq. 4); 0 runs no DPO"
    )
    beta: float = Field(default=0.1, gt=0, description="inverse temperature of L_DPO")
    rho: float = Field(
        default=0.05, ge=0, description="radius of the SAM perturbation, as a norm over all of phi; 0: no perturbation"
    )
    # These two fields do not change the identity of SAM's own step.
    radius: Radius = Field(
        default="absolute",
        exclude_if=lambda radius: radius == "absolute",
        description="absolute: rho is the norm of e; relative: rho |phi| is; adaptive: ASAM (Kwon et al. 2021), each "
        "value of phi is perturbed in proportion to its size",
    )
    perturbation: Literal["gradient", "random"] = Field(
        default="gradient",
        exclude_if=lambda perturbation: perturbation == "gradient",
        description="gradient: e follows the gradient at phi (SAM); random: a new random direction in every step, so "
        "one gradient instead of two (as in Flat-LoRA, Li et al. 2024)",
    )
    pcgrad: PCGrad = Field(
        default="symmetric",
        description="symmetric: each gradient against the original other (paper, Sec. 3); algorithm1: Algorithm 1, "
        "line 6, read literally; authors: L_DPO's alone is projected, the sum halved (their trainer); off: plain sum",
    )
    scope: Literal["step", "microbatch"] = Field(
        default="step",
        description="one perturbation for the whole effective batch, or one for every `microbatch` edits of it",
    )
    microbatch: int = Field(
        default=4, ge=1, description="edits per perturbation if scope is microbatch (no effect otherwise)"
    )
    reduction: Literal["token", "sequence"] = Field(
        default="token",
        description="L_SFT as a mean over answer tokens (authors' trainer), or over answers of the sum (paper)",
    )
    eps: float = Field(default=1e-12, gt=0, description="added to the denominator in both divisions by a norm")
    perturb_every: int = Field(
        default=1,
        ge=1,
        exclude_if=lambda every: every == 1,  # these two fields do not change the identity of an exact step
        description="1: exact. N above 1: LookSAM (Liu et al. 2022), an approximation: every N-th step takes the "
        "gradient at phi + e, and the steps between use its change of direction again",
    )
    reuse: float = Field(
        default=0.7,
        ge=0,
        exclude_if=lambda alpha: alpha == 0.7,
        description="LookSAM's alpha: length of the reused change, in norms of the gradient (exact steps: no effect)",
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
        if self.perturbation == "random" and (self.scope == "microbatch" or self.perturb_every > 1):
            raise ValueError("perturbation random costs one gradient a step: set scope step and perturb_every 1")
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

    @property
    def passes(self) -> int:
        """How many gradients a step computes."""
        return 2 if self.sam and self.perturbation == "gradient" else 1

    def effective(self) -> StepConfig:
        """The same step, with fields without effect at their defaults: equal steps then have equal identities."""
        idle = {"beta"} if self.lambda_ == 0 else set()
        idle |= {"pcgrad"} if self.objectives == 1 else set()
        idle |= {"microbatch"} if self.scope == "step" else set()
        idle |= {"perturb_every", "radius", "perturbation"} if self.rho == 0 else set()
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
        description="factor of the subtracted change (that of training on the old answers); 0.1 is this project's "
        "choice and not a default of the authors (pipelines/sensitivity.py sweeps it)",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank that the adapter is cut to after each round (SVD; its error is reported); "
        "default: not cut, the rank grows by two LoRA ranks a round",
    )


class LocateThenEditConfig(Frozen):
    """What the methods that change a few layers in closed form share: where they edit, and the search for the targets.

    Fields that are None come from a table of published settings, by architecture (`corsa.methods.memit.settings`,
    `corsa.methods.alphaedit.settings`).
    """

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="edited layers, from 0; default: those published for the architecture"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="learning rate of Adam on the change of the residual; default: as published"
    )
    gradient_steps: int | None = Field(
        default=None, ge=1, description="maximum steps of Adam for each edit; default: as published"
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="weight of the norm of the change over the squared norm of h; default: as published",
    )
    clamp_norm_factor: float | None = Field(
        default=None, gt=0, description="bound on the norm of the change, in norms of h; default: as published"
    )
    kl_factor: float | None = Field(
        default=None,
        ge=0,
        description="weight of the KL term, which preserves what is said about the subject; default: as published",
    )
    prefixes: int = Field(
        default=5, ge=0, description="number of texts sampled from the model and put before a question"
    )
    prefix_tokens: int = Field(default=10, ge=1, description="tokens of such a text")
    corpus: str | None = Field(
        default=None,
        description="file for the key statistics, one text a line; default: the neutral corpus of this project",
    )


class MemitConfig(LocateThenEditConfig):
    """MEMIT (Meng et al. 2023): a dense change of a few layers in closed form."""

    weight: float | None = Field(
        default=None,
        gt=0,
        description="lambda, the weight of the key statistics C in the solve; default: the published one, scaled to "
        "the inputs of the model's down projections",
    )


class AlphaEditConfig(LocateThenEditConfig):
    """AlphaEdit (Fang et al. 2025): MEMIT's change, projected on the null space of the preserved keys."""

    threshold: float | None = Field(
        default=None,
        gt=0,
        description="eigenvectors of the key statistics C with eigenvalues below this span the null space; default: as "
        "published",
    )
    l2: float | None = Field(
        default=None, gt=0, description="weight of the squared norm of the change in the solve; default: as published"
    )


class LocFtConfig(Frozen):
    """LocFT-BF (Yang et al. 2025): fine-tuning of one down projection. Epochs, batch and schedule are `training`'s."""

    layer: int | None = Field(
        default=None, ge=0, description="trained layer, from 0; default: the published one, scaled to the model's depth"
    )
    learning_rate: float = Field(
        default=5e-4, gt=0, description="peak learning rate; the default is the published one (constant there)"
    )


class InContextConfig(Frozen):
    """Retrieval: the taught facts that are nearest to a question stand before it."""

    facts: int = Field(default=4, ge=1, description="facts put before a question")


class MethodSettings(Frozen):
    """The settings of every method."""

    lora: LoraConfig = LoraConfig()
    corsa: StepConfig = StepConfig()
    f_learning: FLearningConfig = FLearningConfig()
    memit: MemitConfig = MemitConfig()
    alphaedit: AlphaEditConfig = Field(default=AlphaEditConfig(), exclude_if=lambda config: config == AlphaEditConfig())
    locft: LocFtConfig = Field(default=LocFtConfig(), exclude_if=lambda config: config == LocFtConfig())
    in_context: InContextConfig = Field(
        default=InContextConfig(), exclude_if=lambda config: config == InContextConfig()
    )
    training: TrainingConfig = TrainingConfig()


def _lora(step: StepConfig) -> StepConfig:
    kept = {"reduction": step.reduction, "replay": step.replay, "anchor": step.anchor}
    return StepConfig.model_validate({"lambda": 0.0, "rho": 0.0, "pcgrad": "off"} | kept)


def published_trainer(step: StepConfig) -> StepConfig:
    """The step of the authors' trainer; `published_training` has its other differences."""
    theirs = {"pcgrad": "authors", "scope": "microbatch", "reduction": "token", "perturb_every": 1}
    theirs |= {"radius": "absolute", "perturbation": "gradient"}
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
    "replay-ridge": _lora,
}
"""Methods that are settings of the one step: each is made from the configured CoRSA step (Table 9)."""
