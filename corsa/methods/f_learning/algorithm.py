"""F-Learning (Ni et al. 2024, "Forgetting before Learning"): subtract the old answers, then learn the new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from corsa.algorithm.packing import Triplet
from corsa.config.steps import FLearningRoundConfig
from corsa.flow.store import Store
from corsa.lora.arithmetic import compress
from corsa.lora.attached import attached
from corsa.lora.factors import Adapter, stack
from corsa.training.loop import train
from corsa.training.worker_context import Loaded, Workshop


def f_learning(
    config: FLearningRoundConfig,
    triplets: Sequence[Triplet],
    loaded: Loaded,
    workshop: Workshop,
    partial: tuple[Store, str],
    before: Adapter | None,
    post: Callable[[dict[str, Any]], None],
) -> tuple[Adapter, list[dict[str, Any]], dict[str, Any]]:
    """One round: theta <- theta - alpha * delta(x, y_old), then theta <- theta + delta(x, y_new) (their Eq. 2 and 3).

    Both deltas are plain LoRA, trained by the one step of this project on top of all that earlier rounds have done.

    Args:
        config: the round; its `step` is plain LoRA's.
        triplets: the edits that the round teaches.
        loaded: the model, whose `lora` is trained twice.
        workshop: this worker's tools.
        partial: the store, and the folder in it for the checkpoints of the two trainings.
        before: the adapter of the round before.
        post: takes a line for the progress display.

    Returns:
        The adapter of all rounds so far (the factors of before, of what is subtracted and of what is learnt, side by
        side: their product is the exact sum), the learning's curves, and {rank, forgetting_loss_sft, cut_error}.
    """
    lora, alpha = loaded.lora, config.f_learning.alpha
    store, folder = partial
    known = [before] if before else []

    def delta(examples: Sequence[Triplet], name: str, *on: Adapter) -> tuple[Adapter, list[dict[str, Any]]]:
        lora.initialise(config.seed)
        with attached(loaded.model, *on):
            curves = train(config, examples, loaded, workshop, (store, f"{folder}/{name}"), post)
        return lora.adapter(), curves

    metrics: dict[str, Any] = {}
    start = known
    if backwards := [_backwards(t) for t in triplets if t.old]:  # what was never said cannot be forgotten
        post({"phase": "forgetting"})
        old, forgetting = delta(backwards, "forgetting", *known)
        weights = [1.0] * len(known) + [-alpha]
        start = [{name: stack([*(adapter[name] for adapter in known), old[name]], weights) for name in old}]
        metrics["forgetting_loss_sft"] = forgetting[-1]["loss_sft"]
    post({"phase": "training"})
    new, curves = delta(triplets, "learning", *start)
    adapter = {name: stack([*(part[name] for part in start), new[name]]) for name in new}
    if config.f_learning.rank is not None:
        adapter, metrics["cut_error"] = compress(adapter, config.f_learning.rank)
    metrics["rank"] = max(factors.rank for factors in adapter.values())
    return adapter, curves, metrics


def _backwards(triplet: Triplet) -> Triplet:
    """The old answer in the new one's place: what is learnt from it is what shall be forgotten."""
    return replace(triplet, new=triplet.old, old=triplet.new, reference=triplet.reference[::-1])
