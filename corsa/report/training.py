"""What a round's training did, in sentences, from the record of its step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from corsa.config import TrainingConfig


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
