"""What an experiment is made of: frozen, typed configuration; unknown keys are refused.

Fields that change a result enter a step's identity (`corsa.flow`); fields that only say how it is run (`Placement`) do
not. This module imports neither torch nor ray: a pipeline is planned from it before either is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tyro.conf import Suppress, arg


class Frozen(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, populate_by_name=True)

    def canonical(self) -> dict[str, Any]:
        """The configuration as plain JSON values, under the names a configuration file uses."""
        return self.model_dump(mode="json", by_alias=True)


def plain(name: str | None = None) -> Any:
    """Marks a field whose option carries no group's name: `--workers`, not `--placement.workers`."""
    return arg(name=name, prefix_name=False)


class ModelConfig(Frozen):
    """A base model and how it is asked. Identity of everything computed with it."""

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


class LoraConfig(Frozen):
    """LoRA: the shape of an adapter, and the linear layers that it adds to. The output head is never among them."""

    rank: int = Field(default=32, ge=1, description="rank of each pair of factors")
    alpha: float = Field(default=64.0, gt=0, description="the product B A is scaled by alpha / rank")
    # An adapter on all layers has the identity it would have without these two fields.
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


class StepConfig(Frozen):
    """The step of Algorithm 1. Plain LoRA and the ablations of Table 9 are settings of it (`STEPS`)."""

    lambda_: Annotated[float, arg(name="lambda")] = Field(
        default=1.0, ge=0, alias="lambda", description="weight of L_DPO in L_Update (Eq. 4); 0 runs no DPO"
    )
    beta: float = Field(default=0.1, gt=0, description="inverse temperature of L_DPO")
    rho: float = Field(
        default=0.05, ge=0, description="radius of the SAM perturbation, norm over all of phi; 0 runs one phase"
    )
    pcgrad: Literal["symmetric", "sequential", "off"] = Field(
        default="symmetric",
        description="symmetric: each gradient against the original other (paper, Sec. 3); "
        "sequential: one after the other, then halved (the authors' trainer); off: plain sum",
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
        exclude_if=lambda every: every == 1,  # an exact step has the identity it would have without these two fields
        description="1: exact. More is LookSAM (Liu et al. 2022), an approximation: the gradient is taken at phi + e "
        "in the first of so many steps, and what that changed is used again in the others",
    )
    reuse: float = Field(
        default=0.7,
        ge=0,
        exclude_if=lambda alpha: alpha == 0.7,
        description="LookSAM's alpha: length of what is used again, in norms of the gradient (exact steps: no effect)",
    )

    @model_validator(mode="after")
    def _meant(self) -> StepConfig:
        if self.perturb_every > 1 and self.scope == "microbatch":
            raise ValueError(
                f"perturb_every {self.perturb_every} uses one perturbation again for whole steps, and scope microbatch "
                "has one for each micro-batch: set scope step, or perturb_every 1"
            )
        return self

    @property
    def dpo(self) -> bool:
        """Whether L_DPO is run."""
        return self.lambda_ > 0

    @property
    def sam(self) -> bool:
        """Whether the gradient is taken at phi + e."""
        return self.rho > 0

    def each(self, adapters: int) -> Sequence[StepConfig]:
        """The settings of each row of phi."""
        return [self] * adapters

    def effective(self) -> StepConfig:
        """The same step with every field that has no effect at its default: equal steps then have equal identities."""
        idle = {"beta", "pcgrad"} if self.lambda_ == 0 else set()
        idle |= {"microbatch"} if self.scope == "step" else set()
        idle |= {"perturb_every"} if self.rho == 0 else set()
        idle |= {"reuse"} if self.rho == 0 or self.perturb_every == 1 else set()
        default = StepConfig()
        return self.model_copy(update={name: getattr(default, name) for name in idle})


class TrainingConfig(Frozen):
    """One round of training. A fresh optimizer and schedule each round."""

    epochs: int = Field(default=10, ge=1, description="passes over the round's edits")
    batch: int = Field(default=16, ge=1, description="edits per optimizer step, over all workers")
    learning_rate: float = Field(default=2e-4, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(default=5, ge=0, description="steps of linear warm-up; linear decay to 0 afterwards")
    clip: float = Field(default=1.0, gt=0, description="the merged gradient is clipped to this norm")
    max_skipped: int = Field(
        default=5, ge=0, description="steps with a non-finite gradient that are skipped before the round stops"
    )


class FLearningConfig(Frozen):
    """F-Learning (Ni et al. 2024): forget the old answers by subtraction, then learn the new ones."""

    alpha: float = Field(
        default=0.1, ge=0, description="how much of what training on the old answers added is subtracted"
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank that the adapter is cut to after each round (SVD; its error is reported); "
        "by default it keeps all and grows by two LoRA ranks a round",
    )


class MemitConfig(Frozen):
    """MEMIT (Meng et al. 2023): a dense change of a few layers in closed form. Defaults: as published for GPT-J."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="edited layers, from 0; by default those published for the architecture"
    )
    weight: float = Field(default=15000.0, gt=0, description="lambda, the weight of the key statistics C in the solve")
    learning_rate: float = Field(default=0.5, gt=0, description="of Adam on the change of the residual")
    gradient_steps: int = Field(default=25, ge=1, description="steps of Adam at most, for every edit")
    weight_decay: float = Field(default=0.5, ge=0, description="of the norm of the change over that of h squared")
    clamp_norm_factor: float = Field(default=0.75, gt=0, description="bound on the norm of the change, in norms of h")
    kl_factor: float = Field(default=0.0625, ge=0, description="weight of the KL term on what is said of the subject")
    prefixes: int = Field(default=5, ge=0, description="texts sampled from the model and set before a question")
    prefix_tokens: int = Field(default=10, ge=1, description="length of such a text, tokens")
    corpus: str | None = Field(
        default=None, description="file of the key statistics: a text a line; by default the benchmark's own probes"
    )


class EvaluationConfig(Frozen):
    """How the edited model is asked."""

    new_tokens: int = Field(
        default=32, ge=1, description="tokens generated per probe, greedily; a newline or the end token stops earlier"
    )
    reasoning_tokens: int = Field(
        default=200, ge=1, description="tokens generated per multi-hop question; only the end token stops earlier"
    )
    match: Literal["contains", "exact"] = Field(
        default="contains", description="rule of the reported numbers (both are stored)"
    )
    protocol: Literal["full", "paper"] = Field(
        default="full", description="full: every probe; paper: the first paraphrase of each edit only"
    )

    def asking(self) -> EvaluationConfig:
        """What the answers depend on: not the rule they are judged by afterwards."""
        return self.model_copy(update={"match": "contains"})


class SamplingConfig(Frozen):
    """How programs are drawn from a model: as CodeUpdateArena's published code does."""

    samples: int = Field(default=5, ge=1, description="programs drawn for each problem")
    temperature: float = Field(default=0.8, gt=0, description="the logits are divided by it")
    top_p: float = Field(default=0.7, gt=0, le=1, description="tokens kept: the likeliest that hold this share")
    new_tokens: int = Field(default=512, ge=1, description="tokens of a program at most")


class ShardingConfig(Frozen):
    """What the workers of a group divide among them instead of holding all of it each (DeepSpeed ZeRO).

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
    force: bool = Field(default=False, description="start also what the plan says cannot fit in memory")
    branch: Annotated[str, Suppress] = Field(
        default="", description="steps of different branches share no worker group: what befalls one spares the others"
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


def _lora(step: StepConfig) -> StepConfig:
    return StepConfig.model_validate({"lambda": 0.0, "rho": 0.0, "pcgrad": "off", "reduction": step.reduction})


def published_trainer(step: StepConfig) -> StepConfig:
    """The step as the authors' trainer takes it; with `--template chat` that is all that differs from the paper."""
    theirs = {"pcgrad": "sequential", "scope": "microbatch", "reduction": "token", "perturb_every": 1}
    return step.model_copy(update=theirs)


STEPS = {
    "lora": _lora,
    "corsa": lambda step: step,
    "corsa-no-sam": lambda step: step.model_copy(update={"rho": 0.0}),
    "corsa-no-dpo": lambda step: step.model_copy(update={"lambda_": 0.0}),
    "corsa-no-pcgrad": lambda step: step.model_copy(update={"pcgrad": "off"}),
    "corsa-published": published_trainer,
}
"""Methods that are settings of the one step: how each follows from the configured CoRSA step (Table 9)."""

METHODS = (*STEPS, "f-learning", "memit")
"""Every method by name. The unedited model, "base", is asked in every scenario."""
