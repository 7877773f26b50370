"""Linear warm-up, then linear decay (the authors' published setting)."""

from __future__ import annotations

from typing import Literal


def learning_rate(
    peak: float, step: int, steps: int, warmup: int, first: Literal["above_zero", "zero"] = "above_zero"
) -> float:
    """The learning rate of step `step` (from 0) of `steps`. The last step is one decay step above 0.

    Args:
        peak: the highest rate.
        step: from 0.
        steps: steps in the round.
        warmup: steps of linear warm-up.
        first: above_zero: the first step has a rate above 0, and the last warm-up step has the peak. zero: as
            `transformers.get_linear_schedule_with_warmup`: the first step has rate 0, so it changes nothing.

    >>> [learning_rate(1.0, s, 6, 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> [learning_rate(1.0, s, 6, 2, "zero") for s in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if first == "zero":
        if step < warmup:
            return peak * (step / warmup)
        return peak * max(0.0, (steps - step) / max(1, steps - warmup))
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)
