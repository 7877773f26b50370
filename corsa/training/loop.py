"""The training of one round: epochs over its edits, resumed from its last checkpoint, every edit once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from corsa.config import StepConfig
from corsa.errors import CorsaError
from corsa.flow.store import Store
from corsa.identities import RoundConfig
from corsa.method.packing import Triplet
from corsa.method.schedule import learning_rate
from corsa.method.step import corsa_step
from corsa.training.checkpoint import Position, load_checkpoint, save_checkpoint
from corsa.training.crew import Crew
from corsa.training.tokens import batch_order
from corsa.training.workshop import Loaded, Workshop

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
        ("sharpness", pa.float64()),  # L(phi + e) - L(phi); null without SAM
        ("grad_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("skipped", pa.bool_()),
    ]
)
"""One row per optimizer step."""


class RoundFailedError(CorsaError):
    """A round that would fail again if it were tried again; every worker finds so, at the same step."""


def train(
    config: RoundConfig,
    triplets: Sequence[Triplet],
    loaded: Loaded,
    workshop: Workshop,
    checkpoint: tuple[Store, str],
    post: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Take phi from where it stands (or from the round's last checkpoint) through all epochs.

    Args:
        config: seed, round, step, and how long it is trained.
        triplets: the edits that the round teaches, with their reference.
        loaded: the model; its `lora.phi` is trained in place.
        workshop: this worker's tools.
        checkpoint: the store, and where in it this round's checkpoint is kept.
        post: takes a line for the progress display.

    Returns:
        The rows of the curves table without the method's name, those before an interruption included.

    Raises:
        RoundFailedError: the round has no edits, or too many steps had a gradient that was not finite.
    """
    crew, phi, training = workshop.crew, loaded.lora.phi, config.training
    if not triplets:
        raise RoundFailedError(
            f"round {config.round} has no edits to teach: lower --rounds, or give chains with as many updates"
        )
    per_epoch = -(-len(triplets) // training.batch)
    steps = per_epoch * training.epochs
    unit = config.step.microbatch if config.step.scope == "microbatch" else 1
    with closing(crew.optimizer(phi)) as optimizer:  # fresh each round
        position = load_checkpoint(*checkpoint, phi, optimizer, crew)
        began, resumed_at = time.monotonic(), position.step
        for epoch in range(resumed_at // per_epoch, training.epochs):
            seen = np.zeros(len(triplets), dtype=np.int64)  # by this worker
            batches = batch_order(len(triplets), training.batch, seed=config.seed, round_=config.round, epoch=epoch)
            for number, chosen in enumerate(batches, start=epoch * per_epoch + 1):
                own = _own_parts(chosen, config.step, crew)
                for part in own:
                    seen[part] += 1
                if number <= resumed_at:
                    continue
                start = time.monotonic()
                rate = learning_rate(training.learning_rate, position.step, steps, training.warmup)
                optimizer.param_groups[0]["lr"] = rate
                parts = [[triplets[i] for i in part] for part in own]
                batch = workshop.batch(loaded, [triplets[i] for i in chosen], parts, unit)
                log = corsa_step(loaded.model, phi, batch, config.step, optimizer, training.clip, crew.sum)
                log |= {"epoch": epoch + 1, "learning_rate": rate, "seconds": time.monotonic() - start}
                position.add({"seed": config.seed, "round": config.round, "step": number} | log)
                _stop_if_diverged(position, config)
                if number % workshop.placement.checkpoint_every == 0 or number == steps:
                    save_checkpoint(*checkpoint, phi, optimizer, position, crew)
                if crew.leads:
                    pace = (time.monotonic() - began) / (number - resumed_at)
                    loss = log["loss_sft"] + config.step.lambda_ * (log["loss_dpo"] or 0.0)
                    post(
                        {"epoch": epoch + 1, "epochs": training.epochs, "step": number, "steps": steps}
                        | {"loss": loss, "eta_s": pace * (steps - number)}
                    )
            _check_every_edit_once(seen, crew, epoch + 1)
        workshop.notes += position.notes
    return position.curves


def _own_parts(chosen: np.ndarray, step: StepConfig, crew: Crew) -> list[np.ndarray]:
    """This worker's positions of a global batch, as the parts that perturbations are made from."""
    if step.scope == "microbatch":  # parts go to workers whole, so the result does not depend on how many there are
        parts = [chosen[i : i + step.microbatch] for i in range(0, len(chosen), step.microbatch)]
        return parts[crew.rank :: crew.size]
    own = chosen[crew.rank :: crew.size]
    return [own] if len(own) else []


def _stop_if_diverged(position: Position, config: RoundConfig) -> None:
    skipped = sum(c["skipped"] for c in position.curves)
    if skipped > config.training.max_skipped:
        raise RoundFailedError(
            f"round {config.round}: {skipped} of {position.step} steps had a non-finite gradient, "
            f"the last being step {position.step}. Lower --training.learning-rate "
            f"(now {config.training.learning_rate:g}) or --corsa.rho, or use --dtype float32"
        )


def _check_every_edit_once(seen: np.ndarray, crew: Crew, epoch: int) -> None:
    counts = crew.sum(torch.from_numpy(seen).to(crew.device))
    if not bool((counts == 1).all()):
        raise AssertionError(f"epoch {epoch}: {int((counts != 1).sum())} edits were not seen exactly once")
