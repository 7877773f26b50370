"""What a round's training did, in sentences, from the record of its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corsa.config import TrainingConfig


def told_training(training: TrainingConfig, found: Mapping[str, Any]) -> list[str]:
    """How many steps were taken of those planned, and why no more. Empty for a round that had no bound to stop at.

    Args:
        training: the round's settings.
        found: the metrics in the record of the round's step.
    """
    if training.stop_above is None or "steps_planned" not in found:
        return []
    steps, planned, bound = found["steps"], found["steps_planned"], 100 * training.stop_above
    if found["stopped"] == "learnt":
        return [f"stopped after {steps} of {planned} steps: every answer it taught was more than {bound:g} % probable"]
    return [f"took all {planned} steps: not every answer it taught was more than {bound:g} % probable before"]
