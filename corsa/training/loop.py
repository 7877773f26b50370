"""The training of one round: epochs over its edits, resumed from its last checkpoint, every edit once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from corsa.algorithm.learning_rate import learning_rate
from corsa.algorithm.packing import Triplet
from corsa.algorithm.row_settings import Together
from corsa.algorithm.sam import LookSam
from corsa.algorithm.step import corsa_step
from corsa.config import StepConfig
from corsa.config.steps import RoundConfig
from corsa.errors import CorsaError
from corsa.flow.store import Store
from corsa.training.adamw import Moments, PackedAdamW, Stepping
from corsa.training.checkpoint import Position, WithLook, load_checkpoint, save_checkpoint
from corsa.training.preemption import Notice
from corsa.training.tokens import batch_order
from corsa.training.worker_context import Loaded, Share, Workshop
from corsa.training.worker_group import Crew

CURVES = pa.schema(
    [
        ("method", pa.string()),  # null until a report names it
        ("seed", pa.int32()),
        ("round", pa.int32()),
        ("step", pa.int32()),
        ("epoch", pa.int32()),
        ("loss_sft", pa.float64()),
        ("loss_dpo", pa.float64()),
        ("logp_new", pa.float64()),  # nats, mean over the batch's edits, before the update
        ("logp_old", pa.float64()),
        ("cosine", pa.float64()),  # of the two gradients; null without DPO
        ("conflict", pa.bool_()),
        ("sharpness", pa.float64()),  # L(phi + e) - L(phi); null where the step was not perturbed
        ("grad_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("skipped", pa.bool_()),
    ]
)
"""One row per optimizer step."""


class RoundFailedError(CorsaError):
    """A round that would fail again if it were tried again; every worker finds so, at the same step."""


@dataclass(frozen=True)
class Lesson:
    """A round to be trained, and where in the store its checkpoint is kept."""

    config: RoundConfig
    checkpoint: tuple[Store, str]


AtEpoch = Callable[[int], None]
"""Is told how many epochs are done, on every worker."""


def train(
    config: RoundConfig,
    triplets: Sequence[Triplet],
    loaded: Loaded,
    workshop: Workshop,
    checkpoint: tuple[Store, str],
    post: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Train one round, as `train_together`. Returns its curves, or raises what stopped it."""
    (found,) = train_together([Lesson(config, checkpoint)], triplets, loaded, workshop, post)
    if isinstance(found, RoundFailedError):
        raise found
    return found


def train_together(
    lessons: Sequence[Lesson],
    triplets: Sequence[Triplet],
    loaded: Loaded,
    workshop: Workshop,
    post: Callable[[dict[str, Any]], None],
    at_epoch: AtEpoch = lambda epochs: None,
) -> list[list[dict[str, Any]] | RoundFailedError]:
    """Take phi from where it stands (or each row from its round's last checkpoint) through all epochs.

    Args:
        lessons: a round for each row of phi; they differ in seed, lambda, beta, rho and learning rate alone.
        triplets: the edits that the rounds teach, with their reference.
        loaded: the model; its `lora.phi` is trained in place.
        workshop: this worker's tools.
        post: takes a line for the progress display.
        at_epoch: called at the end of every epoch that is trained here.

    Returns:
        Of each round the rows of the curves table without the method's name, those before an interruption included;
        or why it stopped: too many steps had a gradient that was not finite. The others go on without it.

    Raises:
        RoundFailedError: the rounds have no edits.
    """
    crew, phi = workshop.crew, loaded.lora.phi
    if not triplets:
        raise RoundFailedError(
            f"round {lessons[0].config.round} has no edits to teach: lower --rounds, "
            "or give chains with as many updates"
        )
    optimizer, rows, kept = _optimizer(phi, crew, len(lessons))
    look, step = None, lessons[0].config.step
    if step.sam and step.perturb_every > 1:
        look = LookSam(phi, step.perturb_every, step.reuse)
        kept = [WithLook(state, look) for state in kept]  # of one round: such are not trained together
    with closing(optimizer):
        pupils = [
            _Pupil(lesson, row, state, load_checkpoint(*lesson.checkpoint, row, state, crew))
            for lesson, row, state in zip(lessons, rows, kept, strict=True)
        ]
        _learn(pupils, triplets, loaded, workshop, optimizer, look, post, at_epoch)
    workshop.notes += [note for pupil in pupils for note in pupil.position.notes]
    return [pupil.outcome for pupil in pupils]


def _optimizer(phi: nn.Parameter, crew: Crew, rows: int) -> tuple[Stepping, list[Tensor], list[Moments]]:
    """A fresh optimizer over phi, its rows, and what a checkpoint keeps of each."""
    if rows == 1:
        whole = crew.optimizer(phi)
        return whole, [phi], [whole]
    packed = PackedAdamW(phi)
    return packed, packed.rows, [packed.of(row) for row in range(rows)]


def _learn(
    pupils: Sequence[_Pupil],
    triplets: Sequence[Triplet],
    loaded: Loaded,
    workshop: Workshop,
    optimizer: Stepping,
    look: LookSam | None,
    post: Callable[[dict[str, Any]], None],
    at_epoch: AtEpoch,
) -> None:
    """All steps that are left to take."""
    crew, phi, configs = workshop.crew, loaded.lora.phi, [pupil.config for pupil in pupils]
    config, training = configs[0], configs[0].training
    per_epoch = -(-len(triplets) // training.batch)
    steps = per_epoch * training.epochs
    unit = config.step.microbatch if config.step.scope == "microbatch" else 1
    notice = Notice()
    setting = Together.of([config.step for config in configs], phi.device)
    began, resumed_at = time.monotonic(), min(pupil.position.step for pupil in pupils)
    for epoch in range(resumed_at // per_epoch, training.epochs):
        seen = np.zeros((len(pupils), len(triplets)), dtype=np.int64)  # by this worker
        orders = [batch_order(len(triplets), training.batch, seed=c.seed, round_=c.round, epoch=epoch) for c in configs]
        for number, chosen in enumerate(zip(*orders, strict=True), start=epoch * per_epoch + 1):
            own = [_own_parts(whole, config.step, crew) for whole in chosen]
            for counts, parts in zip(seen, own, strict=True):
                for part in parts:
                    counts[part] += 1
            if number <= resumed_at:
                continue
            start = time.monotonic()
            for pupil, group in zip(pupils, optimizer.param_groups, strict=True):
                peak = pupil.config.training.learning_rate
                group["lr"] = learning_rate(peak, number - 1, steps, training.warmup)
                group["waits"] = pupil.waits(number)
            shares = [
                Share([triplets[i] for i in whole], [[triplets[i] for i in part] for part in parts])
                for whole, parts in zip(chosen, own, strict=True)
            ]
            batch = workshop.batch(loaded, shares, unit)
            if look:
                look.begin(number)
            logs = corsa_step(loaded.model, phi, batch, setting, optimizer, training.clip, crew.sum, look)
            seconds = (time.monotonic() - start) / len(pupils)
            for pupil, log, group in zip(pupils, logs, optimizer.param_groups, strict=True):
                if not group["waits"]:
                    more = {"epoch": epoch + 1, "learning_rate": group["lr"], "seconds": seconds}
                    pupil.learnt({"step": number} | log | more)
            if all(pupil.failed for pupil in pupils):
                return
            warned = notice.news()
            if warned or number % workshop.placement.checkpoint_every == 0 or number == steps:
                for pupil in pupils:
                    if pupil.position.step == number and not pupil.failed:
                        if warned:
                            pupil.position.notes.append(f"{warned}: checkpoint taken after step {number}")
                        with workshop.timed("checkpoints"):
                            save_checkpoint(*pupil.lesson.checkpoint, pupil.row, pupil.state, pupil.position, crew)
            if crew.leads:
                pace = (time.monotonic() - began) / (number - resumed_at)
                post(
                    {"epoch": epoch + 1, "epochs": training.epochs, "step": number, "steps": steps}
                    | {"loss": _mean_loss(configs, logs), "eta_s": pace * (steps - number)}
                )
        _check_every_edit_once(seen, crew, epoch + 1)
        at_epoch(epoch + 1)


@dataclass
class _Pupil:
    """One row of phi on its way through its round."""

    lesson: Lesson
    row: Tensor
    state: Moments
    position: Position
    failed: RoundFailedError | None = None

    @property
    def config(self) -> RoundConfig:
        return self.lesson.config

    @property
    def outcome(self) -> list[dict[str, Any]] | RoundFailedError:
        return self.failed or self.position.curves

    def waits(self, number: int) -> bool:
        """Whether step `number` is not for this row: it has failed, or its checkpoint is ahead of the others'."""
        return self.failed is not None or number <= self.position.step

    def learnt(self, log: dict[str, Any]) -> None:
        """One more step is done."""
        self.position.add({"seed": self.config.seed, "round": self.config.round} | log)
        skipped = sum(c["skipped"] for c in self.position.curves)
        if skipped > self.config.training.max_skipped:
            self.failed = RoundFailedError(
                f"round {self.config.round}: {skipped} of {self.position.step} steps had a non-finite gradient, "
                f"the last being step {self.position.step}. Lower --training.learning-rate "
                f"(now {self.config.training.learning_rate:g}) or --corsa.rho, or use --dtype float32"
            )


def _mean_loss(configs: Sequence[RoundConfig], logs: Sequence[dict[str, Any]]) -> float:
    losses = [
        log["loss_sft"] + config.step.lambda_ * (log["loss_dpo"] or 0.0)
        for config, log in zip(configs, logs, strict=True)
    ]
    return sum(losses) / len(losses)


def _own_parts(chosen: np.ndarray, step: StepConfig, crew: Crew) -> list[np.ndarray]:
    """This worker's positions of a global batch, as the parts that perturbations are made from."""
    if step.scope == "microbatch":  # parts go to workers whole, so the result does not depend on how many there are
        parts = [chosen[i : i + step.microbatch] for i in range(0, len(chosen), step.microbatch)]
        return parts[crew.rank :: crew.size]
    own = chosen[crew.rank :: crew.size]
    return [own] if len(own) else []


def _check_every_edit_once(seen: np.ndarray, crew: Crew, epoch: int) -> None:
    counts = crew.sum(torch.from_numpy(seen).to(crew.device))
    if not bool((counts == 1).all()):
        raise AssertionError(f"epoch {epoch}: {int((counts != 1).sum())} edits were not seen exactly once")
