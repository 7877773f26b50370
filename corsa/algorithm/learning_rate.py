"""Linear warm-up, then linear decay (the authors' published setting)."""

from __future__ import annotations


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """The rate of step `step` (from 0) of `steps`: the first is above 0, the last of the decay is one step above 0.

    >>> [learning_rate(1.0, s, 6, 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)
