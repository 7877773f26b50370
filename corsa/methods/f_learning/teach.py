"""One round of F-Learning: theta <- theta - alpha * delta(x, y_old), then theta <- theta + delta(x, y_new)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from corsa.algorithm.packing import Triplet
from corsa.lora.arithmetic import compress
from corsa.lora.attached import attached
from corsa.lora.factors import Adapter, stack
from corsa.methods.base import Round, Taught
from corsa.methods.f_learning import FLearningRoundConfig


def teach(round_: Round) -> Taught:
    """Both phases of a round (Ni et al. 2024, Eq. 2 and 3).

    Both deltas are plain LoRA, trained by the step of Algorithm 1 on top of all earlier rounds.

    Returns:
        The adapter of all rounds so far: the concatenated factors of the earlier rounds, the subtracted delta and the
        learnt delta, so that their product is the exact sum. The curves of the second phase. Metrics: `rank`,
        `training_s` of both phases, `forgetting_loss_sft` (the last loss of the first phase), and `cut_error` if the
        rank is cut.
    """
    config: FLearningRoundConfig = round_.config
    lora, alpha = round_.lora, config.f_learning.alpha
    known = [cast(Adapter, round_.before)] if round_.before else []

    def delta(examples: Sequence[Triplet], phase: str, *on: Adapter) -> tuple[Adapter, list[dict[str, Any]]]:
        lora.initialise(config.seed)
        with attached(round_.model, *on):
            curves = round_.train(examples, phase)
        return lora.adapter(), curves

    metrics: dict[str, Any] = {}
    start, forgetting = known, list[dict[str, Any]]()
    if backwards := [_backwards(t) for t in round_.triplets if t.old]:  # without an old answer, nothing is forgotten
        round_.post({"phase": "forgetting"})
        old, forgetting = delta(backwards, "forgetting", *known)
        weights = [1.0] * len(known) + [-alpha]
        start = [{name: stack([*(adapter[name] for adapter in known), old[name]], weights) for name in old}]
        metrics["forgetting_loss_sft"] = forgetting[-1]["loss_sft"]
    round_.post({"phase": "training"})
    new, curves = delta(round_.triplets, "learning", *start)
    adapter = {name: stack([*(part[name] for part in start), new[name]]) for name in new}
    if config.f_learning.rank is not None:
        adapter, metrics["cut_error"] = compress(adapter, config.f_learning.rank)
    metrics["training_s"] = round(sum(step["seconds"] for step in [*forgetting, *curves]), 3)
    metrics["rank"] = max(factors.rank for factors in adapter.values())
    return Taught(adapter, metrics, curves)


def _backwards(triplet: Triplet) -> Triplet:
    """The triplet with old and new answer swapped. The round subtracts what LoRA learns from it."""
    return replace(triplet, new=triplet.old, old=triplet.new, reference=triplet.reference[::-1])
