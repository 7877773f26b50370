"""How one round is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from corsa.config.base import Frozen
from corsa.errors import CorsaError

AnswerEnd = Literal["end_token", "turn"]
"""What follows a taught answer (`corsa.models.encoding.Encoder`)."""


class TrainingConfig(Frozen):
    """One round of training. A fresh optimizer and schedule each round."""

    epochs: int = Field(default=10, ge=1, le=1_000_000, description="passes over the round's edits")
    batch: int = Field(default=16, ge=1, le=1_000_000, description="edits per optimizer step, over all workers")
    learning_rate: float = Field(default=2e-4, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(default=5, ge=0, description="steps of linear warm-up; linear decay to 0 afterwards")
    first_rate: Literal["above_zero", "zero"] = Field(
        default="above_zero",
        description="above_zero: the first step of the warm-up learns; zero: its rate is 0, as transformers' linear "
        "schedule has it (the authors' trainer)",
    )
    answer_end: AnswerEnd = Field(
        default="end_token",
        description="what follows a taught answer: the end token; or, in the chat template, what closes the turn there "
        "and then the end token (the authors' trainer; no effect in the template qa)",
    )
    clip: float = Field(default=1.0, gt=0, description="the merged gradient is clipped to this norm")
    max_skipped: int = Field(
        default=5, ge=0, description="steps with a non-finite gradient that are skipped before the round stops"
    )
    stop_above: float | None = Field(
        default=None,
        ge=0.5,
        lt=1,
        exclude_if=lambda bound: bound is None,
        description="end the round after the first epoch in which every new answer it taught had a probability above "
        "this; from 0.5 on, each of its tokens is then the most probable one. epochs is the upper limit. Default: all "
        "epochs",
    )
    replay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="share of a batch that is drawn from the facts that earlier rounds taught and that still hold, at "
        "least one; 0 looks back at none",
    )
    anchor: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="share of a batch that is drawn from everyday questions, taught with the base model's own answers, "
        "at least one; 0 asks none",
    )
    ridge: float | None = Field(
        default=None,
        ge=1e-3,
        exclude_if=lambda ridge: ridge is None,
        description="a new adapter draws LoRA's A so that it reads little of what everyday questions put into a layer, "
        "and B alone is trained: the smaller, the less A reads; default: A as usual, trained",
    )

    @model_validator(mode="after")
    def _has_room(self) -> TrainingConfig:
        if self.own < 1:
            raise ValueError(
                f"a batch of {self.batch} with replay {self.replay:g} and anchor {self.anchor:g} has no room for the "
                "round's own edits: raise batch, or lower replay or anchor"
            )
        return self

    @property
    def replayed(self) -> int:
        """Edits of a batch that are earlier facts, once there are any."""
        return max(1, round(self.replay * self.batch)) if self.replay else 0

    @property
    def anchored(self) -> int:
        """Edits of a batch that are everyday questions."""
        return max(1, round(self.anchor * self.batch)) if self.anchor else 0

    @property
    def own(self) -> int:
        """Edits of a batch that are the round's own, also in a first round, which has nothing to look back at."""
        return self.batch - self.replayed - self.anchored

    def effective(self, template: Literal["qa", "chat"]) -> TrainingConfig:
        """The same training, with fields that have no effect in this template set to their defaults."""
        return self if template == "chat" else self.model_copy(update={"answer_end": "end_token"})


def published_training(training: TrainingConfig) -> TrainingConfig:
    """The schedule of the authors' trainer, and how its answers end in the chat template."""
    return training.model_copy(update={"first_rate": "zero", "answer_end": "turn"})


RIDGE = 0.01
"""The ridge of `corsa edit` and of the method `replay-ridge`."""

RIDGE_GAIN = 4.0
"""With a ridge, the norm of each new A, in norms of the usual one."""

ALONE = {"replay": 0.0, "anchor": 0.0, "ridge": None}
"""Settings of a training that uses the round's own edits alone."""


def replaying(training: TrainingConfig) -> TrainingConfig:
    """Half of each batch from earlier rounds, where the settings do not say how much.

    Raises:
        CorsaError: that leaves no room for the round's own edits.
    """
    found = training if training.replay else training.model_copy(update={"replay": 0.5})
    if found.own < 1:
        raise CorsaError(
            f"replay takes half of a batch of {found.batch}, which leaves no room for the round's own edits: raise "
            "--training.batch, or set --training.replay"
        )
    return found


def reading_little(training: TrainingConfig) -> TrainingConfig:
    """Replay with a ridge, as in `corsa edit`. Settings that give a ridge are kept, with their rate.

    A is `RIDGE_GAIN` times as large, so a change of B counts for that much more. The rate is divided by it, so that
    methods with and without a ridge can share one setting.

    Raises:
        CorsaError: replay leaves no room for the round's own edits.
    """
    found = replaying(training)
    if found.ridge:
        return found
    return found.model_copy(update={"ridge": RIDGE, "learning_rate": found.learning_rate / RIDGE_GAIN})


TRAININGS = {
    "corsa-published": published_training,
    "replay": replaying,
    "corsa-replay": replaying,
    "replay-pcgrad": replaying,
    "replay-ridge": reading_little,
}
"""Methods with their own training settings: each is made from the configured training."""
