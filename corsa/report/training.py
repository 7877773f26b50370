"""What a round's training did, in sentences, from the record of its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from corsa.config import ModelConfig, TrainingConfig

ROUNDING = 0.005
"""About how much of its length the gradient changes by rounding alone, if phi is perturbed in a bfloat16 base."""
_DROWNED = ROUNDING * (4 / 3) ** 0.5
"""A smaller change has a cosine below 0.5 with the change without rounding, if both parts are orthogonal."""


def told_training(training: TrainingConfig, found: Mapping[str, Any]) -> Iterator[str]:
    """How many steps were taken of those planned, and why no more; and what was taught beside the round's own facts.

    Args:
        training: the round's settings.
        found: the metrics in the record of the round's step.
    """
    if training.stop_above is not None:
        steps, planned, bound = found["steps"], found["steps_planned"], 100 * training.stop_above
        if found["stopped"] == "learnt":
            yield f"stopped after {steps} of {planned} steps: every answer it taught was more than {bound:g} % probable"
        else:
            yield f"took all {planned} steps: not every answer it taught was more than {bound:g} % probable before"
    if training.ridge is not None:
        yield "trained LoRA's B alone, on an A that reads little of what everyday questions put into a layer"
    if found.get("anchored_on"):
        questions = f"{found['anchored_on']} everyday questions"
        yield f"taught the base model's own answers to {questions} beside them, {training.anchored} in every step"
    if found.get("replayed_from"):
        yield f"looked back at {found['replayed_from']} facts of earlier updates, {training.replayed} in every step"


def told_perturbation(model: ModelConfig, found: Mapping[str, Any]) -> Iterator[str]:
    """Says if the change of the gradient that SAM uses is mostly rounding.

    Args:
        model: the base model.
        found: the metrics in the record of the round's step.
    """
    change = found.get("gradient_change")
    if change is not None and model.dtype != "float32" and change < _DROWNED:
        yield (
            f"SAM's perturbation changed the gradient by {100 * change:.2g} % of its length (median of the steps). The "
            f"rounding of a bfloat16 base alone changes it by about {100 * ROUNDING:g} %, so the direction that SAM "
            "used is mostly noise: give --dtype float32, a larger --corsa.rho, or train without SAM"
        )
